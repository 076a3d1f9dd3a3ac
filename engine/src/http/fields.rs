//! A strict reader of JSON bodies. Enters: a JSON value. Leaves: typed values, or an error that names the parameter
//! by its path and says what is accepted. A field that nobody took is an error too: nothing is silently ignored.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::http::errors::ApiError;

/// An object being read: every `take` removes its field, `finish` refuses what is left.
pub struct Fields {
    /// Path of this object in the body; empty for the body itself.
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a whole body.
    pub fn from_body(body: &[u8]) -> Result<Fields, ApiError> {
        let value: Value = serde_json::from_slice(body).map_err(|e| {
            ApiError::invalid(format!("the body is not valid JSON: {e}")).code("invalid_json")
        })?;
        Fields::from_value(value, "")
    }

    /// `path` names the value in errors.
    pub fn from_value(value: Value, path: &str) -> Result<Fields, ApiError> {
        match value {
            Value::Object(map) => Ok(Fields { path: path.to_owned(), map }),
            other if path.is_empty() => Err(ApiError::invalid(format!(
                "the body must be a JSON object, not {}",
                kind(&other)
            ))),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    /// The path of a field in the body, as errors name it.
    pub fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// JSON null counts as absent, as clients send it for "not set".
    pub fn value(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    pub fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.path_of(name), "a string", &other)),
        }
    }

    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(other) => Err(wrong_type(&self.path_of(name), "a boolean", &other)),
        }
    }

    pub fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(wrong_type(&self.path_of(name), "an array", &other)),
        }
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        let path = self.path_of(name);
        self.value(name).map(|value| Fields::from_value(value, &path)).transpose()
    }

    pub fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ApiError> {
        let path = self.path_of(name);
        self.value(name).map(|value| number(&value, &path, range)).transpose()
    }

    pub fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let path = self.path_of(name);
        self.value(name).map(|value| integer(&value, &path, range)).transpose()
    }

    /// A parameter the engine does not offer: only values that ask for nothing pass.
    pub fn refuse(&mut self, name: &str, harmless: &[Value], remedy: &str) -> Result<(), ApiError> {
        match self.value(name) {
            Some(value) if !harmless.contains(&value) => {
                let path = self.path_of(name);
                Err(ApiError::parameter(
                    path.clone(),
                    format!("`{path}` is not supported by this engine; {remedy}"),
                )
                .code("unsupported_parameter"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what nobody took.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => {
                let path = self.path_of(name);
                Err(ApiError::parameter(
                    path.clone(),
                    format!("unknown parameter `{path}`; remove it"),
                )
                .code("unknown_parameter"))
            }
        }
    }
}

pub fn number(value: &Value, path: &str, range: RangeInclusive<f64>) -> Result<f64, ApiError> {
    let Some(number) = value.as_f64() else { return Err(wrong_type(path, "a number", value)) };
    if range.contains(&number) {
        return Ok(number);
    }
    let (low, high) = range.into_inner();
    Err(out_of_range(path, value, low, high))
}

pub fn integer(value: &Value, path: &str, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    // Some clients write 16 as 16.0.
    let whole = |x: f64| (x.fract() == 0.0 && x.abs() < 9.0e15).then_some(x as i64);
    let integer = match value {
        Value::Number(n) => n.as_i64().or_else(|| n.as_f64().and_then(whole)),
        other => return Err(wrong_type(path, "an integer", other)),
    };
    match integer {
        Some(integer) if range.contains(&integer) => Ok(integer),
        None if value.is_f64() && value.as_f64().is_some_and(|x| x.fract() != 0.0) => {
            Err(wrong_type(path, "an integer", value))
        }
        _ => Err(out_of_range(path, value, range.start(), range.end())),
    }
}

pub fn wrong_type(path: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::parameter(path, format!("`{path}` must be {expected}, not {}", kind(found)))
        .code("invalid_type")
}

fn out_of_range(
    path: &str,
    found: &Value,
    low: impl std::fmt::Display,
    high: impl std::fmt::Display,
) -> ApiError {
    ApiError::parameter(path, format!("`{path}` must be between {low} and {high}, not {found}"))
        .code("invalid_value")
}

pub fn missing(path: &str) -> ApiError {
    ApiError::parameter(path, format!("`{path}` is required")).code("missing_required_parameter")
}

/// A value's kind in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a number with a fraction",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::from_value(value, "").unwrap()
    }

    #[test]
    fn a_field_that_nobody_takes_is_refused_by_its_name() {
        let mut body = fields(json!({"known": 1, "tempreature": 2}));
        body.integer("known", 0..=9).unwrap();
        let error = body.finish().unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tempreature"));
        assert_eq!(error.code, Some("unknown_parameter"));
    }

    #[test]
    fn nested_fields_are_named_by_path() {
        let mut body = fields(json!({"stream_options": {"include_usage": "yes"}}));
        let mut options = body.object("stream_options").unwrap().unwrap();
        let error = options.boolean("include_usage").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("stream_options.include_usage"));
    }

    #[test]
    fn null_is_absent() {
        let mut body = fields(json!({"n": null}));
        assert_eq!(body.integer("n", 1..=4).unwrap(), None);
        body.finish().unwrap();
    }

    #[test]
    fn integers_may_be_written_with_a_point_but_not_with_a_fraction() {
        assert_eq!(integer(&json!(16.0), "n", 1..=20).unwrap(), 16);
        assert_eq!(integer(&json!(1.5), "n", 1..=20).unwrap_err().code, Some("invalid_type"));
        assert_eq!(integer(&json!(21), "n", 1..=20).unwrap_err().code, Some("invalid_value"));
        assert_eq!(integer(&json!(1e300), "n", 1..=20).unwrap_err().code, Some("invalid_value"));
        assert_eq!(integer(&json!(u64::MAX), "n", 1..=20).unwrap_err().code, Some("invalid_value"));
    }

    #[test]
    fn a_harmless_value_of_an_unsupported_parameter_passes() {
        let mut body = fields(json!({"store": false, "tools": []}));
        body.refuse("store", &[json!(false)], "leave it out").unwrap();
        let error = body.refuse("tools", &[], "describe them in a message").unwrap_err();
        assert_eq!(error.code, Some("unsupported_parameter"));
        assert_eq!(error.param.as_deref(), Some("tools"));
    }
}

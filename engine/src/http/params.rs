//! The parameters that chat and plain completions share. Enters: the fields of a body. Leaves: a [`Wish`] for the
//! engine and what the response needs to know. Every range is checked here and nowhere else.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::admission::Wish;
use crate::batch::{SamplingParams, TokenId};
use crate::http::errors::ApiError;
use crate::http::fields::{self, Fields};

/// Choices of one HTTP request, over all its prompts.
pub const CHOICES_MAX: u32 = 128;
/// Alternatives per token.
pub const TOP_LOGPROBS_MAX: i64 = 20;
const STOP_STRINGS_MAX: usize = 4;
const STOP_STRING_BYTES_MAX: usize = 1024;
const STOP_TOKENS_MAX: usize = 128;
const LOGIT_BIAS_ENTRIES_MAX: usize = 1024;
const CACHE_SALT_BYTES_MAX: usize = 256;

/// What both kinds of completion read alike.
#[derive(Clone, Debug)]
pub struct Shared {
    pub model: String,
    /// Without `output_tokens_max` and log-probabilities, which each kind spells in its own way.
    pub wish: Wish,
    pub stop_strings: Arc<[String]>,
    /// None: one JSON answer.
    pub stream: Option<StreamOptions>,
    /// The end user's name as the client knows it, for our log.
    pub user: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// A last chunk with the usage and no choices.
    pub include_usage: bool,
}

/// `vocabulary` bounds token ids; `seed` is used when the client sends none.
pub fn shared(body: &mut Fields, vocabulary: u32, seed: u64) -> Result<Shared, ApiError> {
    let model = body.string("model")?.ok_or_else(|| fields::missing("model"))?;
    let choices = body.integer("n", 1..=i64::from(CHOICES_MAX))?.unwrap_or(1);
    let wish = Wish {
        choices: u32::try_from(choices).expect("checked against CHOICES_MAX"),
        sampling: sampling(body, vocabulary, seed)?,
        output_tokens_max: None,
        ignore_eos: body.boolean("ignore_eos")?.unwrap_or(false),
        stop_token_ids: stop_token_ids(body, vocabulary)?,
        cache_salt: cache_salt(body)?,
    };
    let shared = Shared {
        model,
        wish,
        stop_strings: stop_strings(body)?,
        stream: stream(body)?,
        user: body.string("user")?,
    };
    refuse_unsupported(body)?;
    Ok(shared)
}

fn sampling(body: &mut Fields, vocabulary: u32, seed: u64) -> Result<SamplingParams, ApiError> {
    let defaults = SamplingParams::default();
    let seed = body.integer("seed", i64::MIN..=i64::MAX)?.map_or(seed, i64::cast_unsigned);
    let mut real = |name, range, default| -> Result<f32, ApiError> {
        Ok(body.number(name, range)?.map_or(default, |x| x as f32))
    };
    // The smallest positive f32: zero would keep no token, or divide by it.
    let above_zero = f64::from(f32::MIN_POSITIVE);
    let params = SamplingParams {
        temperature: real("temperature", 0.0..=2.0, defaults.temperature)?,
        top_p: real("top_p", above_zero..=1.0, defaults.top_p)?,
        min_p: real("min_p", 0.0..=1.0, defaults.min_p)?,
        repetition_penalty: real("repetition_penalty", 0.01..=100.0, defaults.repetition_penalty)?,
        presence_penalty: real("presence_penalty", -2.0..=2.0, defaults.presence_penalty)?,
        frequency_penalty: real("frequency_penalty", -2.0..=2.0, defaults.frequency_penalty)?,
        seed,
        ..defaults
    };
    // −1 means "all" to clients of other engines.
    let top_k = body.integer("top_k", -1..=i64::from(u32::MAX))?.unwrap_or(0).max(0);
    Ok(SamplingParams {
        top_k: u32::try_from(top_k).expect("checked against u32::MAX"),
        logit_bias: logit_bias(body, vocabulary)?,
        ..params
    })
}

/// `{"token id": bias}`.
fn logit_bias(body: &mut Fields, vocabulary: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let map = match body.value("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(fields::wrong_type("logit_bias", "an object", &other)),
    };
    if map.len() > LOGIT_BIAS_ENTRIES_MAX {
        return Err(too_many("logit_bias", LOGIT_BIAS_ENTRIES_MAX, "entries"));
    }
    let mut bias = Vec::with_capacity(map.len());
    for (key, value) in &map {
        let path = format!("logit_bias.{key}");
        let token: TokenId = key.parse().ok().filter(|&id| id < vocabulary).ok_or_else(|| {
            ApiError::parameter(
                &*path,
                format!("keys of `logit_bias` are token ids below {vocabulary}, not `{key}`"),
            )
            .code("invalid_value")
        })?;
        bias.push((token, fields::number(value, &path, -100.0..=100.0)? as f32));
    }
    Ok(bias)
}

fn stop_strings(body: &mut Fields) -> Result<Arc<[String]>, ApiError> {
    let items = match body.value("stop") {
        None => return Ok(Arc::new([])),
        Some(Value::Array(items)) => items,
        Some(one @ Value::String(_)) => vec![one],
        Some(other) => return Err(fields::wrong_type("stop", "a string or an array", &other)),
    };
    if items.len() > STOP_STRINGS_MAX {
        return Err(too_many("stop", STOP_STRINGS_MAX, "strings"));
    }
    let text = |item: Value| match item {
        Value::String(text) if text.is_empty() => {
            Err(ApiError::parameter("stop", "`stop` must not hold an empty string")
                .code("invalid_value"))
        }
        Value::String(text) if text.len() > STOP_STRING_BYTES_MAX => {
            Err(too_many("stop", STOP_STRING_BYTES_MAX, "bytes in a string"))
        }
        Value::String(text) => Ok(text),
        other => Err(fields::wrong_type("stop", "a string or an array of strings", &other)),
    };
    items.into_iter().map(text).collect()
}

fn stop_token_ids(body: &mut Fields, vocabulary: u32) -> Result<Vec<TokenId>, ApiError> {
    let items = body.array("stop_token_ids")?.unwrap_or_default();
    if items.len() > STOP_TOKENS_MAX {
        return Err(too_many("stop_token_ids", STOP_TOKENS_MAX, "entries"));
    }
    token_ids(&items, "stop_token_ids", vocabulary)
}

/// Token ids of this model; `path` names the array.
pub fn token_ids(items: &[Value], path: &str, vocabulary: u32) -> Result<Vec<TokenId>, ApiError> {
    items
        .iter()
        .enumerate()
        .map(|(i, item)| match item.as_u64() {
            // The path is only built for the error: prompts are long.
            Some(id) if id < u64::from(vocabulary) => Ok(id as TokenId),
            _ => {
                let range = 0..=i64::from(vocabulary) - 1;
                fields::integer(item, &format!("{path}[{i}]"), range).map(|id| id as TokenId)
            }
        })
        .collect()
}

fn cache_salt(body: &mut Fields) -> Result<Option<String>, ApiError> {
    match body.string("cache_salt")? {
        Some(salt) if salt.is_empty() || salt.len() > CACHE_SALT_BYTES_MAX => {
            let range = format!("`cache_salt` must have 1 to {CACHE_SALT_BYTES_MAX} bytes");
            Err(ApiError::parameter("cache_salt", range).code("invalid_value"))
        }
        salt => Ok(salt),
    }
}

fn stream(body: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let streams = body.boolean("stream")?.unwrap_or(false);
    let Some(mut options) = body.object("stream_options")? else {
        return Ok(streams.then(StreamOptions::default));
    };
    if !streams {
        return Err(ApiError::parameter(
            "stream_options",
            "`stream_options` is only allowed with `stream: true`",
        ));
    }
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    options.refuse("include_obfuscation", &[json!(false)], "leave it out")?;
    options.finish()?;
    Ok(Some(StreamOptions { include_usage }))
}

/// Parameters of OpenAI's API that this engine does not offer. Values that ask for nothing pass.
fn refuse_unsupported(body: &mut Fields) -> Result<(), ApiError> {
    let leave = "leave it out";
    body.refuse("store", &[json!(false)], "nothing is stored here; leave it out")?;
    body.refuse("metadata", &[json!({})], "it belongs to stored completions; leave it out")?;
    body.refuse("service_tier", &[json!("auto"), json!("default")], leave)?;
    body.refuse("safety_identifier", &[], "send `user` instead")?;
    body.refuse("prompt_cache_key", &[], "prefixes are cached by content; leave it out")?;
    body.refuse("prompt_cache_retention", &[], leave)?;
    body.refuse("min_tokens", &[json!(0)], leave)?;
    body.refuse("guided_json", &[], "describe the format in the prompt")?;
    body.refuse("best_of", &[json!(1)], "use `n` and choose among the choices")
}

fn too_many(path: &str, limit: usize, of: &str) -> ApiError {
    ApiError::parameter(path, format!("`{path}` may have at most {limit} {of}"))
        .code("invalid_value")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Shared, ApiError> {
        let mut body = Fields::from_value(body, "").unwrap();
        let shared = shared(&mut body, 100, 42)?;
        body.finish()?;
        Ok(shared)
    }

    /// The parameter and code of the error.
    fn refused(body: Value) -> (String, &'static str) {
        let error = read(body).unwrap_err();
        assert_eq!(error.status, 400);
        (error.param.unwrap_or_default(), error.code.unwrap_or_default())
    }

    #[test]
    fn an_empty_wish_has_openai_defaults() {
        let shared = read(json!({"model": "m"})).unwrap();
        assert_eq!(shared.wish.sampling, SamplingParams { seed: 42, ..SamplingParams::default() });
        assert_eq!((shared.wish.choices, shared.stream), (1, None));
        assert!(shared.stop_strings.is_empty() && shared.wish.stop_token_ids.is_empty());
    }

    #[test]
    fn every_sampling_parameter_arrives() {
        let shared =
            read(json!({"model": "m", "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.25,
            "repetition_penalty": 1.5, "presence_penalty": -2, "frequency_penalty": 2, "seed": -1,
            "logit_bias": {"7": -100, "99": 1.5}, "n": 3, "stop": ["a", "b"], "stop_token_ids": [5],
            "ignore_eos": true, "cache_salt": "tenant", "user": "u", "stream": true,
            "stream_options": {"include_usage": true}}))
            .unwrap();
        let expected = SamplingParams {
            temperature: 0.0,
            top_p: 0.5,
            top_k: 3,
            min_p: 0.25,
            repetition_penalty: 1.5,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            seed: u64::MAX,
            logit_bias: vec![(7, -100.0), (99, 1.5)],
            ..SamplingParams::default()
        };
        assert_eq!(shared.wish.sampling, expected);
        assert_eq!((shared.wish.choices, shared.wish.ignore_eos), (3, true));
        assert_eq!(shared.wish.stop_token_ids, [5]);
        assert_eq!(shared.wish.cache_salt.as_deref(), Some("tenant"));
        assert_eq!(*shared.stop_strings, ["a", "b"]);
        assert_eq!(shared.stream, Some(StreamOptions { include_usage: true }));
        assert_eq!(shared.user.as_deref(), Some("u"));
    }

    #[test]
    fn every_refusal_names_its_parameter() {
        let cases = [
            (json!({}), "model", "missing_required_parameter"),
            (json!({"model": 3}), "model", "invalid_type"),
            (json!({"temperature": 2.1}), "temperature", "invalid_value"),
            (json!({"temperature": "hot"}), "temperature", "invalid_type"),
            (json!({"top_p": 0}), "top_p", "invalid_value"),
            (json!({"top_k": -2}), "top_k", "invalid_value"),
            (json!({"min_p": 1.5}), "min_p", "invalid_value"),
            (json!({"repetition_penalty": 0}), "repetition_penalty", "invalid_value"),
            (json!({"presence_penalty": 3}), "presence_penalty", "invalid_value"),
            (json!({"frequency_penalty": -3}), "frequency_penalty", "invalid_value"),
            (json!({"seed": 1.5}), "seed", "invalid_type"),
            (json!({"n": 0}), "n", "invalid_value"),
            (json!({"n": 129}), "n", "invalid_value"),
            (json!({"logit_bias": {"100": 1}}), "logit_bias.100", "invalid_value"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias.x", "invalid_value"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias.1", "invalid_value"),
            (json!({"logit_bias": []}), "logit_bias", "invalid_type"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop", "invalid_value"),
            (json!({"stop": ""}), "stop", "invalid_value"),
            (json!({"stop": [1]}), "stop", "invalid_type"),
            (json!({"stop_token_ids": [100]}), "stop_token_ids[0]", "invalid_value"),
            (json!({"stop_token_ids": ["a"]}), "stop_token_ids[0]", "invalid_type"),
            (json!({"cache_salt": ""}), "cache_salt", "invalid_value"),
            (json!({"stream": 1}), "stream", "invalid_type"),
            (json!({"stream_options": {}}), "stream_options", ""),
            (
                json!({"stream": true, "stream_options": {"x": 1}}),
                "stream_options.x",
                "unknown_parameter",
            ),
            (json!({"best_of": 2}), "best_of", "unsupported_parameter"),
            (json!({"store": true}), "store", "unsupported_parameter"),
            (json!({"unheard_of": 1}), "unheard_of", "unknown_parameter"),
        ];
        for (mut body, param, code) in cases {
            if param != "model" {
                body["model"] = json!("m");
            }
            assert_eq!(refused(body.clone()), (param.to_owned(), code), "{body}");
        }
    }
}

//! From messages to the prompt's text, by the Jinja template that came with the checkpoint. A template is foreign code:
//! its time, memory, recursion and output are bounded, and it sees nothing but the conversation and the date it is given.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use minijinja::value::{Kwargs, Rest, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, context};
use serde_json::Value as Json;

use crate::model::files;

/// Instructions of a rendering, and at 64 bytes each the memory it may take.
const FUEL: u64 = 4_000_000;
/// Bytes of the prompt's text.
const OUTPUT_BYTES_MAX: usize = 32 << 20;
/// Nested calls; well inside the stack of a runtime thread.
const RECURSION_MAX: usize = 200;
/// Items of a list or map written as a whole. A repeated list (`[0] * n`) costs no fuel until it is written, and then the
/// renderer walks all of it, even after the output has refused more.
const ITEMS_WRITTEN_MAX: usize = 100_000;
const NAME: &str = "chat template";
/// Context variable that carries the time to `strftime_now`.
const NOW: &str = "_now_unix_seconds";

#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    /// At load: the template does not compile, or a file around it does not parse.
    #[error("the chat template of this checkpoint cannot be used: {0}")]
    Invalid(String),
    /// The template itself refused the conversation (`raise_exception`).
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// It ran out of time, memory or output.
    #[error("the model's chat template exceeds its limits on these messages: {0}")]
    Exceeded(String),
    #[error("the model's chat template fails on these messages: {0}")]
    Failed(String),
}

/// Texts of the special tokens that templates write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub unk: Option<String>,
    pub pad: Option<String>,
}

/// What a rendering may choose beside the messages.
#[derive(Clone, Debug)]
pub struct Rendering<'a> {
    /// Objects with `role`, `content` and what else the client sent.
    pub messages: &'a [Json],
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// `chat_template_kwargs`: variables of this template, such as `enable_thinking`.
    pub variables: &'a serde_json::Map<String, Json>,
    /// UTC; for templates that write the date.
    pub now_unix_seconds: i64,
}

#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
}

impl ChatTemplate {
    /// Finds the template of the checkpoint in `dir`: chat_template.jinja, chat_template.json, tokenizer_config.json, in
    /// this order. None where there is none.
    pub fn open(dir: &Path) -> Result<Option<ChatTemplate>, ChatTemplateError> {
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Json::Null);
        let Some(source) = find_source(dir, &config)? else { return Ok(None) };
        ChatTemplate::compile(&source, special_tokens(&config)).map(Some)
    }

    pub fn compile(
        source: &str,
        special: SpecialTokens,
    ) -> Result<ChatTemplate, ChatTemplateError> {
        let mut environment = environment();
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| ChatTemplateError::Invalid(e.to_string()))?;
        Ok(ChatTemplate { environment, special })
    }

    pub fn render(&self, rendering: &Rendering) -> Result<String, ChatTemplateError> {
        let template = self.environment.get_template(NAME).expect("compiled under this name");
        let SpecialTokens { bos, eos, unk, pad } = &self.special;
        let fixed = context! {
            messages => Value::from(Serde(rendering.messages)),
            add_generation_prompt => rendering.add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            _now_unix_seconds => rendering.now_unix_seconds,
            bos_token => bos.as_deref().unwrap_or_default(),
            eos_token => eos.as_deref().unwrap_or_default(),
            unk_token => unk.as_deref().unwrap_or_default(),
            pad_token => pad.as_deref().unwrap_or_default(),
        };
        let variables = Value::from(Serde(rendering.variables));
        let mut out = Bounded(Vec::new());
        template
            .render_captured_to(context! { ..fixed, ..variables }, &mut out)
            .map_err(|e| explain(&e))?;
        String::from_utf8(out.0).map_err(|e| ChatTemplateError::Failed(e.to_string()))
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = minijinja::syntax::SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("the default delimiters are valid");
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_MAX);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(write_value);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment
}

fn write_value(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let container = matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map);
    if container && value.len().is_some_and(|items| items > ITEMS_WRITTEN_MAX) {
        return Err(Error::from(ErrorKind::WriteFailure));
    }
    minijinja::escape_formatter(out, state, value)
}

/// Marks a refusal by the template among other failures.
const REFUSAL: &str = "raise_exception: ";

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("{REFUSAL}{message}")))
}

fn explain(error: &Error) -> ChatTemplateError {
    let detail = error.detail().unwrap_or_default();
    if let Some(message) = detail.strip_prefix(REFUSAL) {
        return ChatTemplateError::Refused(message.to_owned());
    }
    match error.kind() {
        ErrorKind::OutOfFuel => ChatTemplateError::Exceeded(format!("more than {FUEL} operations")),
        ErrorKind::WriteFailure => ChatTemplateError::Exceeded(format!(
            "more than {OUTPUT_BYTES_MAX} bytes or a list of more than {ITEMS_WRITTEN_MAX} items"
        )),
        _ => ChatTemplateError::Failed(error.to_string()),
    }
}

/// Output that refuses to grow without end.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::Error::other("output limit"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn find_source(dir: &Path, config: &Json) -> Result<Option<String>, ChatTemplateError> {
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        let source = files::read(&file, files::TEXT_BYTES_MAX).map_err(|e| invalid(&file, &e))?;
        return String::from_utf8(source).map(Some).map_err(|e| invalid(&file, &e));
    }
    let wrapped = read_json(&dir.join("chat_template.json"))?;
    let templates =
        wrapped.as_ref().map_or(&config["chat_template"], |json| &json["chat_template"]);
    Ok(match templates {
        Json::String(source) => Some(source.clone()),
        // Several templates by name: conversations use "default".
        Json::Array(named) => named
            .iter()
            .find(|t| t["name"] == "default")
            .and_then(|t| t["template"].as_str())
            .map(str::to_owned),
        _ => None,
    })
}

fn read_json(path: &Path) -> Result<Option<Json>, ChatTemplateError> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = files::read(path, files::TEXT_BYTES_MAX).map_err(|e| invalid(path, &e))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| invalid(path, &e))
}

fn invalid(path: &Path, error: &dyn std::fmt::Display) -> ChatTemplateError {
    ChatTemplateError::Invalid(format!("{}: {error}", path.display()))
}

/// Special tokens stand in tokenizer_config.json as a text or as `{"content": text}`.
fn special_tokens(config: &Json) -> SpecialTokens {
    let text = |name: &str| {
        let value = &config[name];
        value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
    };
    SpecialTokens {
        bos: text("bos_token"),
        eos: text("eos_token"),
        unk: text("unk_token"),
        pad: text("pad_token"),
    }
}

/// `{% generation %}` marks the assistant's words for training; here it becomes a block without effect that trims white
/// space as the tag did.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        // Behind the opening: in `{%}` one percent sign cannot serve twice.
        let Some(close) = tag[2..].find("%}").map(|at| at + 2) else { break };
        out.push_str(before);
        let (tag, after) = tag.split_at(close + 2);
        let inner = &tag[2..close];
        let word = inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        match word {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps` with `ensure_ascii=False`, as training frameworks define the filter: `", "` and `": "` between
/// parts, no HTML escapes.
fn tojson(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = match positional.first() {
        Some(indent) => indent.clone().try_into().map(Some)?,
        None => options.get("indent")?,
    };
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let _ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut json = serde_json::to_value(value)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    if sort_keys.unwrap_or(false) {
        sort(&mut json);
    }
    let mut out = String::new();
    write_json(&mut out, &json, indent, 0);
    Ok(Value::from(out))
}

fn sort(json: &mut Json) {
    match json {
        Json::Object(map) => {
            map.values_mut().for_each(sort);
            map.sort_keys();
        }
        Json::Array(items) => items.iter_mut().for_each(sort),
        _ => {}
    }
}

/// Depth is bounded by the parser of the body and by the template's recursion.
fn write_json(out: &mut String, json: &Json, indent: Option<usize>, depth: usize) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match json {
        Json::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                line(out, depth + 1);
                write_json(out, item, indent, depth + 1);
            }
            line(out, depth);
            out.push(']');
        }
        Json::Object(map) if !map.is_empty() => {
            out.push('{');
            for (i, (key, item)) in map.iter().enumerate() {
                out.push_str(if i > 0 { separator } else { "" });
                line(out, depth + 1);
                let _ = write!(out, "{}: ", Json::from(key.as_str()));
                write_json(out, item, indent, depth + 1);
            }
            line(out, depth);
            out.push('}');
        }
        scalar => {
            let _ = write!(out, "{scalar}");
        }
    }
}

/// The date in UTC by a `strftime` format.
fn strftime_now(state: &State, format: String) -> Result<String, Error> {
    let now = state
        .lookup(NOW)
        .filter(|now| now.kind() == ValueKind::Number)
        .and_then(|now| i64::try_from(now).ok())
        .expect("every rendering carries the time");
    strftime(&format, now).map_err(|unknown| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now does not know the directive %{unknown}"),
        )
    })
}

fn strftime(format: &str, unix_seconds: i64) -> Result<String, char> {
    const DAYS: [&str; 7] =
        ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = unix_seconds.div_euclid(86_400);
    let second = unix_seconds.rem_euclid(86_400);
    let (year, month, day) = civil(days);
    let month_name = MONTHS[(month - 1) as usize];
    let day_name = DAYS[(days + 4).rem_euclid(7) as usize];
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next().unwrap_or('%');
        let _ = match directive {
            'Y' => write!(out, "{year:04}"),
            'y' => write!(out, "{:02}", year.rem_euclid(100)),
            'm' => write!(out, "{month:02}"),
            'd' => write!(out, "{day:02}"),
            'B' => write!(out, "{month_name}"),
            'b' => write!(out, "{}", &month_name[..3]),
            'A' => write!(out, "{day_name}"),
            'a' => write!(out, "{}", &day_name[..3]),
            'H' => write!(out, "{hour:02}"),
            'I' => write!(out, "{:02}", (hour + 11) % 12 + 1),
            'p' => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            'M' => write!(out, "{minute:02}"),
            'S' => write!(out, "{second:02}"),
            'F' => write!(out, "{year:04}-{month:02}-{day:02}"),
            'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            '%' => write!(out, "%"),
            unknown => return Err(unknown),
        };
    }
    Ok(out)
}

/// Year, month and day of a count of days since 1970-01-01 in the Gregorian calendar. Years start in March, so that
/// the leap day is the last of its year.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests;

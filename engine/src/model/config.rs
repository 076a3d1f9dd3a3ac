//! config.json, parsed at the door: a [`Config`] cannot be wrong. Enters: the JSON of a checkpoint, in the old form
//! (`rope_theta`, `rope_scaling`) or the new (`rope_parameters`). Leaves: typed numbers within bounds, or an error that
//! names field, finding and remedy. Never here: tensors.

use std::io::ErrorKind;
use std::path::Path;

use plimsoll_contract::facts::Family;
use plimsoll_kernels::reference::rope::Scaling;
use serde_json::{Map, Value};

use super::error::LoadError;
use super::families::{Description, FAMILIES, Presence, WindowRule};
use super::files;
use crate::batch::TokenId;

const FILE: &str = "config.json";
/// A config is a few KiB; anything larger is not one.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Upper bounds of every size, so that no product of them overflows or asks for absurd memory by itself.
const DIMENSION_MAX: u64 = 1 << 20;
const LAYERS_MAX: u64 = 1 << 10;
const CONTEXT_MAX: u64 = 1 << 27;
/// No model of these families has larger heads.
const HEAD_DIM_MAX: u64 = 256;

#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub family: Family,
    pub architecture: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    /// Divides `heads`.
    pub kv_heads: usize,
    /// Even, at most [`HEAD_DIM_MAX`].
    pub head_dim: usize,
    pub vocabulary: usize,
    /// Positions the model was trained for, RoPE scaling included.
    pub context_tokens: usize,
    pub norm_eps: f32,
    pub rope: Rope,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
    pub tied_head: bool,
    /// Per layer: positions a query sees, its own included; absent: all before it.
    pub windows: Vec<Option<usize>>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Scaling,
}

impl Config {
    pub fn read(dir: &Path) -> Result<Config, LoadError> {
        Config::parse(&read_json(dir, FILE)?)
    }

    /// Of a file under any name, without the folder that it came from; and the method by which its weights are quantized, if
    /// they are, which [`Config::read`] refuses.
    pub fn read_alone(path: &Path) -> Result<(Config, Option<String>), LoadError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut json = read_json(path.parent().unwrap_or(Path::new("")), &name)?;
        let quantized = json.as_object_mut().and_then(|o| o.shift_remove("quantization_config"));
        let method = quantized.filter(|config| !config.is_null()).map(|config| {
            config["quant_method"].as_str().unwrap_or("unnamed").chars().take(64).collect()
        });
        Ok((Config::parse(&json)?, method))
    }

    pub fn parse(json: &Value) -> Result<Config, LoadError> {
        let fields = Fields::of(json)?;
        let family = family(&fields)?;
        refuse_what_is_not_run(&fields)?;
        let hidden = fields.size("hidden_size", DIMENSION_MAX)?;
        let layers = fields.size("num_hidden_layers", LAYERS_MAX)?;
        let heads = fields.size("num_attention_heads", DIMENSION_MAX)?;
        let positions = fields.size("max_position_embeddings", CONTEXT_MAX)?;
        let rope = rope(&fields, positions)?;
        Ok(Config {
            family: family.family,
            architecture: family.architecture,
            hidden,
            intermediate: fields.size("intermediate_size", DIMENSION_MAX)?,
            layers,
            heads,
            kv_heads: kv_heads(&fields, family, heads)?,
            head_dim: head_dim(&fields, family, hidden, heads)?,
            vocabulary: fields.size("vocab_size", DIMENSION_MAX * 16)?,
            context_tokens: context_tokens(&rope, positions),
            norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope,
            qkv_bias: present(&fields, family.qkv_bias)?,
            output_bias: present(&fields, family.output_bias)?,
            mlp_bias: present(&fields, family.mlp_bias)?,
            qk_norm: family.qk_norm,
            tied_head: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            windows: windows(&fields, family, layers)?,
        })
    }
}

/// `eos_token_id` of generation_config.json, or else of config.json: a number, a list, or nothing.
pub fn eos_token_ids(dir: &Path) -> Result<Vec<TokenId>, LoadError> {
    for file in ["generation_config.json", FILE] {
        if !dir.join(file).exists() {
            continue;
        }
        let json = read_json(dir, file)?;
        let ids = match json.get("eos_token_id") {
            None | Some(Value::Null) => continue,
            Some(Value::Array(ids)) => ids.clone(),
            Some(one) => vec![one.clone()],
        };
        let parsed = ids.iter().map(|id| id.as_u64().and_then(|id| TokenId::try_from(id).ok()));
        return parsed.collect::<Option<Vec<_>>>().ok_or_else(|| LoadError::CorruptWeights {
            file: dir.join(file),
            tensor: None,
            expected: "eos_token_id to be a token id or a list of them".into(),
            found: Value::Array(ids).to_string(),
        });
    }
    Ok(Vec::new())
}

fn read_json(dir: &Path, file: &str) -> Result<Value, LoadError> {
    let path = dir.join(file);
    let not_found = |problem: String| LoadError::ModelNotFound {
        source_name: dir.display().to_string(),
        problem,
        remedy: "give a directory with config.json and *.safetensors".into(),
    };
    let corrupt = |expected: &str, found: String| LoadError::CorruptWeights {
        file: path.clone(),
        tensor: None,
        expected: expected.into(),
        found,
    };
    let text = files::read(&path, FILE_BYTES_MAX).map_err(|e| match e.kind() {
        ErrorKind::InvalidInput => corrupt("a regular file", e.to_string()),
        ErrorKind::FileTooLarge => corrupt("at most 4 MiB of JSON", format!("a file {e}")),
        _ => not_found(format!("{file}: {e}")),
    })?;
    serde_json::from_slice(&text).map_err(|e| corrupt("valid JSON", e.to_string()))
}

fn family(fields: &Fields) -> Result<&'static Description, LoadError> {
    let architectures = fields.0.get("architectures").and_then(Value::as_array);
    let named = architectures.and_then(|list| list.first()).and_then(Value::as_str);
    let known = FAMILIES.iter().map(|family| family.architecture).collect::<Vec<_>>().join(", ");
    FAMILIES.iter().find(|family| Some(family.architecture) == named).ok_or_else(|| {
        unsupported(
            "architectures",
            named.unwrap_or("absent"),
            format!("the engine runs {known}"),
            "choose a checkpoint of one of these",
        )
    })
}

/// Features that would change the arithmetic and that no family here has.
fn refuse_what_is_not_run(fields: &Fields) -> Result<(), LoadError> {
    if let Some(quantization) = fields.given("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
        return Err(unsupported(
            "quantization_config",
            method,
            "the engine reads plain bf16, f16 and f32 weights",
            "choose the unquantized checkpoint",
        ));
    }
    let activation = fields.given("hidden_act").and_then(Value::as_str).unwrap_or("silu");
    if activation != "silu" {
        return Err(unsupported(
            "hidden_act",
            activation,
            "the engine runs silu",
            "choose another model",
        ));
    }
    if fields.positive("partial_rotary_factor")?.is_some_and(|share| share != 1.0) {
        let found = fields.0["partial_rotary_factor"].to_string();
        return Err(unsupported(
            "partial_rotary_factor",
            &found,
            "the engine rotates whole heads",
            "choose another model",
        ));
    }
    Ok(())
}

fn kv_heads(fields: &Fields, family: &Description, heads: usize) -> Result<usize, LoadError> {
    let kv_heads = match fields.given("num_key_value_heads") {
        // The first Llama checkpoints predate grouped queries; the others always say.
        None if family.family == Family::Llama => heads,
        _ => fields.size("num_key_value_heads", DIMENSION_MAX)?,
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(malformed(
            "num_key_value_heads",
            kv_heads.to_string(),
            format!("a divisor of num_attention_heads, which is {heads}"),
        ));
    }
    Ok(kv_heads)
}

fn head_dim(
    fields: &Fields,
    family: &Description,
    hidden: usize,
    heads: usize,
) -> Result<usize, LoadError> {
    let head_dim = match (fields.given("head_dim"), family.head_dim) {
        (Some(_), _) => fields.size("head_dim", HEAD_DIM_MAX)?,
        (None, Some(default)) => default,
        (None, None) if hidden.is_multiple_of(heads) => hidden / heads,
        (None, None) => {
            return Err(malformed(
                "hidden_size",
                hidden.to_string(),
                format!("a multiple of num_attention_heads, which is {heads}, or head_dim"),
            ));
        }
    };
    if !head_dim.is_multiple_of(2) || head_dim as u64 > HEAD_DIM_MAX {
        return Err(malformed(
            "head_dim",
            head_dim.to_string(),
            format!("an even number of at most {HEAD_DIM_MAX}"),
        ));
    }
    Ok(head_dim)
}

fn present(fields: &Fields, presence: Presence) -> Result<bool, LoadError> {
    match presence {
        Presence::Never => Ok(false),
        Presence::Always => Ok(true),
        Presence::Field(name) => Ok(fields.flag(name)?.unwrap_or(false)),
    }
}

fn windows(
    fields: &Fields,
    family: &Description,
    layers: usize,
) -> Result<Vec<Option<usize>>, LoadError> {
    let stated = match fields.given("sliding_window") {
        Some(_) => Some(fields.size("sliding_window", CONTEXT_MAX)?),
        None => None,
    };
    match family.window {
        WindowRule::Never => Ok(vec![None; layers]),
        WindowRule::EveryLayer { absent } if !fields.0.contains_key("sliding_window") => {
            Ok(vec![Some(absent); layers])
        }
        WindowRule::EveryLayer { .. } => Ok(vec![stated; layers]),
        WindowRule::ByLayer => {
            let used = fields.flag("use_sliding_window")?.unwrap_or(false);
            windows_by_layer(fields, stated.filter(|_| used), layers)
        }
    }
}

fn windows_by_layer(
    fields: &Fields,
    window: Option<usize>,
    layers: usize,
) -> Result<Vec<Option<usize>>, LoadError> {
    let Some(types) = fields.given("layer_types") else {
        let Some(window) = window else { return Ok(vec![None; layers]) };
        let first = match fields.given("max_window_layers") {
            Some(_) => fields.size_or_zero("max_window_layers", LAYERS_MAX)?,
            None => 28,
        };
        return Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect());
    };
    let types = types.as_array().filter(|types| types.len() == layers).ok_or_else(|| {
        malformed("layer_types", types.to_string(), format!("a list of {layers} names"))
    })?;
    let window_of = |kind: &Value| match (kind.as_str(), window) {
        (Some("full_attention"), _) => Ok(None),
        (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
        (Some("sliding_attention"), None) => Err(malformed(
            "layer_types",
            kind.to_string(),
            "no windowed layer, since use_sliding_window is off or sliding_window is null".into(),
        )),
        _ => Err(unsupported(
            "layer_types",
            &kind.to_string(),
            "the engine runs full_attention and sliding_attention",
            "choose another model",
        )),
    };
    types.iter().map(window_of).collect()
}

/// The new form nests theta beside the scaling; the old one has `rope_theta` and `rope_scaling` (whose kind is called
/// `rope_type`, or `type` in the oldest).
fn rope(fields: &Fields, positions: usize) -> Result<Rope, LoadError> {
    let (field, value) = match fields.given("rope_parameters") {
        Some(value) => ("rope_parameters", Some(value)),
        None => ("rope_scaling", fields.given("rope_scaling")),
    };
    let empty = Map::new();
    let nested = match value {
        None => Fields(&empty, ""),
        Some(value) => Fields(
            value
                .as_object()
                .ok_or_else(|| malformed(field, value.to_string(), "an object".into()))?,
            if field == "rope_scaling" { "rope_scaling." } else { "rope_parameters." },
        ),
    };
    let theta = match nested.positive("rope_theta")? {
        Some(theta) => theta,
        None => fields.positive("rope_theta")?.unwrap_or(10_000.0),
    };
    if theta <= 1.0 {
        return Err(malformed("rope_theta", theta.to_string(), "a number above 1".into()));
    }
    Ok(Rope { theta, scaling: scaling(&nested, positions)? })
}

fn scaling(nested: &Fields, positions: usize) -> Result<Scaling, LoadError> {
    let kind = nested.given("rope_type").or_else(|| nested.given("type"));
    let original = |name| match nested.given(name) {
        Some(_) => nested.size(name, CONTEXT_MAX),
        None => Ok(positions),
    };
    match kind.map(|kind| kind.as_str().unwrap_or("not a name")) {
        None | Some("default") => Ok(Scaling::Default),
        Some("linear") => Ok(Scaling::Linear { factor: nested.required("factor")? }),
        Some("llama3") => {
            let low = nested.required("low_freq_factor")?;
            let high = nested.required("high_freq_factor")?;
            if high <= low {
                let wanted = format!("a number above low_freq_factor, which is {low}");
                return Err(malformed("high_freq_factor", high.to_string(), wanted));
            }
            Ok(Scaling::Llama3 {
                factor: nested.required("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_positions: original("original_max_position_embeddings")?,
            })
        }
        Some("yarn") => {
            for field in ["mscale", "mscale_all_dim", "truncate"] {
                if let Some(found) = nested.given(field).filter(|v| **v != Value::Bool(true)) {
                    let runs = "the engine runs YaRN as its paper has it";
                    let found = found.to_string();
                    return Err(unsupported(field, &found, runs, "choose another model"));
                }
            }
            let original_positions = original("original_max_position_embeddings")?;
            let stretch = positions as f64 / original_positions as f64;
            Ok(Scaling::Yarn {
                factor: nested.positive("factor")?.unwrap_or(stretch),
                original_positions,
                beta_fast: nested.positive("beta_fast")?.unwrap_or(32.0),
                beta_slow: nested.positive("beta_slow")?.unwrap_or(1.0),
                attention_factor: nested.positive("attention_factor")?,
            })
        }
        Some(other) => Err(unsupported(
            "rope_type",
            other,
            "the engine runs default, linear, llama3 and yarn",
            "remove the scaling from config.json to serve the original context, or choose another model",
        )),
    }
}

/// YaRN configs state the context they were trained for before or after stretching; the product is right for both.
fn context_tokens(rope: &Rope, positions: usize) -> usize {
    match rope.scaling {
        Scaling::Yarn { factor, original_positions, .. } => {
            let stretched = (original_positions as f64 * factor).min(CONTEXT_MAX as f64);
            positions.max(stretched as usize)
        }
        _ => positions,
    }
}

/// A JSON object and the path that leads to it, for messages.
struct Fields<'a>(&'a Map<String, Value>, &'static str);

impl<'a> Fields<'a> {
    fn of(json: &'a Value) -> Result<Self, LoadError> {
        match json.as_object() {
            Some(object) => Ok(Fields(object, "")),
            None => Err(malformed("the file", "another JSON value".into(), "an object".into())),
        }
    }

    /// Null counts as absent, as in the library that wrote the file.
    fn given(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn size(&self, name: &str, max: u64) -> Result<usize, LoadError> {
        match self.size_or_zero(name, max)? {
            0 => Err(self.wrong(name, format!("a number from 1 to {max}"))),
            size => Ok(size),
        }
    }

    fn size_or_zero(&self, name: &str, max: u64) -> Result<usize, LoadError> {
        let size = self.given(name).and_then(Value::as_u64).filter(|&size| size <= max);
        size.map(|size| size as usize)
            .ok_or_else(|| self.wrong(name, format!("a number from 1 to {max}")))
    }

    fn positive(&self, name: &str) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.given(name) else { return Ok(None) };
        match value.as_f64().filter(|number| *number > 0.0 && *number < 1e15) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(name, "a positive number".into())),
        }
    }

    fn required(&self, name: &str) -> Result<f64, LoadError> {
        self.positive(name)?.ok_or_else(|| self.wrong(name, "a positive number".into()))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, LoadError> {
        match self.given(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(name, "true or false".into())),
        }
    }

    fn wrong(&self, name: &str, expected: String) -> LoadError {
        let found = self.0.get(name).map_or("nothing".into(), Value::to_string);
        malformed(&format!("{}{name}", self.1), found, expected)
    }
}

fn malformed(field: &str, found: String, expected: String) -> LoadError {
    // A hostile file may hold a long value; the message travels in 4,096 bytes.
    let found = found.chars().take(200).collect::<String>();
    LoadError::CorruptWeights {
        file: FILE.into(),
        tensor: None,
        expected: format!("{field} to be {expected}"),
        found,
    }
}

fn unsupported(
    field: &str,
    found: &str,
    expected: impl Into<String>,
    remedy: impl Into<String>,
) -> LoadError {
    LoadError::UnsupportedModel {
        file: FILE.into(),
        field: field.into(),
        found: found.chars().take(200).collect(),
        expected: expected.into(),
        remedy: remedy.into(),
    }
}

#[cfg(test)]
mod tests;

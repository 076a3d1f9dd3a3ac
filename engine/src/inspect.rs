//! `inspect`: a checkpoint's facts as a table for people and as JSON for the operator. Enters: a directory or a
//! `file://` address. Leaves: text. Never here: reading weights, the network.

use std::path::PathBuf;

use plimsoll_contract::facts::{DeviceFacts, FACTS_JSON_BYTES_MAX, Gpu, ModelFacts};
use plimsoll_kernels::device::{Device, DeviceError};

use crate::model::{Checkpoint, Config, LoadError, Plan, facts_of};

/// Facts of `DIR` or `file:///DIR`; of a config.json alone what it tells, without weights, tokenizer and template.
pub fn facts(source: &str) -> Result<ModelFacts, LoadError> {
    let path = directory(source)?;
    if path.extension().is_some_and(|extension| extension == "json") && !path.is_dir() {
        let (config, quantization) = Config::read_alone(&path)?;
        return Ok(ModelFacts { quantization, ..facts_of(&config, &Plan::new(&config)) });
    }
    Ok(Checkpoint::open(&path)?.facts().clone())
}

fn directory(source: &str) -> Result<PathBuf, LoadError> {
    if let Some(path) = source.strip_prefix("file://") {
        return Ok(PathBuf::from(path));
    }
    if source.contains("://") {
        return Err(LoadError::ModelNotFound {
            source_name: source.into(),
            problem: "inspect reads directories and file:// addresses".into(),
            remedy: "fetch the model into a directory first".into(),
        });
    }
    Ok(PathBuf::from(source))
}

/// One line, at most [`FACTS_JSON_BYTES_MAX`] bytes.
pub fn json(facts: &ModelFacts) -> String {
    let json = serde_json::to_string(facts).expect("facts hold only names and numbers");
    assert!(json.len() <= FACTS_JSON_BYTES_MAX, "every text among the facts is bounded");
    json
}

/// Two columns.
pub fn table(facts: &ModelFacts) -> String {
    let rows = rows(facts);
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

/// What is known of the first GPU, or why none can be used.
pub fn device_facts() -> DeviceFacts {
    match Device::open(0).and_then(|device| gpu(&device)) {
        Ok(gpu) => DeviceFacts { gpu: Some(gpu), why_none: None },
        Err(error) => DeviceFacts { gpu: None, why_none: Some(error.to_string()) },
    }
}

/// What is known of a GPU that is open.
pub fn gpu(device: &Device) -> Result<Gpu, DeviceError> {
    let (free, total) = device.memory()?;
    let (major, minor) = device.capability();
    Ok(Gpu {
        name: device.name()?,
        memory_bytes: total as u64,
        memory_free_bytes: free as u64,
        compute_capability: format!("{major}.{minor}"),
        multiprocessors: device.processors(),
        driver: driver_version(),
    })
}

/// As the kernel module tells it; no management library is needed.
fn driver_version() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let line = text.lines().next()?;
    line.split_whitespace()
        .find(|word| word.split('.').count() >= 2 && word.starts_with(|c: char| c.is_ascii_digit()))
        .map(str::to_owned)
}

pub fn device_json(facts: &DeviceFacts) -> String {
    serde_json::to_string(facts).expect("facts hold only names and numbers")
}

pub fn device_table(facts: &DeviceFacts) -> String {
    match (&facts.gpu, &facts.why_none) {
        (Some(gpu), _) => {
            let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
            format!(
                "GPU                 {}\nmemory              {:.1} GiB, {:.1} free\ncompute capability  {}\nmultiprocessors     {}\ndriver              {}\n",
                gpu.name,
                gib(gpu.memory_bytes),
                gib(gpu.memory_free_bytes),
                gpu.compute_capability,
                gpu.multiprocessors,
                gpu.driver.as_deref().unwrap_or("unknown"),
            )
        }
        (None, why) => format!("no GPU can be used: {}\n", why.as_deref().unwrap_or("unknown")),
    }
}

fn rows(facts: &ModelFacts) -> Vec<(&'static str, String)> {
    let parameters = facts.parameters;
    let disk =
        facts.disk_bytes.iter().map(|(dtype, bytes)| format!("{} {dtype}", megabytes(*bytes)));
    let mut rows = vec![
        ("family", format!("{} ({})", facts.family.name(), facts.architecture)),
        (
            "parameters",
            format!(
                "{} (embedding {}, attention {}, mlp {}, norm {}, head {})",
                grouped(parameters.total()),
                grouped(parameters.embedding),
                grouped(parameters.attention),
                grouped(parameters.mlp),
                grouped(parameters.norm),
                if facts.tied_head { "tied".into() } else { grouped(parameters.head) },
            ),
        ),
        ("on disk", disk.collect::<Vec<_>>().join(", ")),
        ("layers", facts.layers.to_string()),
        ("hidden, intermediate", format!("{}, {}", facts.hidden, facts.intermediate)),
        ("heads, KV heads", format!("{}, {} of {}", facts.heads, facts.kv_heads, facts.head_dim)),
        ("vocabulary", grouped(facts.vocabulary.into())),
        ("context", format!("{} tokens", grouped(facts.context_tokens.into()))),
    ];
    if let Some(window) = facts.sliding_window {
        rows.push(("window", format!("{} tokens on {} layers", window.tokens, window.layers)));
    }
    if facts.tokenizer_bytes > 0 {
        rows.push(("tokenizer", megabytes(facts.tokenizer_bytes)));
    }
    rows.push(("chat template", if facts.chat_template { "yes" } else { "no" }.into()));
    if let Some(revision) = &facts.revision {
        rows.push(("revision", revision.clone()));
    }
    rows
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Thousands apart.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(case: &str) -> String {
        format!("{}/../tests/goldens/{case}", env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn facts_survive_their_json_and_stay_small() {
        let facts = facts(&golden("qwen2-window")).unwrap();
        let text = json(&facts);
        assert_eq!(serde_json::from_str::<ModelFacts>(&text).unwrap(), facts);
        assert!(text.len() < 1024, "{} bytes", text.len());
    }

    #[test]
    fn a_config_alone_tells_all_that_is_not_of_files() {
        for case in ["llama2-mha", "mistral-window", "qwen2-bias", "qwen2-window", "qwen3-qknorm"] {
            let whole = facts(&golden(case)).unwrap();
            let alone = facts(&format!("{}/config.json", golden(case))).unwrap();
            let of_files = ModelFacts {
                disk_bytes: whole.disk_bytes.clone(),
                revision: whole.revision.clone(),
                chat_template: whole.chat_template,
                tokenizer_bytes: whole.tokenizer_bytes,
                ..alone
            };
            assert_eq!(of_files, whole, "{case}");
        }
        let error = facts(&format!("{}/config-of-none.json", golden("qwen2-bias"))).unwrap_err();
        assert!(error.to_string().contains("config-of-none.json"), "{error}");
    }

    #[test]
    fn a_config_alone_of_quantized_weights_names_the_method() {
        let text =
            std::fs::read_to_string(format!("{}/config.json", golden("qwen2-bias"))).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["quantization_config"] = serde_json::json!({"quant_method": "awq", "bits": 4});
        let name = format!("plimsoll-config-{}.json", std::process::id());
        let file = std::env::temp_dir().join(name);
        std::fs::write(&file, config.to_string()).unwrap();
        let found = facts(file.to_str().unwrap()).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_eq!(found.quantization.as_deref(), Some("awq"));
    }

    #[test]
    fn the_table_tells_what_a_person_asks_first() {
        let facts = facts(&format!("file://{}", golden("qwen2-window"))).unwrap();
        let table = table(&facts);
        for part in ["qwen2 (Qwen2ForCausalLM)", "70 tokens on 2 layers", "MB BF16", "1,024 tokens"]
        {
            assert!(table.contains(part), "{table}");
        }
    }

    #[test]
    fn a_machine_without_a_driver_says_so() {
        let facts = device_facts();
        assert_ne!(facts.gpu.is_some(), facts.why_none.is_some());
        let table = device_table(&facts);
        assert!(table.contains("GPU"), "{table}");
        let back: DeviceFacts = serde_json::from_str(&device_json(&facts)).unwrap();
        assert_eq!(back, facts);
    }

    #[test]
    fn other_addresses_are_refused_with_the_way_to_go() {
        let error = facts("hf://someone/model").unwrap_err().to_string();
        assert!(error.contains("fetch"), "{error}");
    }
}

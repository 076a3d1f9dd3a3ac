//! `inspect`: a checkpoint's facts as a table for people and as JSON for the operator. Enters: a directory or a
//! `file://` address. Leaves: text. Never here: reading weights, the network.

use std::path::PathBuf;

use plimsoll_contract::facts::{FACTS_JSON_BYTES_MAX, ModelFacts};

use crate::model::{Checkpoint, LoadError};

/// Facts of `DIR` or `file:///DIR`.
pub fn facts(source: &str) -> Result<ModelFacts, LoadError> {
    Ok(Checkpoint::open(&directory(source)?)?.facts().clone())
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
    fn the_table_tells_what_a_person_asks_first() {
        let facts = facts(&format!("file://{}", golden("qwen2-window"))).unwrap();
        let table = table(&facts);
        for part in ["qwen2 (Qwen2ForCausalLM)", "70 tokens on 2 layers", "MB BF16", "1,024 tokens"]
        {
            assert!(table.contains(part), "{table}");
        }
    }

    #[test]
    fn other_addresses_are_refused_with_the_way_to_go() {
        let error = facts("hf://someone/model").unwrap_err().to_string();
        assert!(error.contains("fetch"), "{error}");
    }
}

//! A manifest on disk enters; the object it declares leaves, or every problem of its shape at once. What the API server
//! does with the schema (unknown fields, types, required fields, enums) is done here with the same schema, because
//! `plimsoll up` has no API server. Values are the business of `spec`.

use std::path::Path;

use anyhow::{Context, bail};
use plimsoll_crds::{LLMDeployment, generated};
use serde::Deserialize;
use serde_json::Value;

/// A manifest larger than this is no manifest.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// The one `LLMDeployment` in the file. A relative file:// source is taken from the manifest's folder.
pub fn read(path: &Path) -> anyhow::Result<LLMDeployment> {
    let shown = path.display();
    let size = std::fs::metadata(path).with_context(|| format!("cannot read {shown}"))?.len();
    if size > MANIFEST_BYTES_MAX {
        bail!("{shown} has {size} bytes; a manifest has at most {MANIFEST_BYTES_MAX}");
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    let mut object = parse(&text).with_context(|| format!("{shown} cannot be used"))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    object.spec.model.source = resolve(&object.spec.model.source, folder)?;
    Ok(object)
}

/// The same of a text, its source as it stands.
pub fn parse(text: &str) -> anyhow::Result<LLMDeployment> {
    let mut found = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let document = Value::deserialize(document).context("it is not valid YAML")?;
        if document["kind"] == "LLMDeployment" {
            found.push(document);
        }
    }
    if found.len() > 1 {
        bail!("it holds {} objects of kind LLMDeployment; one is served at a time", found.len());
    }
    let Some(object) = found.pop() else { bail!("it holds no object of kind LLMDeployment") };
    if object["apiVersion"] != "plimsoll.dev/v1alpha1" {
        bail!("apiVersion must be plimsoll.dev/v1alpha1, and is {}", object["apiVersion"]);
    }
    let schema = serde_json::to_value(generated::crd()).expect("a CRD is plain data");
    let schema = &schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut problems = Vec::new();
    check(&object["spec"], schema, "spec", &mut problems);
    if !problems.is_empty() {
        bail!("{}", problems.join("; "));
    }
    Ok(serde_json::from_value(object)?)
}

/// Walks value and schema together.
fn check(value: &Value, schema: &Value, path: &str, problems: &mut Vec<String>) {
    let null_is_fine = schema["nullable"] == true;
    if value.is_null() {
        if !null_is_fine {
            problems.push(format!("{path} is required"));
        }
        return;
    }
    if let Some(wrong) = wrong_type(value, schema) {
        problems.push(format!("{path} must be {wrong}, and is {value}"));
        return;
    }
    if let Some(words) = schema["enum"].as_array().filter(|words| !words.contains(value)) {
        let words: Vec<_> = words.iter().filter_map(Value::as_str).collect();
        problems.push(format!("{path} must be one of {}, and is {value}", words.join(", ")));
    }
    let (Some(fields), Some(known)) = (value.as_object(), schema["properties"].as_object()) else {
        return;
    };
    for (name, field) in fields {
        match known.get(name) {
            Some(schema) => check(field, schema, &format!("{path}.{name}"), problems),
            None => {
                let names: Vec<_> = known.keys().map(String::as_str).collect();
                problems.push(format!("{path}.{name} is unknown; there are {}", names.join(", ")));
            }
        }
    }
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    for name in required.filter(|name| !fields.contains_key(*name)) {
        problems.push(format!("{path}.{name} is required"));
    }
}

fn wrong_type(value: &Value, schema: &Value) -> Option<&'static str> {
    let (right, name) = match schema["type"].as_str() {
        Some("object") => (value.is_object(), "an object"),
        Some("string") => (value.is_string(), "a string"),
        Some("integer") => (value.is_i64(), "an integer"),
        Some("boolean") => (value.is_boolean(), "true or false"),
        Some("array") => (value.is_array(), "a list"),
        _ => (value.is_i64() || value.is_string(), "an integer or a string"),
    };
    (!right).then_some(name)
}

/// `file://../model` beside a manifest in /repo/examples is file:///repo/model.
fn resolve(source: &str, folder: &Path) -> anyhow::Result<String> {
    let Some(path) = source.strip_prefix("file://").filter(|path| !path.starts_with('/')) else {
        return Ok(source.to_owned());
    };
    let relative = folder.join(path);
    let absolute = relative
        .canonicalize()
        .with_context(|| format!("spec.model.source: no folder {}", relative.display()))?;
    Ok(format!("file://{}", absolute.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(spec: &str) -> String {
        format!(
            "apiVersion: plimsoll.dev/v1alpha1\nkind: LLMDeployment\nmetadata: {{name: a}}\nspec: {spec}\n"
        )
    }

    #[test]
    fn the_five_line_manifest_is_read() {
        let object = parse(&manifest("{model: {source: 'hf://a/b'}}")).unwrap();
        assert_eq!(object.spec.model.source, "hf://a/b");
        assert_eq!(object.spec.replicas, 1);
    }

    #[test]
    fn other_documents_are_passed_over_and_a_second_model_is_not() {
        let one = manifest("{model: {source: 'hf://a/b'}}");
        assert!(parse(&format!("kind: Secret\n---\n{one}")).is_ok());
        assert!(parse(&format!("{one}---\n{one}")).is_err());
        assert!(parse("kind: Secret").is_err());
    }

    #[test]
    fn problems_of_shape_are_told_by_path_all_at_once() {
        let error = parse(&manifest(
            "{model: {sorce: x}, replicas: two, cache: {dtype: F64}, resources: {memory: [1]}}",
        ))
        .unwrap_err()
        .to_string();
        for words in [
            "spec.model.sorce is unknown; there are",
            "spec.model.source is required",
            "spec.replicas must be an integer, and is \"two\"",
            "spec.cache.dtype must be one of Auto, F32, F16, BF16, INT8, FP8, INT4, and is \"F64\"",
            "spec.resources.memory must be an integer or a string",
        ] {
            assert!(error.contains(words), "{words} in {error}");
        }
    }

    #[test]
    fn a_relative_source_is_taken_from_the_folder_of_the_manifest() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let resolved = resolve("file://../src", &folder).unwrap();
        assert!(
            resolved.starts_with("file:///") && resolved.ends_with("/operator/src"),
            "{resolved}"
        );
        assert_eq!(resolve("file:///m", &folder).unwrap(), "file:///m");
        assert!(resolve("file://nowhere", &folder).is_err());
    }
}

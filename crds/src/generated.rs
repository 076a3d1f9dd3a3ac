//! Files that are written from these types and committed: the CRD beside this crate, its copy in the chart, dashboards,
//! rules, and pages. `cargo run --release -p plimsoll-crds --example generate` writes them; a test compares them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Value, json};

use crate::{LLMDeployment, Reason, alerts, dashboards, pages};

/// What installs, at most, without hitting limits of clients that keep it in an annotation.
pub const CRD_BYTES_MAX: usize = 64 * 1024;

/// Path from the root of the repository, and contents.
pub struct GeneratedFile {
    pub path: String,
    pub contents: String,
}

pub fn files() -> Vec<GeneratedFile> {
    let file = |path: &str, contents: String| GeneratedFile { path: path.to_owned(), contents };
    let crd = crd_yaml();
    let rules = json!({"groups": alerts::groups("plimsoll.operator", &alerts::of_operator())});
    let mut files = vec![
        file("charts/plimsoll/files/llmdeployments.plimsoll.dev.yaml", crd.clone()),
        file("crds/llmdeployments.plimsoll.dev.yaml", crd),
        file("charts/plimsoll/files/operator-rules.yaml", yaml(&rules)),
        file("docs/status.md", pages::status()),
        file("docs/alerts.md", pages::alerts()),
        file("docs/reference.md", pages::reference(&crd_value())),
    ];
    files.extend(dashboards::all().into_iter().map(|dashboard| {
        let body = serde_json::to_string_pretty(&dashboard.body).expect("plain data");
        file(&format!("charts/plimsoll/files/dashboards/{}", dashboard.file), body + "\n")
    }));
    files
}

fn yaml(value: &Value) -> String {
    serde_yaml_ng::to_string(value).expect("plain data")
}

fn crd_value() -> Value {
    serde_json::to_value(crd()).expect("a CRD is plain data")
}

/// The CRD as `plimsoll crd` prints it.
pub fn crd_yaml() -> String {
    serde_yaml_ng::to_string(&crd()).expect("a CRD is plain data")
}

/// What derive says, in words that `kubectl` shows well.
pub fn crd() -> CustomResourceDefinition {
    let mut crd = serde_json::to_value(LLMDeployment::crd()).expect("a CRD is plain data");
    let schema = &mut crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    polish(schema);
    schema["properties"]["status"]["default"] = unseen();
    serde_json::from_value(crd).expect("only words and a default were changed")
}

/// The status of an object that no operator has looked at. Tools that judge by conditions take an object without any for
/// done.
fn unseen() -> Value {
    let reason = Reason::Pending;
    json!({"replicas": 0, "readyReplicas": 0, "conditions": [{
        "type": "Ready", "status": "Unknown", "reason": reason.name(), "message": reason.meaning(),
        "lastTransitionTime": "1970-01-01T00:00:00Z",
    }]})
}

/// Descriptions lose the line breaks of source code, which `kubectl explain` would keep; enums lose the null that
/// derive adds to optional ones, which refusals would list as a word.
fn polish(schema: &mut Value) {
    if let Some(Value::String(description)) = schema.get_mut("description") {
        *description = description.replace('\n', " ");
    }
    if let Some(Value::Array(words)) = schema.get_mut("enum") {
        words.retain(|word| !word.is_null());
    }
    if let Some(Value::Object(fields)) = schema.get_mut("properties") {
        fields.values_mut().for_each(polish);
    }
    if let Some(items) = schema.get_mut("items") {
        polish(items);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn committed_files_are_what_the_types_say() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for GeneratedFile { path, contents } in files() {
            let committed = std::fs::read_to_string(root.join(&path)).unwrap_or_default();
            assert!(
                committed == contents,
                "{path} is stale: cargo run --release -p plimsoll-crds --example generate"
            );
        }
    }

    #[test]
    fn kserve_3487_the_crd_stays_small_enough_for_every_client() {
        assert!(crd_yaml().len() < CRD_BYTES_MAX);
    }

    #[test]
    fn every_string_and_list_is_bounded_and_every_field_explained() {
        let crd: serde_json::Value = serde_yaml_ng::from_str(&crd_yaml()).unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let mut problems = Vec::new();
        for part in ["spec", "status"] {
            walk(&schema["properties"][part], part, &mut problems);
        }
        assert!(problems.is_empty(), "{problems:#?}");
    }

    fn walk(schema: &serde_json::Value, path: &str, problems: &mut Vec<String>) {
        if schema["description"].as_str().is_none_or(str::is_empty) && !path.ends_with("[]") {
            problems.push(format!("{path} has no description"));
        }
        let bounded = match schema["type"].as_str() {
            Some("string") => {
                !schema["maxLength"].is_null()
                    || !schema["enum"].is_null()
                    || schema["format"] == "date-time"
            }
            Some("array") => !schema["maxItems"].is_null(),
            _ => true,
        };
        if !bounded {
            problems.push(format!("{path} has no bound"));
        }
        if let Some(fields) = schema["properties"].as_object() {
            for (name, field) in fields {
                walk(field, &format!("{path}.{name}"), problems);
            }
        }
        if schema["items"].is_object() {
            walk(&schema["items"], &format!("{path}[]"), problems);
        }
    }
}

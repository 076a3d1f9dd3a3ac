//! Files that are written from these types and committed: the CRD beside this crate, its copy in the chart, and the
//! page of reasons. `cargo run --release -p plimsoll-crds --example generate` writes them; a test compares them.

use std::fmt::Write;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::Value;

use crate::{ConditionType, LLMDeployment, Reason};

/// What installs, at most, without hitting limits of clients that keep it in an annotation.
pub const CRD_BYTES_MAX: usize = 64 * 1024;

/// Path from the root of the repository, and contents.
pub struct GeneratedFile {
    pub path: &'static str,
    pub contents: String,
}

pub fn files() -> [GeneratedFile; 3] {
    let crd = crd_yaml();
    [
        GeneratedFile { path: "crds/llmdeployments.plimsoll.dev.yaml", contents: crd.clone() },
        GeneratedFile {
            path: "charts/plimsoll/files/llmdeployments.plimsoll.dev.yaml",
            contents: crd,
        },
        GeneratedFile { path: "docs/status.md", contents: status_page() },
    ]
}

/// The CRD as `plimsoll crd` prints it.
pub fn crd_yaml() -> String {
    serde_yaml_ng::to_string(&crd()).expect("a CRD is plain data")
}

/// What derive says, in words that `kubectl` shows well.
pub fn crd() -> CustomResourceDefinition {
    let mut crd = serde_json::to_value(LLMDeployment::crd()).expect("a CRD is plain data");
    polish(&mut crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]);
    serde_json::from_value(crd).expect("only words were changed")
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

fn status_page() -> String {
    let mut page = String::from(STATUS_HEAD);
    page.push_str("| condition | while it is True |\n|---|---|\n");
    for condition in ConditionType::ALL {
        writeln!(page, "| {} | {} |", condition.name(), condition.meaning()).expect("a String");
    }
    page.push_str(REASONS_HEAD);
    for reason in Reason::ALL {
        let stalled = if reason.needs_a_person() { "yes" } else { "" };
        let (name, meaning, remedy) = (reason.name(), reason.meaning(), reason.remedy());
        writeln!(page, "| {name} | {meaning} | {remedy} | {stalled} |").expect("a String");
    }
    page.push_str(STATUS_TAIL);
    page
}

const STATUS_HEAD: &str = "\
<!-- Generated from crds/src/reasons.rs by `cargo run --release -p plimsoll-crds --example generate`. -->
# Status: every condition and every reason

`kubectl get llmd` shows the status and reason of `Ready`; `kubectl describe llmd NAME` shows all conditions with their
sentences. Each condition carries the `observedGeneration` that it speaks of.

```
kubectl wait --for=condition=Ready llmd/NAME --timeout=10m
kubectl get llmd NAME -o jsonpath='{.status.plan.why}'
```

";

const REASONS_HEAD: &str = "
## Reasons

Where the last column says yes, `Stalled` is True with the same reason: waiting cannot help.

| reason | what happened | what to do | stalls |
|---|---|---|---|
";

const STATUS_TAIL: &str = "
The engine's own reasons (DoesNotFit to Internal) come from its termination message, so that nobody needs its log.
Outside a cluster the same words appear on standard error, and each has an exit code of its own:
10 DoesNotFit, 11 OutOfDeviceMemory, 12 ModelNotFound, 13 ModelUnauthorized, 14 UnsupportedModel, 15 CorruptWeights,
16 DeviceLost, 17 ApiKeysUnusable, 70 Internal.
";

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn committed_files_are_what_the_types_say() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for GeneratedFile { path, contents } in files() {
            let committed = std::fs::read_to_string(root.join(path)).unwrap_or_default();
            assert!(
                committed == contents,
                "{path} is stale: cargo run --release -p plimsoll-crds --example generate"
            );
        }
    }

    #[test]
    fn the_crd_stays_small_enough_for_every_client() {
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

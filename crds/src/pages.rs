//! In: reasons, alerts, the CRD's schema. Out: the pages of docs/ that are written from them, so that no word is shown
//! which a person cannot look up. Pure.

use std::fmt::Write;

use serde_json::Value;

use crate::alerts::{self, Alert, Watched};
use crate::{ConditionType, Reason};

pub fn status() -> String {
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

/// Alerts with what they ask and what to do.
pub fn alerts() -> String {
    let watched = Watched {
        namespace: "NAMESPACE",
        name: "NAME",
        ttft_seconds: Some(0.5),
        tpot_seconds: Some(0.04),
    };
    let mut page = String::from(ALERTS_HEAD);
    write_alerts(&mut page, &alerts::of_object(&watched));
    page.push_str(OPERATOR_ALERTS_HEAD);
    write_alerts(&mut page, &alerts::of_operator());
    page
}

fn write_alerts(page: &mut String, alerts: &[Alert]) {
    for alert in alerts {
        let Alert { name, severity, for_minutes, expression, summary, remedy, .. } = alert;
        let severity = severity.name();
        write!(
            page,
            "\n### {name}\n\n{summary}. Severity {severity}, after {for_minutes} min.\n\n\
             What to do: {remedy}\n\n```\n{expression}\n```\n"
        )
        .expect("a String");
    }
}

/// Every field of the object, from the schema that the API server checks.
pub fn reference(crd: &Value) -> String {
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
    let mut page = String::from(REFERENCE_HEAD);
    for (part, title) in
        [("spec", "Spec: what you write"), ("status", "Status: what Plimsoll says")]
    {
        let what = schema[part]["description"].as_str().unwrap_or_default();
        write!(page, "\n## {title}\n\n{what}\n\n| field | type | what |\n|---|---|---|\n")
            .expect("a String");
        write_fields(&mut page, &schema[part], part);
    }
    page.push_str(REFERENCE_RULES);
    write_rules(&mut page, &schema["spec"], "spec");
    page
}

/// A table row for each field, outer before inner.
fn write_fields(page: &mut String, schema: &Value, path: &str) {
    let required = schema["required"].as_array().cloned().unwrap_or_default();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let what = field["description"].as_str().unwrap_or_default().replace('|', "\\|");
        let needed = if required.iter().any(|wanted| wanted == name) { ", required" } else { "" };
        writeln!(page, "| `{path}` | {}{needed} | {what} |", kind(field)).expect("a String");
        write_fields(page, field, &path);
        write_fields(page, &field["items"], &format!("{path}[]"));
    }
}

/// Type and bounds, in short.
fn kind(field: &Value) -> String {
    if let Some(words) = field["enum"].as_array() {
        let words: Vec<&str> = words.iter().filter_map(Value::as_str).collect();
        return words.join(", ");
    }
    if field["x-kubernetes-int-or-string"] == true {
        return "quantity".to_owned();
    }
    let name = field["type"].as_str().unwrap_or("object");
    let bounds = match (number(&field["minimum"]), number(&field["maximum"])) {
        (Some(least), Some(most)) => format!(" {least} to {most}"),
        (Some(least), None) => format!(" from {least}"),
        _ => String::new(),
    };
    let default = match &field["default"] {
        Value::Number(number) => format!(", default {number}"),
        _ => String::new(),
    };
    format!("{name}{bounds}{default}")
}

/// Bounds are whole, however the schema writes them.
fn number(bound: &Value) -> Option<i64> {
    bound.as_i64().or_else(|| bound.as_f64().map(|bound| bound as i64))
}

/// What the schema's rules say when they refuse.
fn write_rules(page: &mut String, schema: &Value, path: &str) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        let field = rule["fieldPath"].as_str().unwrap_or_default();
        let words = rule["message"].as_str().unwrap_or_default();
        writeln!(page, "- `{path}{field}` {words}").expect("a String");
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        write_rules(page, field, &format!("{path}.{name}"));
    }
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

const ALERTS_HEAD: &str = "\
<!-- Generated from crds/src/alerts.rs by `cargo run --release -p plimsoll-crds --example generate`. -->
# Alerts

Where the cluster has the kind PrometheusRule, every LLMDeployment gets one with the alerts below; their labels `namespace` and
`llmdeployment` say of which object they speak. They ask for series that the object's PodMonitor brings, and for those of the
operator (chart value `metrics.serviceMonitor.enabled`).

## Of one LLMDeployment
";

const OPERATOR_ALERTS_HEAD: &str = "
## Of the operator

The chart carries them (`metrics.rules.enabled`).
";

const REFERENCE_HEAD: &str = "\
<!-- Generated from crds/src by `cargo run --release -p plimsoll-crds --example generate`. -->
# Reference: LLMDeployment

`apiVersion: plimsoll.dev/v1alpha1`, `kind: LLMDeployment`, short name `llmd`, namespaced. `kubectl explain llmd.spec` says the same.
`metadata.name` becomes the name of a Service: at most 53 lower-case letters, digits and `-`, starting with a letter.
";

const REFERENCE_RULES: &str = "
## What is refused

Beside types and bounds, the API server refuses these when the object is applied, with the field and the remedy:

";

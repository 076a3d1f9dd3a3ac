//! The Helm chart: clean under lint, refused values, and what a real API server says of what it renders, in a namespace
//! that enforces the restricted pod security level.

// Helpers of tests are tests: a panic is how they report.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::process::{Command, Stdio};

use plimsoll_tests::cluster::{Tools, shared_api_server, tools};
use plimsoll_tests::install::{NAMESPACE, root};
use serde::Deserialize;
use serde_json::Value;

/// Standard output, or all that helm complained about.
fn helm(tools: &Tools, args: &[&str]) -> Result<String, String> {
    let words = tools.addon("helm");
    let home = std::env::temp_dir().join(format!("plimsoll-helm-{}", std::process::id()));
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(args).env("HELM_CACHE_HOME", &home);
    command.env("HELM_CONFIG_HOME", &home).env("HELM_DATA_HOME", &home);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    Err(said + &String::from_utf8_lossy(&output.stderr))
}

fn template(tools: &Tools, settings: &[&str]) -> Result<String, String> {
    let chart = root().join("charts/plimsoll").display().to_string();
    let mut words = vec!["template", "plimsoll", &chart, "--namespace", NAMESPACE];
    for setting in settings {
        words.extend(["--set", setting]);
    }
    helm(tools, &words)
}

fn objects(rendered: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(rendered)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|object| !object.is_null())
        .collect()
}

fn named<'a>(objects: &'a [Value], kind: &str, name: &str) -> Option<&'a Value> {
    objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
}

#[test]
fn the_chart_is_clean_and_an_api_server_takes_what_it_renders() {
    let Some(server) = shared_api_server() else { return };
    let tools = Tools::find().unwrap();
    let chart = root().join("charts/plimsoll").display().to_string();
    helm(&tools, &["lint", "--strict", &chart]).unwrap();
    let namespace = format!(
        "{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}, labels: \
         {{pod-security.kubernetes.io/enforce: restricted, pod-security.kubernetes.io/warn: restricted}}}}}}"
    );
    server.kubectl().apply(&namespace).unwrap();
    let more =
        ["operator.replicas=2", "metrics.dashboards.enabled=true", "workloads.clients=Namespace"];
    let prometheus = [
        "prometheus.address=http://a",
        "prometheus.caConfigMap.name=a",
        "prometheus.tokenSecret.name=b",
    ];
    let namespaced = ["watchNamespace=default", "allowHostPath=true"];
    for settings in [&[][..], &namespaced, &more, &prometheus] {
        let rendered = template(&tools, settings).unwrap();
        let apply =
            ["apply", "--server-side", "--dry-run=server", "--warnings-as-errors", "-f", "-"];
        server.kubectl().run_with_input(&apply, &rendered).unwrap();
    }
}

#[test]
fn no_role_reads_secrets_and_a_namespaced_operator_has_no_cluster_wide_rights_but_nodes() {
    let Some(tools) = tools() else { return };
    let rendered = template(&tools, &["watchNamespace=team"]).unwrap();
    let objects = objects(&rendered);
    assert!(!rendered.contains("secrets]") && !rendered.contains("- secrets"), "{rendered}");
    assert!(named(&objects, "Role", "plimsoll-operator").is_some());
    assert!(named(&objects, "ClusterRole", "plimsoll-operator").is_none());
    for binding in objects.iter().filter(|object| object["kind"] == "ClusterRoleBinding") {
        let role = binding["roleRef"]["name"].as_str().unwrap();
        let rules = &named(&objects, "ClusterRole", role).unwrap()["rules"];
        assert_eq!(rules[0]["resources"], serde_json::json!(["nodes"]), "{role}");
        let definitions = &rules[1];
        assert_eq!(definitions["resources"], serde_json::json!(["customresourcedefinitions"]));
        assert!(definitions["resourceNames"].as_array().is_some_and(|names| names.len() == 2));
        assert_eq!(rules.as_array().unwrap().len(), 2, "{role}");
    }
}

/// The table in docs/security.md, which people read before they install, against the roles they get.
#[test]
fn the_rights_are_those_of_the_page_on_security() {
    let Some(tools) = tools() else { return };
    let page = include_str!("../../docs/security.md");
    let table = page.split("## What the operator may do").nth(1).unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| ")).skip(1);
    let words = |cell: &str| -> Vec<String> {
        cell.split(", ").map(|word| word.trim().to_owned()).collect()
    };
    let mut told: Vec<(Vec<String>, String)> = rows
        .flat_map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let on = cells[1].replace(", in its own namespace", "").replace(", by name", "");
            let plain = |resource: &String| {
                resource.trim_start_matches("two ").trim_start_matches("events.k8s.io/").to_owned()
            };
            let verbs = words(cells[0]);
            words(&on).iter().map(|one| (verbs.clone(), plain(one))).collect::<Vec<_>>()
        })
        .collect();
    let rendered = objects(&template(&tools, &["rbac.aggregate=false"]).unwrap());
    let roles = rendered.iter().filter(|object| object["kind"].as_str().unwrap().ends_with("Role"));
    let list = |value: &Value| -> Vec<String> { serde_json::from_value(value.clone()).unwrap() };
    let mut given: Vec<(Vec<String>, String)> = roles
        .flat_map(|role| role["rules"].as_array().unwrap())
        .flat_map(|rule| {
            list(&rule["resources"])
                .into_iter()
                .map(|one| (list(&rule["verbs"]), one))
                .collect::<Vec<_>>()
        })
        .collect();
    told.sort();
    given.sort();
    assert_eq!(told, given);
}

/// One that is not there any more, or under another name, makes objects that nobody can change or delete.
#[test]
fn kserve_5398_there_is_no_webhook_to_outlive_an_upgrade() {
    let Some(tools) = tools() else { return };
    let every = [
        "metrics.serviceMonitor.enabled=true",
        "metrics.rules.enabled=true",
        "metrics.dashboards.enabled=true",
    ];
    for object in objects(&template(&tools, &every).unwrap()) {
        let kind = object["kind"].as_str().unwrap();
        assert!(!kind.contains("Webhook"), "{kind}");
    }
}

#[test]
fn monitors_rules_and_dashboards_are_what_their_readers_take() {
    let Some(tools) = tools() else { return };
    let settings = [
        "metrics.serviceMonitor.enabled=true",
        "metrics.rules.enabled=true",
        "metrics.dashboards.enabled=true",
        "metrics.rules.labels.release=prometheus",
        "workloads.monitorLabels.release=prometheus",
    ];
    let objects = objects(&template(&tools, &settings).unwrap());
    let monitor = named(&objects, "ServiceMonitor", "plimsoll-operator").unwrap();
    let service = named(&objects, "Service", "plimsoll-metrics").unwrap();
    for (label, value) in monitor["spec"]["selector"]["matchLabels"].as_object().unwrap() {
        assert_eq!(&service["metadata"]["labels"][label], value);
    }
    let rules = named(&objects, "PrometheusRule", "plimsoll-operator").unwrap();
    assert_eq!(rules["metadata"]["labels"]["release"], "prometheus");
    assert!(rules["spec"]["groups"][0]["rules"].as_array().is_some_and(|rules| rules.len() >= 3));
    let boards =
        objects.iter().filter(|object| object["metadata"]["labels"]["grafana_dashboard"] == "1");
    let boards: Vec<Value> = boards
        .flat_map(|board| board["data"].as_object().unwrap().values())
        .map(|text| serde_json::from_str(text.as_str().unwrap()).unwrap())
        .collect();
    assert_eq!(boards.len(), 3);
    let operator = named(&objects, "Deployment", "plimsoll").unwrap();
    let arguments = &operator["spec"]["template"]["spec"]["containers"][0]["args"];
    let wanted = serde_json::json!("--monitor-label=release=prometheus");
    assert!(arguments.as_array().unwrap().contains(&wanted), "{arguments}");
    let mut judges = Command::new(&tools.judges);
    let mut judges =
        judges.arg("monitoring").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let text = format!("{monitor}\n{rules}");
    judges.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = judges.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_crd_outlives_the_chart_unless_told_otherwise() {
    let Some(tools) = tools() else { return };
    let crd = |settings: &[&str]| {
        let objects = objects(&template(&tools, settings).unwrap());
        named(&objects, "CustomResourceDefinition", "llmdeployments.plimsoll.dev").cloned()
    };
    let policy = |crd: &Value| crd["metadata"]["annotations"]["helm.sh/resource-policy"].clone();
    assert_eq!(policy(&crd(&[]).unwrap()), "keep");
    assert!(policy(&crd(&["crds.keep=false"]).unwrap()).is_null());
    assert_eq!(crd(&["crds.install=false"]), None);
}

#[test]
fn every_release_has_a_lease_of_its_own() {
    let Some(tools) = tools() else { return };
    let chart = root().join("charts/plimsoll").display().to_string();
    for release in ["plimsoll", "another"] {
        let rendered = helm(&tools, &["template", release, &chart, "--namespace", NAMESPACE]);
        let objects = objects(&rendered.unwrap());
        let deployment = named(&objects, "Deployment", release).unwrap();
        let arguments = &deployment["spec"]["template"]["spec"]["containers"][0]["args"];
        let wanted = serde_json::json!(format!("--lease-name={release}"));
        assert!(arguments.as_array().unwrap().contains(&wanted), "{arguments}");
    }
}

#[test]
fn prometheus_is_told_to_the_operator_with_authority_and_token_from_mounts() {
    let Some(tools) = tools() else { return };
    let pod = |settings: &[&str]| {
        let objects = objects(&template(&tools, settings).unwrap());
        named(&objects, "Deployment", "plimsoll").unwrap()["spec"]["template"]["spec"].clone()
    };
    let flags = |pod: &Value| pod["containers"][0]["args"].as_array().unwrap().clone();
    let about_prometheus = |flag: &Value| flag.as_str().unwrap().starts_with("--prometheus");
    assert!(!flags(&pod(&[])).iter().any(about_prometheus));
    let address = "prometheus.address=https://prometheus:9090/a";
    let told =
        pod(&[address, "prometheus.caConfigMap.name=ca", "prometheus.tokenSecret.name=reader"]);
    for flag in [
        "--prometheus-address=https://prometheus:9090/a",
        "--prometheus-ca-file=/etc/plimsoll/prometheus-ca/ca.crt",
        "--prometheus-token-file=/etc/plimsoll/prometheus-token/token",
    ] {
        assert!(flags(&told).contains(&flag.into()), "{flag}: {told:#}");
    }
    let mounted = told["containers"][0]["volumeMounts"].as_array().unwrap();
    assert_eq!((mounted.len(), told["volumes"].as_array().unwrap().len()), (2, 2));
    let own = pod(&[address, "prometheus.serviceAccountToken=true"]);
    let token = "--prometheus-token-file=/var/run/secrets/kubernetes.io/serviceaccount/token";
    assert!(flags(&own).contains(&token.into()) && own["volumes"].is_null(), "{own:#}");
}

#[test]
fn values_that_do_not_exist_are_refused() {
    let Some(tools) = tools() else { return };
    for setting in [
        "operator.replicas=9",
        "watchNamespaces=a",
        "engine.image.digest=latest",
        "prometheus.address=prometheus:9090",
        "workloads.clients=Everyone",
    ] {
        assert!(template(&tools, &[setting]).is_err(), "{setting}");
    }
}

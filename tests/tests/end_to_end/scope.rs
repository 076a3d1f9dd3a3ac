//! An operator of one namespace, under the chart's Role: it serves there, and elsewhere it neither reads nor writes.

use std::collections::BTreeSet;

use plimsoll_tests::cluster::{AuditEvent, Node, shared_node};
use plimsoll_tests::install;
use plimsoll_tests::stage::Stage;
use serde_json::{Value, json};

use crate::{ANSWER, ask, manifest, set_up};

const ACCOUNT: &str = "system:serviceaccount:plimsoll-system:plimsoll";

#[test]
fn an_operator_of_one_namespace_serves_there_and_reads_nothing_elsewhere() {
    let Some(node) = shared_node() else { return };
    let outside = Stage::new(&node, "elsewhere").unwrap();
    let stage = Stage::new(&node, "scoped").unwrap();
    set_up(&node, &["watchNamespace=scoped"]);
    outside.apply(&manifest("stranger", "pvc://models/plim", 1)).unwrap();
    stage.claim_with("models", "plim", &install::root().join("tests/model")).unwrap();
    stage.apply(&manifest("plim", "pvc://models/plim", 1)).unwrap();
    stage.wait_ready("plim").unwrap();
    assert!(ask(&stage, stage.service("plim").unwrap()).contains(ANSWER));

    let stranger = outside.get(&["llmd", "stranger"]).unwrap();
    // What the API server itself says of an object that no operator has looked at.
    assert_eq!(stranger["status"]["conditions"][0]["reason"], "Pending", "{stranger:#}");
    assert_eq!(stranger["status"].get("observedGeneration"), None, "{stranger:#}");
    let why = stage.get(&["llmd", "plim"]).unwrap()["status"]["plan"]["why"].to_string();
    assert!(why.contains("are not seen"), "pods of other namespaces: {why}");
    the_rights_end_at_the_namespace(&node);
    every_request_was_within_them(&node);
}

/// What plans look at, and whether there are monitors to make: things that lie in no namespace.
const CLUSTER: [&str; 2] = ["nodes", "customresourcedefinitions"];

/// What the API server itself says that the operator may do, beyond asking about itself.
fn the_rights_end_at_the_namespace(node: &Node) {
    for namespace in ["elsewhere", "default", "kube-system"] {
        assert_eq!(rights(node, namespace), CLUSTER.map(str::to_owned).into(), "{namespace}");
    }
    let at_home = rights(node, install::NAMESPACE);
    assert_eq!(at_home, [CLUSTER[0], CLUSTER[1], "leases"].map(str::to_owned).into());
    let watched = rights(node, "scoped");
    for resource in ["llmdeployments", "pods", "deployments", "jobs"] {
        assert!(watched.contains(resource), "{watched:?}");
    }
    assert!(!watched.contains("secrets") && !watched.contains("*"), "{watched:?}");
}

/// Resources that the operator's account may do anything with, by the names that its roles give them.
fn rights(node: &Node, namespace: &str) -> BTreeSet<String> {
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace}});
    let words = ["create", "--as", ACCOUNT, "--validate=false", "--output=json", "-f", "-"];
    let answer = node.kubectl().run_with_input(&words, &review.to_string()).unwrap();
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["status"]["incomplete"], false, "{answer:#}");
    let rules = answer["status"]["resourceRules"].as_array().unwrap();
    let resources =
        rules.iter().flat_map(|rule| rule["resources"].as_array().into_iter().flatten());
    let names = resources.map(|name| name.as_str().unwrap().to_owned());
    // Everyone who is authenticated may review their own rights.
    names.filter(|name| !name.starts_with("selfsubject")).collect()
}

/// From its first list on: none was forbidden, because none was made elsewhere.
fn every_request_was_within_them(node: &Node) {
    let pods = install::operator_pods(node).unwrap();
    assert_eq!(pods.len(), 1, "{pods:?}");
    let audit = node.audit().unwrap();
    let own: Vec<&AuditEvent> = audit.iter().filter(|event| event.pod == pods[0]).collect();
    assert!(own.iter().any(|event| event.is_write()), "{} requests", own.len());
    for event in own {
        assert_eq!(event.user, ACCOUNT);
        assert_ne!(event.code, 403, "{event:?}");
        let within = match event.namespace.as_str() {
            "scoped" => true,
            install::NAMESPACE => event.resource == "leases",
            _ => CLUSTER.contains(&event.resource.as_str()),
        };
        assert!(within, "{event:?}");
    }
}

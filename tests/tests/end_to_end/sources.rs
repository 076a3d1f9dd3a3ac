//! Where models come from: a folder of the node, and a hub, once for all pods or by every pod for itself.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use plimsoll_tests::cluster::{Node, wait_until};
use plimsoll_tests::hub::{self, Hub, Repository};
use plimsoll_tests::install;
use plimsoll_tests::stage::{Stage, condition};
use serde_json::json;

use crate::{ANSWER, HUB, ask, installed, manifest, set_up};

/// The commit of everything on the hub.
const COMMIT: &str = "5e1f0c3d9a7b24680ace13579bdf02468ace1357";

/// The hub on the node's network: the bundled model under three names, one of which wants a token.
fn serving_hub(node: &Node) -> Arc<Hub> {
    static SERVING: OnceLock<Arc<Hub>> = OnceLock::new();
    let start = || {
        let folder = install::root().join("tests/model");
        let repository = |name: &str| Repository::of_folder(name, COMMIT, &folder).unwrap();
        let mut gated = repository("lanterns/gated");
        gated.token = Some("secret-token".into());
        let open = [repository("lanterns/plim"), repository("lanterns/apart")];
        let hub = Arc::new(Hub::of(open.into_iter().chain([gated]).collect()));
        node.inside(|| hub::serve(hub.clone(), HUB.parse()?)).unwrap();
        hub
    };
    SERVING.get_or_init(start).clone()
}

#[test]
fn a_folder_of_the_node_is_served_only_while_the_operator_allows_it() {
    let Some(node) = installed() else { return };
    let stage = Stage::unrestricted(&node, "hostpath").unwrap();
    let folder = stage.folder("model", &install::root().join("tests/model")).unwrap();
    let source = format!("file://{}", folder.display());
    stage.apply(&manifest("local", &source, 1)).unwrap();
    let refused = |stage: &Stage<'_>| {
        let stalled = stage.wait_for("local", "Stalled").unwrap();
        assert_eq!(stalled["reason"], "SourceNotAllowed", "{stalled}");
        assert!(stalled["message"].as_str().unwrap().contains("--allow-host-path"), "{stalled}");
    };
    refused(&stage);
    assert!(stage.pods("local").unwrap().is_empty());

    set_up(&node, &["allowHostPath=true"]);
    stage.wait_ready("local").unwrap();
    let address = stage.service("local").unwrap();
    assert!(ask(&stage, address).contains(ANSWER));
    let pods = stage.get(&["pods", "--selector=plimsoll.dev/name=local"]).unwrap();
    let volumes = pods["items"][0]["spec"]["volumes"].as_array().unwrap();
    let folder = folder.display().to_string();
    assert!(volumes.iter().any(|held| held["hostPath"]["path"] == *folder), "{volumes:#?}");

    // An operator that does not allow it any more says so, and ends nothing that serves.
    set_up(&node, &[]);
    refused(&stage);
    assert!(ask(&stage, address).contains(ANSWER));
}

#[test]
fn where_several_nodes_and_a_claim_for_one_meet_every_pod_downloads_for_itself() {
    let Some(node) = installed() else { return };
    let hub = serving_hub(&node);
    let stage = Stage::new(&node, "apart").unwrap();
    let second = SecondNode::new(&node);
    stage.apply(&manifest("plim", "hf://lanterns/apart@main", 2)).unwrap();
    stage.wait_ready("plim").unwrap();
    drop(second);
    let object = stage.get(&["llmd", "plim"]).unwrap();
    let said = condition(&object, "ModelReady").unwrap()["message"].as_str().unwrap();
    assert!(said.contains("every pod downloads it for itself"), "{said}");
    assert_eq!(object["status"]["model"]["revision"], COMMIT, "{object:#}");
    assert_eq!(stage.run(&["get", "pvc", "--output=name"]).unwrap(), "");
    assert!(ask(&stage, stage.service("plim").unwrap()).contains(ANSWER));

    // Each of the two pods, and of the inspect Job no more than the header.
    let weights = install::root().join("tests/model/model.safetensors");
    let whole = std::fs::metadata(weights).unwrap().len();
    let sent = hub.bytes_sent("lanterns/apart", "model.safetensors");
    assert!((2 * whole..2 * whole + whole / 10).contains(&sent), "{sent} bytes, {whole} each");
}

/// A node by name alone: it says that it is ready and takes pods, so that the operator counts it, but no kubelet stands
/// behind it, and it has no room for a single pod, so that the scheduler sends it none.
struct SecondNode<'node>(&'node Node);

impl SecondNode<'_> {
    fn new(node: &Node) -> SecondNode<'_> {
        let second = SecondNode(node);
        let kubectl = node.kubectl();
        let body = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "second"}});
        kubectl.apply(&body.to_string()).unwrap();
        let room = json!({"cpu": "1", "memory": "1Gi", "pods": "0"});
        let ready = json!([{"type": "Ready", "status": "True", "reason": "KubeletReady"}]);
        let status =
            json!({"status": {"capacity": room, "allocatable": room, "conditions": ready}});
        let words = ["patch", "node", "second", "--subresource=status", "--type=merge", "--patch"];
        kubectl.run(&[&words[..], &[&status.to_string()]].concat()).unwrap();
        // The taint of nodes that are not ready goes first, and comes back when no kubelet reports for 50 s.
        wait_until("the second node takes pods", Duration::from_secs(30), || {
            let held = kubectl.get(&["node", "second"])?;
            Ok(held["spec"]["taints"].as_array().is_none_or(Vec::is_empty).then_some(()))
        })
        .unwrap();
        second
    }
}

impl Drop for SecondNode<'_> {
    fn drop(&mut self) {
        self.0.kubectl().run(&["delete", "node", "second"]).ok();
    }
}

#[test]
fn a_model_comes_from_a_hub_with_its_commit_pinned_and_a_gated_one_waits_for_its_token() {
    let Some(node) = installed() else { return };
    let hub = serving_hub(&node);
    let stage = Stage::new(&node, "hub").unwrap();
    stage.volume("first").unwrap();
    stage.volume("second").unwrap();
    stage.apply(&manifest("open", "hf://lanterns/plim@main", 1)).unwrap();
    stage.apply(&manifest("gated", "hf://lanterns/gated@main", 1)).unwrap();
    stage.wait_ready("open").unwrap();
    let object = stage.get(&["llmd", "open"]).unwrap();
    assert_eq!(object["status"]["model"]["revision"], COMMIT, "{object:#}");
    assert!(ask(&stage, stage.service("open").unwrap()).contains(ANSWER));
    let path = format!("GET /lanterns/plim/resolve/{COMMIT}/model.safetensors");
    assert!(hub.requests().contains(&path), "{:#?}", hub.requests());

    let stalled = stage.wait_for("gated", "Stalled").unwrap();
    assert_eq!(stalled["reason"], "ModelUnauthorized", "{stalled}");
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"},
        "stringData": {"token": "secret-token"}});
    stage.apply(&secret.to_string()).unwrap();
    let mended = json!({"spec": {"model": {"credentials": {"secretRef": {"name": "hub"}}}}});
    stage.run(&["patch", "llmd/gated", "--type=merge", "-p", &mended.to_string()]).unwrap();
    stage.wait_ready("gated").unwrap();
}

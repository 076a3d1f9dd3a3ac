//! In: pods that have a node. Out: the same pods, Ready at once, for short runs that do without kwok; and a Job's pod that
//! says what an engine's `inspect` would say. Never here: anything that runs.

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

const ENGINES: &str = "plimsoll.dev/name";
const INSPECTS: &str = "plimsoll.dev/model";

/// Plays the kubelets of engine pods until the runtime ends.
pub fn play(client: &Client) {
    let pods: Api<Pod> = Api::all(client.clone());
    let client = client.clone();
    tokio::spawn(async move {
        let config = watcher::Config::default().labels(ENGINES);
        let mut events = watcher(pods, config).applied_objects().boxed();
        while let Some(event) = events.next().await {
            let Ok(pod) = event else { continue };
            let waits = pod
                .status
                .as_ref()
                .is_some_and(|status| status.phase.as_deref() == Some("Pending"));
            if waits && pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some()) {
                let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
                set_status(&client, &pod, status).await;
            }
        }
    });
}

/// Waits for the pod of an inspect Job, and ends it with `facts`.
pub async fn finish_inspect(client: &Client, namespace: &str, facts: &Value) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pod = loop {
        let found = pods.list(&ListParams::default().labels(INSPECTS)).await.unwrap();
        if let Some(pod) = found.items.into_iter().next() {
            break pod;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let ended = json!({"exitCode": 0, "message": facts.to_string(), "reason": "Completed"});
    let container = json!({"name": "inspect", "image": "i", "imageID": "i", "ready": false,
        "restartCount": 0, "state": {"terminated": ended}});
    set_status(client, &pod, json!({"phase": "Succeeded", "containerStatuses": [container]})).await;
}

async fn set_status(client: &Client, pod: &Pod, status: Value) {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap());
    let patch = Patch::Strategic(json!({"status": status}));
    // A pod that is gone by now needs none.
    pods.patch_status(&pod.name_any(), &PatchParams::default(), &patch).await.ok();
}

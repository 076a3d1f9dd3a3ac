//! In: a model source and where it is stored. Out: where pods find the model (volumes, mounts, the directory), and the
//! three objects that the LLMDeployments of one source share: the claim for a download, the Job that downloads and
//! inspects, the ConfigMap that keeps the facts. Never here: whether they are needed.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim};
use plimsoll_contract::exit::ExitReason;
use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::flags;
use plimsoll_crds::AccessMode;
use serde_json::{Value, json};

use super::{Settings, names};
use crate::apply::Want;
use crate::fields::digest;
use crate::spec::{SecretKey, Source, Spec, Storage};

/// Key of the facts' JSON in their ConfigMap.
pub const FACTS_KEY: &str = "facts.json";

const VOLUME: &str = "model";
const VOLUME_PATH: &str = "/models";
const TOKEN_VOLUME: &str = "hub-token";
const TOKEN_PATH: &str = "/run/secrets/plimsoll/hub";
const TERMINATION_MESSAGE_PATH: &str = "/dev/termination-log";
/// Attempts after which a Job that fails for passing reasons gives up.
const JOB_RETRIES: u32 = 3;

/// Where a pod finds the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// On a claim of the user's, read-only.
    Claim { claim: String, path: String },
    /// On a claim of ours that one Job fills and all pods share.
    Download { key: String },
    /// In the pod itself, filled by its init container.
    PerPod,
    /// In a directory of the node.
    Host { path: String },
}

impl Place {
    /// Where the model of `spec` is to lie where `nodes` take pods, and what is to say about that. Decided for each revision
    /// anew.
    pub fn choose(spec: &Spec, key: &str, nodes: usize) -> (Place, Option<String>) {
        match &spec.source {
            Source::Claim { name, path } => {
                (Place::Claim { claim: name.clone(), path: path.clone() }, None)
            }
            Source::File { path } => (Place::Host { path: path.clone() }, None),
            Source::Hub { .. } if spec.storage.access_mode == AccessMode::ReadWriteMany => {
                let note = "all pods share one download, because storage is ReadWriteMany";
                (Place::Download { key: key.to_owned() }, Some(note.to_owned()))
            }
            Source::Hub { .. } if nodes <= 1 => {
                let note = "all pods share one download on ReadWriteOnce storage and so one node, because no more \
                     than one node takes pods; for pods on a node that comes later, set spec.storage.accessMode \
                     ReadWriteMany, or change the spec, which decides this again";
                (Place::Download { key: key.to_owned() }, Some(note.to_owned()))
            }
            Source::Hub { .. } => {
                let note = format!(
                    "every pod downloads it for itself, because storage is ReadWriteOnce and {nodes} nodes \
                     take pods; with spec.storage.accessMode ReadWriteMany they share one download"
                );
                (Place::PerPod, Some(note))
            }
        }
    }

    /// The directory the engine is pointed at.
    pub fn directory(&self) -> String {
        match self {
            Place::Claim { path, .. } => {
                format!("{VOLUME_PATH}/{}", path.trim_matches('/')).trim_end_matches('/').to_owned()
            }
            Place::Download { .. } | Place::PerPod => format!("{VOLUME_PATH}/model"),
            Place::Host { .. } => VOLUME_PATH.to_owned(),
        }
    }

    /// The pod's volume.
    pub fn volume(&self) -> Value {
        match self {
            Place::Claim { claim, .. } => json!({
                "name": VOLUME,
                "persistentVolumeClaim": {"claimName": claim, "readOnly": true},
            }),
            Place::Download { key } => json!({
                "name": VOLUME,
                "persistentVolumeClaim": {"claimName": names::model(key)},
            }),
            Place::PerPod => json!({"name": VOLUME, "emptyDir": {}}),
            Place::Host { path } => json!({
                "name": VOLUME,
                "hostPath": {"path": path, "type": "Directory"},
            }),
        }
    }

    /// The mount of a container that only reads.
    pub fn mount(&self) -> Value {
        json!({"name": VOLUME, "mountPath": VOLUME_PATH, "readOnly": true})
    }

    /// Whether this pod's init container brings the model. `job` is true for the inspect Job, which needs headers alone
    /// where every pod downloads for itself.
    fn fetched_here(&self, job: bool) -> bool {
        match self {
            Place::PerPod => !job,
            Place::Download { .. } => job,
            Place::Claim { .. } | Place::Host { .. } => false,
        }
    }
}

/// The init container that downloads, where this pod has to, with the volume of its token.
pub fn fetch(
    spec: &Spec,
    place: &Place,
    commit: Option<&str>,
    settings: &Settings,
    job: bool,
) -> (Option<Value>, Option<Value>) {
    let Some(address) = hub_address(spec, commit).filter(|_| place.fetched_here(job)) else {
        return (None, None);
    };
    let arguments = json!(["fetch", address, "--into", place.directory()]);
    let mounts = vec![json!({"name": VOLUME, "mountPath": VOLUME_PATH})];
    let mut container = container(names::FETCH, arguments, mounts, settings);
    let token = let_ask_the_hub(&mut container, spec, settings);
    (Some(container), token)
}

/// The model's address at the commit that is pinned, or else at the revision that the spec names. None where its source
/// is no hub.
fn hub_address(spec: &Spec, commit: Option<&str>) -> Option<String> {
    let Source::Hub { repo, revision } = &spec.source else { return None };
    Some(format!("hf://{repo}@{}", commit.unwrap_or(revision)))
}

/// A container of the engine's image that ends by itself. It has limits, without which a namespace with a quota on them
/// lets no pod in; reading headers and streaming to a disk take far less memory.
fn container(name: &str, arguments: Value, mut mounts: Vec<Value>, settings: &Settings) -> Value {
    mounts.push(json!({"name": "tmp", "mountPath": "/tmp"}));
    json!({
        "name": name,
        "image": settings.engine_image,
        "command": ["plimsoll-engine"],
        "args": arguments,
        "volumeMounts": mounts,
        "resources": {
            "requests": {"cpu": "100m", "memory": "128Mi"},
            "limits": {"cpu": "2", "memory": "1Gi"},
        },
        "securityContext": super::pod::container_security(),
        "terminationMessagePath": TERMINATION_MESSAGE_PATH,
    })
}

/// Tells a container which hub, and gives it the token of the spec, whose volume is returned.
fn let_ask_the_hub(container: &mut Value, spec: &Spec, settings: &Settings) -> Option<Value> {
    if let Some(endpoint) = &settings.hub_endpoint {
        container["env"] = json!([{"name": flags::ENDPOINT_VARIABLE, "value": endpoint}]);
    }
    let SecretKey { name, key } = spec.credentials.as_ref()?;
    let mut extend = |field: &str, more: Vec<Value>| {
        container[field].as_array_mut().expect("containers are made with it").extend(more);
    };
    extend("args", vec!["--token-file".into(), format!("{TOKEN_PATH}/token").into()]);
    let mount = json!({"name": TOKEN_VOLUME, "mountPath": TOKEN_PATH, "readOnly": true});
    extend("volumeMounts", vec![mount]);
    Some(json!({
        "name": TOKEN_VOLUME,
        "secret": {"secretName": name, "items": [{"key": key, "path": "token"}]},
    }))
}

/// The claim a download goes to. Its spec is never compared again: claims are immutable but for growing.
pub fn claim(
    namespace: &str,
    key: &str,
    owners: &[Value],
    storage: &Storage,
) -> Want<PersistentVolumeClaim> {
    let mut spec = json!({
        "accessModes": [storage.access_mode],
        "resources": {"requests": {"storage": storage.size}},
    });
    if let Some(class) = &storage.storage_class_name {
        spec["storageClassName"] = class.as_str().into();
    }
    Want::new(json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": shared(namespace, &names::model(key), key, owners),
        "spec": spec,
    }))
}

/// Downloads where needed (`commit`, once one is pinned), then reads the checkpoint's headers, on the hub itself where
/// every pod downloads for itself, and leaves the facts in the termination message. Says for whom and from what it was
/// rendered, so that a mended spec gets a Job of its own.
pub fn inspect_job(
    namespace: &str,
    key: &str,
    owners: &[Value],
    spec: &Spec,
    place: &Place,
    commit: Option<&str>,
    settings: &Settings,
) -> Want<Job> {
    let pod = inspect_pod(spec, place, commit, settings);
    let mut metadata = shared(namespace, &names::inspect_job(key), key, owners);
    let maker = owners.first().and_then(|owner| owner["uid"].as_str()).unwrap_or_default();
    metadata["annotations"] = json!({names::MADE_FOR: format!("{maker}/{}", digest(&pod, 10))});
    Want::new(json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "backoffLimit": JOB_RETRIES,
            "podFailurePolicy": {"rules": [{
                "action": "FailJob",
                "onExitCodes": {"operator": "In", "values": codes_for_a_person()},
            }]},
            "template": {"metadata": {"labels": names::model_labels(key)}, "spec": pod},
        },
    }))
}

fn inspect_pod(spec: &Spec, place: &Place, commit: Option<&str>, settings: &Settings) -> Value {
    let (fetch, token) = fetch(spec, place, commit, settings, true);
    let inspect = |source: &str, mounts: Vec<Value>| {
        let flags = ["--json", "--termination-message-file", TERMINATION_MESSAGE_PATH];
        let arguments = [&["inspect", source], &flags[..]].concat();
        container("inspect", json!(arguments), mounts, settings)
    };
    let tmp = json!({"name": "tmp", "emptyDir": {}});
    let (inspect, volumes) = match (place, hub_address(spec, commit)) {
        (Place::PerPod, Some(address)) => {
            let mut inspect = inspect(&address, Vec::new());
            let token = let_ask_the_hub(&mut inspect, spec, settings);
            (inspect, vec![Some(tmp), token])
        }
        _ => {
            let inspect = inspect(&place.directory(), vec![place.mount()]);
            (inspect, vec![Some(place.volume()), Some(tmp), token])
        }
    };
    let mut pod = json!({
        "restartPolicy": "Never",
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "securityContext": super::pod::pod_security(place),
        "containers": [inspect],
        "volumes": volumes.into_iter().flatten().collect::<Vec<_>>(),
    });
    if let Some(fetch) = fetch {
        pod["initContainers"] = json!([fetch]);
    }
    place_like_the_engine(&mut pod, spec.pod_template.as_ref());
    pod
}

/// The facts, readable by everyone who may read the namespace.
pub fn facts(
    namespace: &str,
    key: &str,
    owners: &[Value],
    source: &str,
    facts: &ModelFacts,
) -> Want<ConfigMap> {
    let text = serde_json::to_string(facts).expect("facts are plain data");
    Want::new(json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": shared(namespace, &names::model(key), key, owners),
        "data": {"source": source, FACTS_KEY: text},
    }))
}

pub(super) fn shared(namespace: &str, name: &str, key: &str, owners: &[Value]) -> Value {
    json!({
        "name": name,
        "namespace": namespace,
        "labels": names::model_labels(key),
        "ownerReferences": owners,
    })
}

/// The Job's pod goes where the engine's may go, and pulls with the same secrets.
fn place_like_the_engine(pod: &mut Value, overlay: Option<&Value>) {
    let Some(over) = overlay.and_then(|overlay| overlay.get("spec")) else { return };
    for field in ["nodeSelector", "tolerations", "affinity", "imagePullSecrets"] {
        if let Some(value) = over.get(field) {
            pod[field] = value.clone();
        }
    }
}

/// Exit codes after which trying again cannot help. Sorted, as the API wants a set.
fn codes_for_a_person() -> Vec<u8> {
    ExitReason::ALL
        .into_iter()
        .filter(|reason| reason.needs_a_person())
        .map(ExitReason::code)
        .collect()
}

//! In: a spec, its plan, where the model lies, what the operator was started with. Out: the pod template that a new
//! revision freezes. Runs once per revision; a later operator that renders otherwise changes no running pod.

use plimsoll_contract::facts::ModelFacts;
use plimsoll_crds::AccessMode;
use serde_json::{Value, json};

use super::model::{Place, fetch};
use super::{Settings, names, quantity};
use crate::fields::overlay;
use crate::plan::{self, Device, Plan, cards};
use crate::spec::Spec;

/// The user and group of every process we start; not root, and no user of the image.
const USER: u32 = 65532;
/// Between the end of draining and the kill.
const GRACE_MARGIN_SECONDS: u32 = 10;
/// How long a drain goes on taking requests while endpoints catch up; the engine's default of --drain-grace.
const DRAIN_GRACE_SECONDS: u32 = 10;
/// A start is given this, and the time to read the weights three times over a slow disk.
const STARTUP_SECONDS_MIN: u64 = 60;
const SLOW_DISK_BYTES_PER_SECOND: u64 = 100 << 20;

/// An engine beside a GPU may use this often what it asks for: being killed costs more than memory that nobody uses.
const GPU_HOST_MARGIN: u64 = 2;

const KEYS_VOLUME: &str = "api-keys";
const KEYS_PATH: &str = "/run/secrets/plimsoll/keys";

/// What the pod template of a revision is made from.
pub struct Inputs<'a> {
    pub name: &'a str,
    pub spec: &'a Spec,
    pub plan: &'a Plan,
    pub facts: &'a ModelFacts,
    pub place: &'a Place,
    pub settings: &'a Settings,
}

/// The template with the overlay of the spec laid over it. Our labels come last: the selector depends on them.
pub fn template(inputs: &Inputs<'_>) -> Value {
    let Inputs { name, spec, facts, place, settings, .. } = *inputs;
    let (fetch, token) = fetch(spec, place, facts.revision.as_deref(), settings, false);
    let mut volumes = vec![place.volume(), json!({"name": "tmp", "emptyDir": {}})];
    volumes.extend(token);
    volumes.extend(spec.api_keys.as_ref().map(|secret| {
        json!({"name": KEYS_VOLUME, "secret": {
            "secretName": secret.name, "items": [{"key": secret.key, "path": "keys"}],
        }})
    }));
    let mut template = json!({
        "metadata": {
            "labels": names::labels(name),
            "annotations": {names::DO_NOT_DISRUPT: "true"},
        },
        "spec": {
            "serviceAccountName": name,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "securityContext": pod_security(place),
            "terminationGracePeriodSeconds":
                DRAIN_GRACE_SECONDS + spec.drain_seconds + GRACE_MARGIN_SECONDS,
            "containers": [engine(inputs)],
            "volumes": volumes,
        },
    });
    if let Some(fetch) = fetch {
        template["spec"]["initContainers"] = json!([fetch]);
    }
    if let Device::Cuda { product } = &inputs.plan.device {
        template["spec"]["nodeSelector"] = json!({cards::PRODUCT_LABEL: product});
    }
    if let Some(over) = &spec.pod_template {
        overlay(&mut template, over);
    }
    if matches!(inputs.plan.device, Device::Cuda { .. }) {
        // After the overlay, because a list of tolerations replaces another as a whole.
        tolerate_gpu_nodes(&mut template["spec"]["tolerations"]);
    }
    overlay(&mut template, &json!({"metadata": {"labels": names::labels(name)}}));
    if let Place::Download { key } = place
        && spec.storage.access_mode == AccessMode::ReadWriteOnce
    {
        keep_together(&mut template, key);
    }
    template
}

/// All pods of a download that one node can hold go where the first went: on another node they would wait for their volume
/// for ever, and here the scheduler says what they wait for.
fn keep_together(template: &mut Value, key: &str) {
    template["metadata"]["labels"][names::DOWNLOAD] = key.into();
    let term = json!({
        "labelSelector": {"matchLabels": {names::DOWNLOAD: key}},
        "topologyKey": "kubernetes.io/hostname",
    });
    let affinity = &mut template["spec"]["affinity"]["podAffinity"];
    match &mut affinity["requiredDuringSchedulingIgnoredDuringExecution"] {
        Value::Array(given) => given.push(term),
        absent => *absent = json!([term]),
    }
}

/// Nodes with GPUs usually keep away pods that ask for none.
fn tolerate_gpu_nodes(tolerations: &mut Value) {
    let ours = json!({"key": cards::RESOURCE, "operator": "Exists", "effect": "NoSchedule"});
    match tolerations {
        Value::Array(given) if given.contains(&ours) => {}
        Value::Array(given) => given.push(ours),
        absent => *absent = json!([ours]),
    }
}

/// The engine's container in a pod template.
pub fn engine_of(pod_template: &Value) -> Option<&Value> {
    let containers = pod_template["spec"]["containers"].as_array()?;
    containers.iter().find(|container| container["name"] == names::ENGINE)
}

fn engine(inputs: &Inputs<'_>) -> Value {
    let Inputs { spec, plan, facts, place, settings, .. } = *inputs;
    let mut arguments = vec![
        "serve".to_owned(),
        format!("--model={}", place.directory()),
        format!("--listen=0.0.0.0:{}", names::PORT_ENGINE),
    ];
    arguments.extend(plan::flags(plan, spec));
    if plan.device == Device::Cpu {
        // The sum holds a share for the process itself; measuring the group would count what it has used by then twice.
        // A card is measured: it says what it has left.
        arguments.push(format!("--memory-bytes={}", plan.memory.total()));
    }
    if spec.api_keys.is_some() {
        arguments.push(format!("--api-key-file={KEYS_PATH}/keys"));
    }
    let mut mounts = vec![place.mount(), json!({"name": "tmp", "mountPath": "/tmp"})];
    if spec.api_keys.is_some() {
        mounts.push(json!({"name": KEYS_VOLUME, "mountPath": KEYS_PATH, "readOnly": true}));
    }
    let starts = startup_seconds(facts);
    json!({
        "name": names::ENGINE,
        "image": settings.engine_image,
        "command": ["plimsoll-engine"],
        "args": arguments,
        "ports": [{"name": names::PORT_NAME, "containerPort": names::PORT_ENGINE, "protocol": "TCP"}],
        "resources": resources(spec, plan),
        "startupProbe": probe("/ready", 1, starts),
        "readinessProbe": probe("/ready", 2, 2),
        "livenessProbe": probe("/health", 10, 6),
        "volumeMounts": mounts,
        "securityContext": container_security(),
        "terminationMessagePath": "/dev/termination-log",
    })
}

fn resources(spec: &Spec, plan: &Plan) -> Value {
    let cpu = quantity::cpu(plan.cpu_millis.into());
    match plan.device {
        Device::Cpu => {
            let total = plan.memory.total();
            // The capacity is what the spec names or the node has left, so that no limit promises more.
            let with_headroom = (total + plan::headroom(total)).min(plan.capacity);
            let limit = spec.budget.memory_bytes.map_or(with_headroom, |_| plan.capacity);
            json!({
                "requests": {"cpu": cpu, "memory": quantity::memory(total)},
                "limits": {"memory": quantity::memory(limit.max(total))},
            })
        }
        Device::Cuda { .. } => {
            let most = GPU_HOST_MARGIN * plan::GPU_HOST_BYTES;
            let limit = quantity::memory(spec.budget.memory_bytes.unwrap_or(most));
            let memory = quantity::memory(plan::GPU_HOST_BYTES);
            let gpus = plan.tensor_parallel.to_string();
            json!({
                "requests": {"cpu": cpu, "memory": memory, cards::RESOURCE: gpus},
                "limits": {"memory": limit, cards::RESOURCE: gpus},
            })
        }
    }
}

fn probe(path: &str, period_seconds: u64, failures: u64) -> Value {
    json!({
        "httpGet": {"path": path, "port": names::PORT_NAME},
        "periodSeconds": period_seconds,
        "failureThreshold": failures,
        "timeoutSeconds": 5,
    })
}

/// Sized from what has to be read; it only bounds a start that hangs, so it may be generous.
fn startup_seconds(facts: &ModelFacts) -> u64 {
    let bytes: u64 = facts.disk_bytes.values().sum();
    STARTUP_SECONDS_MIN + 3 * bytes / SLOW_DISK_BYTES_PER_SECOND
}

/// Restricted, as the pod security standard of that name wants it. A claim of the user's is not ours to chown.
pub fn pod_security(place: &Place) -> Value {
    let mut context = json!({
        "runAsNonRoot": true,
        "runAsUser": USER,
        "runAsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    });
    if matches!(place, Place::Download { .. } | Place::PerPod) {
        context["fsGroup"] = USER.into();
        context["fsGroupChangePolicy"] = "OnRootMismatch".into();
    }
    context
}

pub fn container_security() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
    })
}

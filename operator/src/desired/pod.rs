//! In: a spec, its plan, where the model lies, what the operator was started with. Out: the pod template that a new
//! revision freezes. Runs once per revision; a later operator that renders otherwise changes no running pod.

use plimsoll_contract::facts::ModelFacts;
use serde_json::{Value, json};

use super::model::{Place, fetch};
use super::{Settings, names, quantity};
use crate::fields::overlay;
use crate::plan::{self, Plan};
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
        "metadata": {"labels": names::labels(name)},
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
    if let Some(over) = &spec.pod_template {
        overlay(&mut template, over);
    }
    overlay(&mut template, &json!({"metadata": {"labels": names::labels(name)}}));
    template
}

fn engine(inputs: &Inputs<'_>) -> Value {
    let Inputs { spec, plan, facts, place, settings, .. } = *inputs;
    let mut arguments = vec![
        "serve".to_owned(),
        format!("--model={}", place.directory()),
        format!("--listen=0.0.0.0:{}", names::PORT_ENGINE),
    ];
    arguments.extend(plan::flags(plan, spec));
    // The sum holds a share for the process itself; measuring the group would count what it has used by then twice.
    arguments.push(format!("--memory-bytes={}", plan.memory.total()));
    if spec.api_keys.is_some() {
        arguments.push(format!("--api-key-file={KEYS_PATH}/keys"));
    }
    let mut mounts = vec![place.mount(), json!({"name": "tmp", "mountPath": "/tmp"})];
    if spec.api_keys.is_some() {
        mounts.push(json!({"name": KEYS_VOLUME, "mountPath": KEYS_PATH, "readOnly": true}));
    }
    let memory = quantity::memory(plan.memory.total());
    let starts = startup_seconds(facts);
    json!({
        "name": names::ENGINE,
        "image": settings.engine_image,
        "command": ["plimsoll-engine"],
        "args": arguments,
        "ports": [{"name": names::PORT_NAME, "containerPort": names::PORT_ENGINE, "protocol": "TCP"}],
        "resources": {
            "requests": {"cpu": quantity::cpu(plan.cpu_millis.into()), "memory": memory},
            "limits": {"memory": memory},
        },
        "startupProbe": probe("/ready", 1, starts),
        "readinessProbe": probe("/ready", 2, 2),
        "livenessProbe": probe("/health", 10, 6),
        "volumeMounts": mounts,
        "securityContext": container_security(),
        "terminationMessagePath": "/dev/termination-log",
    })
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

/// The first field of a pod template overlay that reaches out of the pod and into the node.
pub fn escape(overlay: &Value) -> Option<&'static str> {
    let spec = overlay.get("spec")?;
    let items = |field: &str| spec[field].as_array().into_iter().flatten();
    let privileged = |container: &Value| container["securityContext"]["privileged"] == true;
    if let Some(field) =
        ["hostNetwork", "hostPID", "hostIPC"].into_iter().find(|field| spec[*field] == true)
    {
        return Some(field);
    }
    if items("volumes").any(|volume| !volume["hostPath"].is_null()) {
        return Some("a hostPath volume");
    }
    let containers = ["initContainers", "containers", "ephemeralContainers"];
    let mut all = containers.into_iter().flat_map(items);
    all.any(privileged).then_some("privileged: true")
}

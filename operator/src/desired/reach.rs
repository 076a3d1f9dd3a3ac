//! In: the overlay of a pod template. Out: the first field by which its author would reach out of the pod: into the node,
//! to root, or to an account that is not the pod's. A list of what is allowed, so that a field of a later Kubernetes is
//! refused until somebody has thought about it. Pure. Never here: whether a value is well-formed (the API server says).

use serde_json::Value;

/// Of a pod: where it runs, what it mounts, how it ends.
const POD: &[&str] = &[
    "activeDeadlineSeconds",
    "affinity",
    "containers",
    "dnsConfig",
    "dnsPolicy",
    "enableServiceLinks",
    "hostAliases",
    "hostname",
    "imagePullSecrets",
    "initContainers",
    "nodeSelector",
    "overhead",
    "preemptionPolicy",
    "priorityClassName",
    "readinessGates",
    "resources",
    "runtimeClassName",
    "schedulerName",
    "schedulingGates",
    "securityContext",
    "setHostnameAsFQDN",
    "subdomain",
    "terminationGracePeriodSeconds",
    "tolerations",
    "topologySpreadConstraints",
    "volumes",
];

/// Of a volume: its name, and the kinds that the restricted pod security level knows, and images.
const VOLUME: &[&str] = &[
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "name",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

const CONTAINER: &[&str] = &[
    "args",
    "command",
    "env",
    "envFrom",
    "image",
    "imagePullPolicy",
    "lifecycle",
    "livenessProbe",
    "name",
    "ports",
    "readinessProbe",
    "resizePolicy",
    "resources",
    "restartPolicy",
    "securityContext",
    "startupProbe",
    "stdin",
    "stdinOnce",
    "terminationMessagePath",
    "terminationMessagePolicy",
    "tty",
    "volumeMounts",
    "workingDir",
];

const PORT: &[&str] = &["containerPort", "name", "protocol"];

/// The path of the first field that is not allowed.
pub fn reaches_out(overlay: &Value) -> Option<String> {
    let spec = overlay.get("spec")?;
    beyond("spec", spec, POD)
        .or_else(|| security("spec.securityContext", spec.get("securityContext")?))
        .or_else(|| items(spec, "spec", "volumes").find_map(|(at, item)| beyond(&at, item, VOLUME)))
        .or_else(|| {
            items(spec, "spec", "initContainers").find_map(|(at, item)| container(&at, item))
        })
        .or_else(|| items(spec, "spec", "containers").find_map(|(at, item)| container(&at, item)))
}

/// The same of a whole template, as a revision holds it: what we write ourselves is within.
pub fn template_reaches_out(template: &Value, own_account: &str) -> bool {
    let mut spec = template["spec"].clone();
    let Some(fields) = spec.as_object_mut() else { return false };
    if fields.get("serviceAccountName").is_some_and(|account| account == own_account) {
        fields.shift_remove("serviceAccountName");
    }
    if fields.get("automountServiceAccountToken").is_some_and(|mounts| mounts == false) {
        fields.shift_remove("automountServiceAccountToken");
    }
    reaches_out(&serde_json::json!({ "spec": spec })).is_some()
}

fn container(at: &str, container: &Value) -> Option<String> {
    beyond(at, container, CONTAINER)
        .or_else(|| items(container, at, "ports").find_map(|(at, port)| beyond(&at, port, PORT)))
        .or_else(|| security(&format!("{at}.securityContext"), container.get("securityContext")?))
}

/// A security context may only say again, or more strictly, what ours says. A null would remove what ours says.
fn security(at: &str, context: &Value) -> Option<String> {
    let Some(fields) = context.as_object() else { return Some(at.to_owned()) };
    let allowed = |name: &str, value: &Value| match name {
        "allowPrivilegeEscalation" | "privileged" => value == false,
        "runAsNonRoot" => value == true,
        "runAsUser" | "runAsGroup" | "fsGroup" => value.as_u64().is_some_and(|id| id > 0),
        "supplementalGroups" => value
            .as_array()
            .is_some_and(|all| all.iter().all(|id| id.as_u64().is_some_and(|id| id > 0))),
        "capabilities" => *value == serde_json::json!({"drop": ["ALL"]}),
        "readOnlyRootFilesystem" => value.is_boolean(),
        "seccompProfile" => value["type"] == "RuntimeDefault" || value["type"] == "Localhost",
        "fsGroupChangePolicy" | "supplementalGroupsPolicy" => value.is_string(),
        _ => false,
    };
    let first = fields.iter().find(|(name, value)| !allowed(name, value));
    first.map(|(name, value)| format!("{at}.{name}: {value}"))
}

/// The path of the first field of `object` that `allowed` does not list.
fn beyond(at: &str, object: &Value, allowed: &[&str]) -> Option<String> {
    let mut fields = object.as_object()?.keys();
    fields.find(|name| !allowed.contains(&name.as_str())).map(|name| format!("{at}.{name}"))
}

/// The elements of a list, each with its path: by name where it has one.
fn items<'a>(
    object: &'a Value,
    at: &'a str,
    field: &'a str,
) -> impl Iterator<Item = (String, &'a Value)> {
    let list = object[field].as_array().into_iter().flatten().enumerate();
    list.map(move |(index, item)| {
        let name = item["name"].as_str().map_or_else(|| index.to_string(), str::to_owned);
        (format!("{at}.{field}[{name}]"), item)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_overlay_that_reaches_out_of_its_pod_is_recognised_by_the_field() {
        let engine = |fields: Value| {
            let mut engine = json!({"name": "engine"});
            engine.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            json!({"containers": [engine]})
        };
        let secured = |fields: Value| engine(json!({"securityContext": fields}));
        for (spec, field) in [
            (json!({"hostNetwork": true}), "spec.hostNetwork"),
            (json!({"hostPID": true}), "spec.hostPID"),
            (json!({"hostUsers": true}), "spec.hostUsers"),
            (json!({"shareProcessNamespace": true}), "spec.shareProcessNamespace"),
            (json!({"serviceAccountName": "admin"}), "spec.serviceAccountName"),
            (json!({"automountServiceAccountToken": true}), "spec.automountServiceAccountToken"),
            (json!({"nodeName": "control"}), "spec.nodeName"),
            (json!({"fieldOfTomorrow": 1}), "spec.fieldOfTomorrow"),
            (
                json!({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}),
                "spec.volumes[v].hostPath",
            ),
            (json!({"volumes": [{"name": "v", "nfs": {}}]}), "spec.volumes[v].nfs"),
            (json!({"securityContext": null}), "spec.securityContext"),
            (json!({"securityContext": {"runAsUser": 0}}), "spec.securityContext.runAsUser: 0"),
            (json!({"securityContext": {"runAsNonRoot": null}}), "runAsNonRoot: null"),
            (json!({"securityContext": {"sysctls": []}}), "spec.securityContext.sysctls"),
            (
                json!({"initContainers": [{"name": "x", "securityContext": {"privileged": true}}]}),
                "[x].securityContext.privileged: true",
            ),
            (
                secured(json!({"privileged": true})),
                "spec.containers[engine].securityContext.privileged: true",
            ),
            (secured(json!({"allowPrivilegeEscalation": true})), "allowPrivilegeEscalation: true"),
            (secured(json!({"capabilities": {"add": ["SYS_ADMIN"]}})), "capabilities"),
            (secured(json!({"capabilities": {"drop": []}})), "capabilities"),
            (secured(json!({"runAsUser": 0})), "runAsUser: 0"),
            (secured(json!({"procMount": "Unmasked"})), "procMount"),
            (secured(json!({"seccompProfile": {"type": "Unconfined"}})), "seccompProfile"),
            (secured(json!({"appArmorProfile": {"type": "Unconfined"}})), "appArmorProfile"),
            (engine(json!({"securityContext": null})), "spec.containers[engine].securityContext"),
            (engine(json!({"volumeDevices": []})), "spec.containers[engine].volumeDevices"),
            (
                engine(json!({"ports": [{"name": "http", "containerPort": 8000, "hostPort": 80}]})),
                "spec.containers[engine].ports[http].hostPort",
            ),
        ] {
            let found = reaches_out(&json!({"spec": spec.clone()}));
            assert!(found.as_ref().is_some_and(|found| found.contains(field)), "{spec}: {found:?}");
        }
    }

    #[test]
    fn an_overlay_that_stays_in_its_pod_is_let_through() {
        for spec in [
            json!({"nodeSelector": {"disk": "fast"}, "tolerations": [], "imagePullSecrets": [{"name": "s"}]}),
            json!({"volumes": [{"name": "v", "emptyDir": {}}, {"name": "c", "configMap": {"name": "c"}}]}),
            json!({"securityContext": {"runAsUser": 1000, "fsGroup": 1000, "runAsNonRoot": true}}),
            json!({"containers": null}),
            json!({"containers": [{"name": "engine", "image": "i", "env": [{"name": "A", "value": "1"}],
                "ports": [{"containerPort": 9000}], "resources": {"limits": {"cpu": "2"}},
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}),
        ] {
            assert_eq!(reaches_out(&json!({"spec": spec})), None);
        }
        assert_eq!(reaches_out(&json!({"metadata": {"annotations": {"a": "b"}}})), None);
    }
}

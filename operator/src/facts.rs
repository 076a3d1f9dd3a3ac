//! In: what the cluster holds for one model source. Out: what is known of the model, or what stands in the way. Pure.
//! Never here: reading a checkpoint (the engine's `inspect` does), a secret, a write.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition, Volume};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use plimsoll_contract::exit::{ExitReason, ExitReport};
use plimsoll_contract::facts::ModelFacts;
use plimsoll_crds::Reason;

use crate::desired::model::FACTS_KEY;
use crate::fields::digest;
use crate::observe::SeenModel;
use crate::spec::{Source, Spec};

/// A pod that has a node and not its volumes is told of after this; kubelets that can attach them take less.
const MOUNT_PATIENCE: Duration = Duration::from_secs(60);

/// A Job without a pod is told of after this; its controller takes a second.
const POD_PATIENCE: Duration = Duration::from_secs(30);

/// How far the operator's knowledge of a model goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// The facts stand in their ConfigMap.
    Known(Box<ModelFacts>),
    /// The Job has just said them; they are not stored yet.
    Told(Box<ModelFacts>),
    /// Nobody has looked yet.
    Unseen,
    /// The Job is on its way.
    Looking { reason: Reason, message: String },
    /// The Job failed. `retry`: a later attempt may succeed without anybody's doing.
    Failed { report: ExitReport, retry: bool },
}

/// Names one (source, revision, storage) of a namespace. Storage belongs to it, because a claim cannot change its mode.
pub fn key(spec: &Spec) -> String {
    let identity = match &spec.source {
        Source::Hub { repo, revision } => serde_json::json!({
            "hub": repo, "revision": revision, "storage": spec.storage,
        }),
        Source::Claim { name, path } => serde_json::json!({"claim": name, "path": path}),
        Source::File { path } => serde_json::json!({"file": path}),
    };
    digest(&identity, 10)
}

/// Stored facts count unless `downloads` and their download is gone or under way; then what a finished Job said; then
/// how far the Job is.
pub fn look(seen: &SeenModel, downloads: bool, now: Timestamp) -> Model {
    let stored = stored(seen);
    let Some(job) = &seen.job else {
        return match stored {
            Some(facts) if !downloads || seen.claim.is_some() => Model::Known(Box::new(facts)),
            _ => Model::Unseen,
        };
    };
    let complete = has_condition(job, "Complete");
    if let Some(facts) = stored.filter(|_| complete || !downloads) {
        return Model::Known(Box::new(facts));
    }
    if complete {
        return match said::<ModelFacts>(&seen.job_pods) {
            Some(facts) => Model::Told(Box::new(facts)),
            None => failed("the inspect Job ended without telling the facts".to_owned()),
        };
    }
    if has_condition(job, "Failed") {
        return match said::<ExitReport>(&seen.job_pods) {
            Some(report) => Model::Failed { retry: !report.reason.needs_a_person(), report },
            None => failed(why_failed(job)),
        };
    }
    let (reason, message) = progress(job, &seen.job_pods, now);
    Model::Looking { reason, message }
}

/// Whether a Job is of no more use. `outgrown`: its maker would make another now. `due`: it failed long enough ago.
pub fn is_spent(model: &Model, outgrown: bool, due: bool) -> bool {
    match model {
        Model::Unseen => false,
        Model::Looking { .. } => outgrown,
        Model::Failed { retry, .. } => outgrown || (*retry && due),
        Model::Told(_) | Model::Known(_) => true,
    }
}

/// A failure without a report of the engine: the image did not start, the node went away.
fn failed(message: String) -> Model {
    Model::Failed { report: ExitReport::new(ExitReason::Internal, message), retry: true }
}

fn stored(seen: &SeenModel) -> Option<ModelFacts> {
    let text = seen.facts.as_ref()?.data.as_ref()?.get(FACTS_KEY)?;
    serde_json::from_str(text).ok()
}

/// The newest termination message that parses as `T`, of any container of the Job's pods.
fn said<T: serde::de::DeserializeOwned>(pods: &[Arc<Pod>]) -> Option<T> {
    let mut pods: Vec<&Arc<Pod>> = pods.iter().collect();
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.metadata.creation_timestamp.clone()));
    pods.iter().flat_map(|pod| containers(pod)).find_map(|container| {
        let ended = container.state.as_ref()?.terminated.as_ref()?;
        serde_json::from_str(ended.message.as_deref()?).ok()
    })
}

/// All containers of a pod, init containers first.
pub fn containers(pod: &Pod) -> Vec<&ContainerStatus> {
    let Some(status) = &pod.status else { return Vec::new() };
    let init = status.init_container_statuses.iter().flatten();
    init.chain(status.container_statuses.iter().flatten()).collect()
}

fn has_condition(job: &Job, wanted: &str) -> bool {
    let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|held| held.type_ == wanted && held.status == "True")
}

fn why_failed(job: &Job) -> String {
    let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let message =
        conditions.filter(|held| held.type_ == "Failed").find_map(|held| held.message.clone());
    message.unwrap_or_else(|| "the inspect Job failed and does not say why".to_owned())
}

/// What the Job waits for, in its own words where it has any.
fn progress(job: &Job, pods: &[Arc<Pod>], now: Timestamp) -> (Reason, String) {
    let inspecting = |message: &str| (Reason::Inspecting, message.to_owned());
    let Some(pod) = pods.iter().max_by_key(|pod| pod.metadata.creation_timestamp.clone()) else {
        return (Reason::Inspecting, podless(job, now));
    };
    if let Some(why) = unschedulable(pod) {
        let no_claim = why.contains("persistentvolumeclaim");
        let reason = if no_claim { Reason::ClaimNotFound } else { Reason::Inspecting };
        return (reason, format!("the inspect Job waits for a node: {why}"));
    }
    for container in containers(pod) {
        if let Some((reason, words)) = kept_waiting(container) {
            let message = format!("container {} waits: {words}", container.name);
            return (reason.unwrap_or(Reason::Inspecting), message);
        }
        if container.state.as_ref().is_some_and(|state| state.running.is_some()) {
            return match container.name.as_str() {
                "fetch" => (Reason::Downloading, "downloading the model".to_owned()),
                _ => inspecting("inspecting the model"),
            };
        }
    }
    match unmounted(pod, now) {
        Some(message) => (Reason::VolumeNotMounted, message),
        None => inspecting("the inspect Job starts"),
    }
}

/// A Job says nothing of pods that nobody lets it make; its events do.
fn podless(job: &Job, now: Timestamp) -> String {
    let name = job.name_any();
    match pod_patience_left(job, now) {
        Some(left) if left.is_zero() => format!(
            "the inspect Job {name} has had no pod for more than {} s: a quota, the pod security level or a webhook \
             of the namespace may refuse it; `kubectl describe job {name}` has the API server's words",
            POD_PATIENCE.as_secs()
        ),
        _ => "the inspect Job has no pod yet".to_owned(),
    }
}

/// How long a Job without a pod may still wait for one before that is told; zero from then on.
pub fn pod_patience_left(job: &Job, now: Timestamp) -> Option<Duration> {
    Some(left(POD_PATIENCE, job.metadata.creation_timestamp.as_ref()?.0, now))
}

/// Of a patience that began at `since`; all of it where the clock is behind.
fn left(patience: Duration, since: Timestamp, now: Timestamp) -> Duration {
    let passed = Duration::try_from(now.duration_since(since)).unwrap_or_default();
    patience.saturating_sub(passed)
}

/// The kubelet's words where it cannot start a container, and the reason where they tell one. None while all goes well.
pub fn kept_waiting(container: &ContainerStatus) -> Option<(Option<Reason>, String)> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let word = waiting.reason.as_deref()?;
    let message = waiting.message.as_deref().unwrap_or_default();
    let reason = match word {
        "PodInitializing" | "ContainerCreating" | "CrashLoopBackOff" => return None,
        "ImagePullBackOff" | "ErrImagePull" | "InvalidImageName" | "ErrImageNeverPull" => {
            Some(Reason::ImagePullFailed)
        }
        // `secret "x" not found`, `couldn't find key y in Secret z`.
        "CreateContainerConfigError" if message.to_lowercase().contains("secret") => {
            Some(Reason::SecretNotFound)
        }
        _ => None,
    };
    let words = if message.is_empty() { word.to_owned() } else { format!("{word}: {message}") };
    Some((reason, words))
}

/// What is to be said of a pod whose volumes do not come, once it has had its time.
pub fn unmounted(pod: &Pod, now: Timestamp) -> Option<String> {
    if !mount_patience_left(pod, now)?.is_zero() {
        return None;
    }
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let named: Vec<String> = volumes.filter_map(from_elsewhere).collect();
    let named = if named.is_empty() { "none by name".to_owned() } else { named.join(", ") };
    let name = pod.name_any();
    Some(format!(
        "pod {name} has a node and has waited more than {} s for its volumes: {named}; \
         `kubectl describe pod {name}` says which is missing or held elsewhere",
        MOUNT_PATIENCE.as_secs()
    ))
}

/// How long a pod may still wait for its volumes before that is told; zero from then on. None where it waits for none:
/// the kubelet makes a pod's sandbox once they are all mounted, and says so in a condition.
pub fn mount_patience_left(pod: &Pod, now: Timestamp) -> Option<Duration> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let since = |kind: &str, status: &str| {
        let held = conditions.iter().find(|held| held.type_ == kind && held.status == status)?;
        held.last_transition_time.as_ref().map(|time| time.0)
    };
    let started = containers(pod).iter().any(|container| {
        let states = [container.state.as_ref(), container.last_state.as_ref()];
        states.into_iter().flatten().any(|held| held.running.is_some() || held.terminated.is_some())
    });
    if started {
        return None;
    }
    let since = since("PodScheduled", "True")?.max(since("PodReadyToStartContainers", "False")?);
    Some(left(MOUNT_PATIENCE, since, now))
}

/// What a volume needs that may be missing, as a person would name it.
fn from_elsewhere(volume: &Volume) -> Option<String> {
    if let Some(secret) = &volume.secret {
        let keys: Vec<_> = secret.items.iter().flatten().map(|item| item.key.as_str()).collect();
        let name = secret.secret_name.as_deref().unwrap_or_default();
        return Some(match keys[..] {
            [] => format!("Secret {name}"),
            _ => format!("Secret {name} (key {})", keys.join(", ")),
        });
    }
    if let Some(claim) = &volume.persistent_volume_claim {
        return Some(format!("claim {}", claim.claim_name));
    }
    volume.config_map.as_ref().map(|map| format!("ConfigMap {}", map.name))
}

/// The scheduler's words, where it found no node.
pub fn unschedulable(pod: &Pod) -> Option<&str> {
    let held = scheduling(pod).filter(|held| held.status != "True")?;
    held.message.as_deref().or(held.reason.as_deref())
}

/// What the scheduler made of the pod.
pub fn scheduling(pod: &Pod) -> Option<&PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|held| held.type_ == "PodScheduled")
}

#[cfg(test)]
mod tests;

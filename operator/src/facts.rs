//! In: what the cluster holds for one model source. Out: what is known of the model, or what stands in the way. Pure.
//! Never here: reading a checkpoint (the engine's `inspect` does), a secret, a write.

use std::sync::Arc;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use plimsoll_contract::exit::{ExitReason, ExitReport};
use plimsoll_contract::facts::ModelFacts;

use crate::desired::model::FACTS_KEY;
use crate::fields::digest;
use crate::observe::SeenModel;
use crate::spec::{Source, Spec};

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
    Looking { message: String },
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
pub fn look(seen: &SeenModel, downloads: bool) -> Model {
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
    Model::Looking { message: progress(&seen.job_pods) }
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
    Model::Failed { report: ExitReport { reason: ExitReason::Internal, message }, retry: true }
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
fn progress(pods: &[Arc<Pod>]) -> String {
    let Some(pod) = pods.iter().max_by_key(|pod| pod.metadata.creation_timestamp.clone()) else {
        return "the inspect Job has no pod yet".to_owned();
    };
    if let Some(why) = unschedulable(pod) {
        return format!("the inspect Job waits for a node: {why}");
    }
    for container in containers(pod) {
        let Some(state) = &container.state else { continue };
        if let Some(waiting) = &state.waiting {
            let reason = waiting.reason.as_deref().unwrap_or("Waiting");
            if reason != "PodInitializing" && reason != "ContainerCreating" {
                let message = waiting.message.as_deref().unwrap_or_default();
                return format!("container {} waits: {reason} {message}", container.name);
            }
        }
        if state.running.is_some() {
            return match container.name.as_str() {
                "fetch" => "downloading the model".to_owned(),
                _ => "inspecting the model".to_owned(),
            };
        }
    }
    "the inspect Job starts".to_owned()
}

/// The scheduler's words, where it found no node.
pub fn unschedulable(pod: &Pod) -> Option<&str> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let held = conditions.iter().find(|held| held.type_ == "PodScheduled")?;
    if held.status == "True" {
        return None;
    }
    held.message.as_deref().or(held.reason.as_deref())
}

#[cfg(test)]
mod tests;

//! In: the pods of one object. Out: how many run the revision that counts, how many answer, and what keeps the others.
//! Pure. Logs are never read: an engine that ends says why in its termination message.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use plimsoll_contract::exit::ExitReport;
use plimsoll_crds::Reason;

use crate::desired::names;
use crate::facts::{
    containers, kept_waiting, mount_patience_left, scheduling, unmounted, unschedulable,
};

/// Restarts without a word after which we speak of a loop.
const SILENT_RESTARTS_MAX: i32 = 3;

/// The pods of one object, counted.
#[derive(Debug, Default)]
pub struct Engines {
    /// Of the revision that counts; pods that are leaving do not.
    pub current: usize,
    pub scheduled: usize,
    pub ready: usize,
    /// Of other revisions.
    pub older: usize,
    pub older_ready: usize,
    /// The scheduler's words about a current pod without a node.
    pub unschedulable: Option<String>,
    /// What keeps a current pod from being ready.
    pub trouble: Option<(Reason, String)>,
}

impl Engines {
    /// Everything that runs is of the revision that counts, and as much of it answers as was asked for.
    pub fn settled(&self, replicas: u32) -> bool {
        self.older == 0 && self.ready >= replicas as usize
    }
}

pub fn engines(pods: &[Arc<Pod>], revision_hash: Option<&str>, now: Timestamp) -> Engines {
    let mut seen = Engines::default();
    for pod in pods.iter().filter(|pod| stays(pod)) {
        let ready = is_ready(pod);
        let current = pod.labels().get(names::REVISION).map(String::as_str) == revision_hash
            && revision_hash.is_some();
        if !current {
            seen.older += 1;
            seen.older_ready += usize::from(ready);
            continue;
        }
        seen.current += 1;
        seen.ready += usize::from(ready);
        let has_node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        seen.scheduled += usize::from(has_node);
        if !has_node && seen.unschedulable.is_none() {
            seen.unschedulable = unschedulable(pod).map(str::to_owned);
        }
        if !ready {
            seen.trouble = worse(seen.trouble, trouble(pod, now));
        }
    }
    seen
}

/// Pods that answer, of whatever revision, with the time since when.
pub fn answering(pods: &[Arc<Pod>]) -> Vec<(&Pod, Option<Timestamp>)> {
    let answering = pods.iter().map(Arc::as_ref).filter(|pod| stays(pod) && is_ready(pod));
    let since = |pod: &Pod| {
        let conditions = pod.status.as_ref()?.conditions.as_ref()?;
        let ready = conditions.iter().find(|held| held.type_ == "Ready")?;
        ready.last_transition_time.as_ref().map(|time| time.0)
    };
    answering.map(|pod| (pod, since(pod))).collect()
}

/// Pods of one revision that stay.
pub fn of_revision<'a>(pods: &'a [Arc<Pod>], hash: &str) -> impl Iterator<Item = &'a Arc<Pod>> {
    let hash = hash.to_owned();
    pods.iter().filter(move |pod| stays(pod) && pod.labels().get(names::REVISION) == Some(&hash))
}

/// Since when the pod that waits longest is told that no node takes it.
pub fn waits_for_node_since(pods: &[Arc<Pod>], hash: &str) -> Option<Timestamp> {
    let told = of_revision(pods, hash).filter_map(|pod| scheduling(pod));
    let refused = told.filter(|held| held.status == "False");
    refused.filter_map(|held| held.last_transition_time.as_ref()).map(|time| time.0).min()
}

/// Neither leaving nor over.
fn stays(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
}

/// Neither at work nor in trouble yet: nobody refused it a node, and none of its containers has anything to say.
pub fn is_coming(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let containers =
        pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    let has_begun = |held: &ContainerStatus| {
        kept_waiting(held).is_some()
            || held.restart_count > 0
            || held.state.as_ref().is_some_and(|state| state.waiting.is_none())
    };
    stays(pod)
        && matches!(phase, None | Some("Pending"))
        && unschedulable(pod).is_none()
        && !containers.into_iter().any(has_begun)
}

pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|held| held.type_ == "Ready" && held.status == "True")
}

/// What needs a person is told before what may pass.
fn worse(
    one: Option<(Reason, String)>,
    other: Option<(Reason, String)>,
) -> Option<(Reason, String)> {
    match (one, other) {
        (Some(one), Some(other)) if other.0.needs_a_person() && !one.0.needs_a_person() => {
            Some(other)
        }
        (one, other) => one.or(other),
    }
}

fn trouble(pod: &Pod, now: Timestamp) -> Option<(Reason, String)> {
    let of_containers =
        containers(pod).into_iter().find_map(|container| of_container(pod, container));
    of_containers.or_else(|| Some((Reason::VolumeNotMounted, unmounted(pod, now)?)))
}

/// When to look again at pods of which no watch tells that they wait too long for their volumes.
pub fn look_again(pods: &[Arc<Pod>], now: Timestamp) -> Option<Duration> {
    let left = pods.iter().filter(|pod| stays(pod)).filter_map(|pod| mount_patience_left(pod, now));
    left.filter(|left| !left.is_zero()).min()
}

fn of_container(pod: &Pod, container: &ContainerStatus) -> Option<(Reason, String)> {
    let pod = pod.name_any();
    let state = container.state.as_ref();
    if let Some((reason, words)) = kept_waiting(container) {
        return Some((reason.unwrap_or(Reason::EngineLoading), format!("pod {pod}: {words}")));
    }
    let waiting = state.and_then(|state| state.waiting.as_ref());
    let waits_for = waiting.and_then(|waiting| waiting.reason.as_deref()).unwrap_or_default();
    let last = container.last_state.as_ref().and_then(|last| last.terminated.as_ref());
    let ended = state.and_then(|state| state.terminated.as_ref()).or(last)?;
    if ended.exit_code == 0 {
        return None;
    }
    if let Some(report) =
        ended.message.as_deref().and_then(|text| serde_json::from_str::<ExitReport>(text).ok())
    {
        return Some((report.reason.into(), report.message));
    }
    if ended.reason.as_deref() == Some("OOMKilled") {
        let message = format!(
            "pod {pod}: container {} was killed for using more memory than its limit: raise spec.resources.memory, which is that limit",
            container.name
        );
        return Some((Reason::OutOfDeviceMemory, message));
    }
    (container.restart_count >= SILENT_RESTARTS_MAX || waits_for == "CrashLoopBackOff").then(|| {
        let message = format!(
            "pod {pod}: container {} ended {} times, last with code {}",
            container.name, container.restart_count, ended.exit_code
        );
        (Reason::EngineCrashLooping, message)
    })
}

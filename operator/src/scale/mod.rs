//! How many replicas: `watch` asks Prometheus about all scaled objects together, `query` → `signals` → `decide` make a
//! decision of the answers, within `bounds`; the reconcile writes it into status before anything follows from it.
//!
//! Here stands what the loop and the reconcile hand to each other. Never here: a read, a write.

pub mod bounds;
pub mod decide;
pub mod prometheus;
mod query;
pub mod signals;
pub mod watch;

#[cfg(test)]
mod rivals;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Mutex;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use plimsoll_crds::{
    DECISIONS_MAX, PlanStatus, ReplicaCapacity, ScalingDecision, ScalingStatus, bounded,
};

use crate::scale::decide::{Capacity, Change, Kept, TooFew};
use crate::spec::{Scaling, Spec};
use crate::status::Said;

/// What the loop last made of one object.
#[derive(Clone, Debug, PartialEq)]
pub struct Advice {
    /// Once it has decided something; it stands above what status holds.
    pub scaling: Option<ScalingStatus>,
    /// What ScalingActive is to say; none before enough is known to say anything.
    pub said: Option<Said>,
}

/// What the loop made of each object, for the reconcile to write down.
#[derive(Default)]
pub struct Advices(Mutex<HashMap<String, Advice>>);

impl Advices {
    /// By the object's uid, which no later object of its name has.
    pub fn of(&self, uid: &str) -> Option<Advice> {
        self.0.lock().expect("no holder panics").get(uid).cloned()
    }

    /// True where this is news.
    fn set(&self, uid: &str, advice: Advice) -> bool {
        let mut all = self.0.lock().expect("no holder panics");
        all.insert(uid.to_owned(), advice.clone()).as_ref() != Some(&advice)
    }

    fn keep(&self, is_there: impl Fn(&str) -> bool) {
        self.0.lock().expect("no holder panics").retain(|uid, _| is_there(uid));
    }
}

/// Where an object stands whose scaling has not begun, or was lost with its status: with the pods that there are.
pub fn begin(scaling: &Scaling, deployed: Option<u32>) -> ScalingStatus {
    let desired = deployed.unwrap_or(0).clamp(scaling.min, scaling.max.max(scaling.min));
    ScalingStatus {
        desired: number(desired),
        why: "it begins with the replicas there are, within spec.scaling".to_owned(),
        limit: None,
        capacity: None,
        recent: Vec::new(),
    }
}

/// Replicas to run, and what keeps them from being more. Suspended, none.
pub fn replicas(
    spec: &Spec,
    scaling: Option<&ScalingStatus>,
    plan: Option<&PlanStatus>,
) -> (u32, Option<String>) {
    if spec.suspend {
        return (0, None);
    }
    let wanted = match scaling {
        Some(scaling) => u32::try_from(scaling.desired).unwrap_or(0),
        None => spec.replicas,
    };
    match plan.and_then(|plan| bounds::gpu_budget(spec, plan)) {
        Some((most, why)) if most < wanted => (most, Some(why)),
        _ => (wanted, None),
    }
}

/// What of `scaling` the loop goes on from. What was seen of another revision says nothing of this one.
fn kept(scaling: &ScalingStatus, revision: Option<&str>) -> Kept {
    let capacity = scaling.capacity.as_ref().filter(|seen| seen.revision.as_deref() == revision);
    let replicas = |number: i32| u32::try_from(number).unwrap_or(0);
    let recent = scaling.recent.iter().map(|made| Change {
        at: made.at.0.as_second(),
        from: replicas(made.from),
        to: replicas(made.to),
    });
    Kept {
        desired: replicas(scaling.desired),
        too_few: TooFew::among(&recent.collect::<Vec<_>>()),
        decided_at: scaling.recent.first().map_or(0, |last| last.at.0.as_second()),
        capacity: capacity.map(|seen| Capacity {
            requests_per_second: seen.requests_per_hour as f64 / 3600.0,
            seen_at: seen.at.0.as_second(),
        }),
    }
}

/// `before` with one decision more.
fn decided(
    before: &ScalingStatus,
    to: u32,
    why: &str,
    capacity: Option<Capacity>,
    revision: Option<&str>,
    now: i64,
) -> ScalingStatus {
    let why = bounded(why);
    let last =
        ScalingDecision { at: time(now), from: before.desired, to: number(to), why: why.clone() };
    let earlier = before.recent.iter().take(DECISIONS_MAX - 1).cloned();
    ScalingStatus {
        desired: number(to),
        why,
        limit: None,
        capacity: capacity.map(|capacity| ReplicaCapacity {
            requests_per_hour: (capacity.requests_per_second * 3600.0).round() as i64,
            at: time(capacity.seen_at),
            revision: revision.map(str::to_owned),
        }),
        recent: std::iter::once(last).chain(earlier).collect(),
    }
}

/// The scaling that stands: what the loop has decided, else what status holds, else what there is.
pub fn standing(
    scaling: &Scaling,
    advice: Option<&Advice>,
    status: Option<&ScalingStatus>,
    deployed: Option<u32>,
) -> ScalingStatus {
    let known = advice.and_then(|advice| advice.scaling.as_ref()).or(status);
    known.cloned().unwrap_or_else(|| begin(scaling, deployed))
}

fn number(replicas: u32) -> i32 {
    i32::try_from(replicas).unwrap_or(i32::MAX)
}

fn time(seconds: i64) -> Time {
    Time(Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH))
}

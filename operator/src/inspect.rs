//! In: a model source and who needs it. Out: the cluster holding what it takes to know the model (claim, Job and
//! its NetworkPolicy, facts), and what is known by now. Never here: what the facts mean. The objects belong to all
//! LLMDeployments of one source: the first creates them, the others join as owners, many in one write where they come at
//! once, the last to leave takes them along.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use serde_json::Value;

use crate::apply::{ApplyError, Owner, Want, Writer};
use crate::desired::model::{self, Place};
use crate::desired::{Identity, Settings, names, network_policy};
use crate::facts::{self, Model, pod_patience_left};
use crate::observe::{Cached, Caches, SeenModel};
use crate::pods;
use crate::spec::Spec;

/// A Job that failed for a passing reason is tried again after this.
pub const RETRY_AFTER: Duration = Duration::from_secs(300);
/// One that is complete and whose pod does not tell: somebody deleted the pod, or its watch is behind for a moment.
const TELL_PATIENCE: Duration = Duration::from_secs(10);
/// Looks of one step. Each after the first is due to a write of another between two of ours.
const LOOKS_MAX: usize = 4;
/// Clocks of one cluster differ by less.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);

/// Whose model, which, and where it is to lie.
pub struct Wanted<'a> {
    pub identity: &'a Identity,
    pub spec: &'a Spec,
    pub key: &'a str,
    pub place: &'a Place,
    /// What a revision has pinned; none while the source is met for the first time.
    pub commit: Option<&'a str>,
    pub settings: &'a Settings,
}

/// Steps towards knowing the model, as far as they go without waiting for the cluster, and what is known after them.
pub async fn step(
    writer: &Writer<'_>,
    wanted: &Wanted<'_>,
    clock: &(dyn Fn() -> Timestamp + Send + Sync),
) -> Result<Model, ApplyError> {
    let mut last = Model::Unseen;
    for _ in 0..LOOKS_MAX {
        let look = Look::of(writer, wanted, clock());
        match look.act().await? {
            Next::Done => return Ok(look.model),
            Next::LookAgain => last = look.model,
        }
    }
    // Others were faster at each turn; what they wrote brings us back.
    Ok(last)
}

/// What comes after one look and what it led to.
enum Next {
    Done,
    /// While this wrote, or waited for its turn, the cluster became another.
    LookAgain,
}

/// What is there of a model at one moment, and who asks.
struct Look<'a> {
    writer: &'a Writer<'a>,
    wanted: &'a Wanted<'a>,
    seen: SeenModel,
    model: Model,
    now: Timestamp,
}

impl<'a> Look<'a> {
    fn of(writer: &'a Writer<'a>, wanted: &'a Wanted<'a>, now: Timestamp) -> Look<'a> {
        let seen = writer.caches.observe_model(&wanted.identity.namespace, wanted.key);
        let model = facts::look(&seen, wanted.downloads(), now);
        Look { writer, wanted, seen, model, now }
    }

    /// Whether another look would find the same kind of thing.
    fn still_holds(&self) -> bool {
        let now = Look::of(self.writer, self.wanted, self.now);
        std::mem::discriminant(&now.model) == std::mem::discriminant(&self.model)
    }

    async fn act(&self) -> Result<Next, ApplyError> {
        let Look { writer, wanted, seen, model, .. } = self;
        let outgrown = seen.job.as_ref().is_some_and(|job| wanted.outgrew(job));
        match model {
            Model::Unseen => return self.begin().await,
            Model::Looking { .. } if !outgrown => return self.join().await,
            Model::Told(facts) => {
                if let Some(unreadable) = &seen.facts {
                    writer.delete(unreadable.as_ref()).await?;
                }
                let (namespace, owners) = (&wanted.identity.namespace, wanted.owners());
                let source = wanted.spec.source.to_string();
                let kept = model::facts(namespace, wanted.key, &owners, &source, facts);
                create_or_join(writer, wanted, kept).await?;
            }
            // Whoever goes on using the model takes a share in its facts at the end of the pass.
            Model::Looking { .. } | Model::Known(_) | Model::Failed { .. } => {}
        }
        let Some(job) = &seen.job else { return Ok(Next::Done) };
        // Facts that the Job has told are stored by now.
        if facts::is_spent(model, outgrown, retry_in(job, self.now).is_zero()) {
            // Pods of an outgrown Job may still run: its policy stands around them, and then around those of the next.
            let is_over = !matches!(model, Model::Looking { .. });
            if let Some(policy) = seen.policy.as_ref().filter(|_| is_over) {
                writer.delete(policy.as_ref()).await?;
            }
            writer.delete(job.as_ref()).await?;
            // Who outgrew a Job makes the next: another would make it as it was.
            return Ok(if outgrown { Next::LookAgain } else { Next::Done });
        }
        // Only its owners hear when somebody deletes it so that it is tried again.
        let name = names::inspect_job(wanted.key);
        join_present::<Job>(writer, wanted.identity, &name).await?;
        Ok(Next::Done)
    }

    /// Nobody has looked yet, or what there was is lost.
    async fn begin(&self) -> Result<Next, ApplyError> {
        let Look { writer, wanted, seen, .. } = self;
        if wanted.downloads() {
            // Facts say that a download is whole; this one is not.
            if let Some(facts) = &seen.facts {
                writer.delete(facts.as_ref()).await?;
            }
            create_or_join(writer, wanted, wanted.claim()).await?;
        }
        let policy = wanted.policy();
        if let Some(held) = seen.policy.as_ref().filter(|held| !policy.is_like(held.as_ref())) {
            // Of a Job that was made by other settings.
            writer.delete(held.as_ref()).await?;
        }
        create_or_join(writer, wanted, policy).await?;
        if !self.still_holds() {
            return Ok(Next::LookAgain);
        }
        create_or_join(writer, wanted, wanted.job()).await?;
        Ok(Next::Done)
    }

    /// A Job is on its way. Of what it says while this waits for a turn, only those who had a share by then hear.
    async fn join(&self) -> Result<Next, ApplyError> {
        let Look { writer, wanted, .. } = self;
        let (identity, key) = (wanted.identity, wanted.key);
        join_present::<PersistentVolumeClaim>(writer, identity, &names::model(key)).await?;
        create_or_join_while(writer, wanted, wanted.policy(), || self.still_holds()).await?;
        if self.still_holds() {
            join_present::<Job>(writer, identity, &names::inspect_job(key)).await?;
        }
        Ok(if self.still_holds() { Next::Done } else { Next::LookAgain })
    }
}

/// How long until a Job that ended without the facts is tried again. A clock that is behind the cluster's cannot tell
/// how long ago that was; then it is tried at once.
fn retry_in(job: &Job, now: Timestamp) -> Duration {
    let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ended = conditions.filter(|held| held.status == "True").find_map(|held| {
        let patience = match held.type_.as_str() {
            "Failed" => RETRY_AFTER,
            "Complete" => TELL_PATIENCE,
            _ => return None,
        };
        Some((patience, held.last_transition_time.as_ref()?.0))
    });
    let Some((patience, ended_at)) = ended else { return RETRY_AFTER };
    let passed = now.duration_since(ended_at);
    let is_behind = passed.unsigned_abs() > CLOCK_TOLERANCE && passed.is_negative();
    let passed = Duration::try_from(passed).unwrap_or_default();
    if is_behind { Duration::ZERO } else { patience.saturating_sub(passed) }
}

/// Takes a share in the model of what stands, and gives up those in all others: at once in Jobs and in what was known, but
/// in downloads and what is known of them only when `settled`, since until then pods of an older revision may serve from them.
pub async fn belong(
    writer: &Writer<'_>,
    identity: &Identity,
    key: &str,
    settled: bool,
) -> Result<(), ApplyError> {
    share(writer, identity, key).await?;
    leave_kind::<Job>(writer, identity, key, |_| true).await?;
    leave_kind::<NetworkPolicy>(writer, identity, key, |_| true).await?;
    // Facts say that a download is whole, and bear its name.
    let downloaded = |facts: &ConfigMap| {
        let namespace = identity.namespace.as_str();
        writer.caches.holds::<PersistentVolumeClaim>(namespace, &facts.name_any())
    };
    leave_kind::<ConfigMap>(writer, identity, key, |facts| settled || !downloaded(facts)).await?;
    leave_kind::<PersistentVolumeClaim>(writer, identity, key, |_| settled).await?;
    let (caches, namespace) = (writer.caches, identity.namespace.as_str());
    // A policy without a Job is left over; whoever is about to make a Job has no facts.
    let name = names::inspect_job(key);
    let is_over = caches.holds::<ConfigMap>(namespace, &names::model(key))
        && !caches.holds::<Job>(namespace, &name);
    match caches.get::<NetworkPolicy>(namespace, &name).filter(|_| is_over) {
        Some(policy) => writer.delete(policy.as_ref()).await,
        None => Ok(()),
    }
}

/// Takes a share in what is known of a model and in its download, where they are there.
pub async fn share(writer: &Writer<'_>, identity: &Identity, key: &str) -> Result<(), ApplyError> {
    join_present::<ConfigMap>(writer, identity, &names::model(key)).await?;
    join_present::<PersistentVolumeClaim>(writer, identity, &names::model(key)).await?;
    Ok(())
}

async fn leave_kind<K: Cached>(
    writer: &Writer<'_>,
    identity: &Identity,
    used: &str,
    may_go: impl Fn(&K) -> bool,
) -> Result<(), ApplyError> {
    let unused = |held: &Arc<K>| {
        let key = held.labels().get(names::MODEL);
        key.is_some_and(|key| key != used)
            && held.owner_references().iter().any(|owner| owner.uid == identity.uid)
            && may_go(held)
    };
    let held = || writer.caches.shared_by::<K>(&identity.namespace, &identity.uid);
    if !held().iter().any(unused) {
        return Ok(());
    }
    let _turn = writer.sharing.turn().await;
    for held in held().into_iter().filter(unused) {
        let others: Vec<OwnerReference> = held
            .owner_references()
            .iter()
            .filter(|owner| owner.uid != identity.uid)
            .cloned()
            .collect();
        if others.is_empty() {
            writer.delete(held.as_ref()).await?;
        } else {
            writer.set_owners(held.as_ref(), &others).await?;
        }
    }
    Ok(())
}

/// Creates a shared object, or joins its owners where another was first.
async fn create_or_join<K: Cached>(
    writer: &Writer<'_>,
    wanted: &Wanted<'_>,
    want: Want<K>,
) -> Result<(), ApplyError> {
    create_or_join_while(writer, wanted, want, || true).await
}

/// The same while it is wanted: others may take it away between two looks.
async fn create_or_join_while<K: Cached>(
    writer: &Writer<'_>,
    wanted: &Wanted<'_>,
    want: Want<K>,
    is_wanted: impl Fn() -> bool,
) -> Result<(), ApplyError> {
    for _ in 0..LOOKS_MAX {
        if !is_wanted()
            || writer.create(&want, Owner::Model { key: wanted.key }).await?
            || join_present::<K>(writer, wanted.identity, want.name()).await?
        {
            return Ok(());
        }
    }
    // It stands, and the watch has not shown it: the next pass joins.
    Ok(())
}

/// Whether it is there and ours too.
async fn join_present<K: Cached>(
    writer: &Writer<'_>,
    identity: &Identity,
    name: &str,
) -> Result<bool, ApplyError> {
    let uid = &identity.uid;
    let joined = |live: &Arc<K>| live.owner_references().iter().any(|owner| &owner.uid == uid);
    let cached = || writer.caches.get::<K>(&identity.namespace, name);
    let Some(live) = cached() else { return Ok(false) };
    if joined(&live) {
        return Ok(true);
    }
    let own = serde_json::from_value(identity.co_owner()).expect("an owner reference is one");
    let wish = writer.sharing.want::<K>(&identity.namespace, name, own);
    let _turn = writer.sharing.turn().await;
    for _ in 0..LOOKS_MAX {
        let Some(live) = cached() else { return Ok(false) };
        // Who had the turn before may have written for us.
        if joined(&live) {
            return Ok(true);
        }
        let mut owners = live.owner_references().to_vec();
        for other in wish.with_others() {
            if !owners.iter().any(|owner| owner.uid == other.uid) {
                owners.push(other);
            }
        }
        if writer.set_owners(live.as_ref(), &owners).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Wanted<'_> {
    fn downloads(&self) -> bool {
        matches!(self.place, Place::Download { .. })
    }

    fn owners(&self) -> Vec<Value> {
        vec![self.identity.co_owner()]
    }

    fn claim(&self) -> Want<PersistentVolumeClaim> {
        let namespace = &self.identity.namespace;
        model::claim(namespace, self.key, &self.owners(), &self.spec.storage)
    }

    fn policy(&self) -> Want<NetworkPolicy> {
        let Wanted { identity, spec, key, settings, .. } = *self;
        let owners = self.owners();
        network_policy::of_inspect(&identity.namespace, key, &owners, &spec.source, settings)
    }

    fn job(&self) -> Want<Job> {
        let Wanted { identity, spec, key, place, commit, settings } = *self;
        model::inspect_job(&identity.namespace, key, &self.owners(), spec, place, commit, settings)
    }

    /// Whether this object made the Job from something else than it would now: another image, other credentials. A Job
    /// that another object of the same source made is left alone, or the two would take turns for ever.
    fn outgrew(&self, job: &Job) -> bool {
        let Some(made_for) = job.annotations().get(names::MADE_FOR) else { return false };
        let wanted = self.job();
        let mine = made_for.split('/').next() == Some(self.identity.uid.as_str());
        mine && wanted.annotation(names::MADE_FOR) != Some(made_for.as_str())
    }
}

/// True where the claim of a download is gone, or is not known to be whole: facts are stored once it is.
pub fn is_lost(caches: &Caches, namespace: &str, key: &str) -> bool {
    let model = names::model(key);
    !caches.holds::<PersistentVolumeClaim>(namespace, &model)
        || !caches.holds::<ConfigMap>(namespace, &model)
        || caches.holds::<Job>(namespace, &names::inspect_job(key))
}

/// When to look again at a model that is not known, where no watch will tell.
pub fn again(
    model: &Model,
    caches: &Caches,
    namespace: &str,
    key: &str,
    now: Timestamp,
) -> Option<Duration> {
    let job = caches.get::<Job>(namespace, &names::inspect_job(key));
    if let Model::Looking { .. } = model {
        let pods = caches.pods_with(namespace, names::MODEL, key);
        let left = job.filter(|_| pods.is_empty()).and_then(|job| pod_patience_left(&job, now));
        return left.filter(|left| !left.is_zero()).or_else(|| pods::look_again(&pods, now));
    }
    let Model::Failed { retry: true, .. } = model else { return None };
    Some(job.map_or(Duration::ZERO, |job| retry_in(&job, now)).max(Duration::from_secs(1)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_job_without_facts_is_tried_again_after_a_while_whatever_the_clock_says() {
        let retry_after = |kind: &str, passed: i64| {
            let ended: Timestamp = "2026-01-01T12:00:00Z".parse().unwrap();
            let job = json!({"status": {"conditions": [
                {"type": "SuccessCriteriaMet", "status": "True", "lastTransitionTime": "2020-01-01T00:00:00Z"},
                {"type": kind, "status": "True", "lastTransitionTime": ended.to_string()}]}});
            let job: Job = serde_json::from_value(job).unwrap();
            retry_in(&job, Timestamp::from_second(ended.as_second() + passed).unwrap()).as_secs()
        };
        assert_eq!([0, 299, 300, 9000].map(|passed| retry_after("Failed", passed)), [300, 1, 0, 0]);
        assert_eq!([0, 9, 10, 9000].map(|passed| retry_after("Complete", passed)), [10, 1, 0, 0]);
        assert_eq!([-60, -61, -7200].map(|passed| retry_after("Failed", passed)), [300, 0, 0]);
    }
}

//! One reconcile: spec → observe → facts → plan → revision → rollout → desired → apply → status. This file holds the order of the
//! steps and what each hands to the next; the steps themselves are the files of those names.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{Timestamp, Unit};
use kube::Client;
use kube::runtime::controller::Action;
use plimsoll_contract::facts::ModelFacts;
use plimsoll_crds::{
    ConditionType, LLMDeployment, LLMDeploymentStatus, OperatorUpgrade, REPLICAS_MAX, Reason,
    ScalingStatus,
};

use crate::apply::{Applied, ApplyError, Owner, Sharing, Taken, Writer};
use crate::decide::{self, Case};
use crate::desired::{self, Children, Identity, Settings, Surroundings, names, protection, reach};
use crate::events::{Repair, Teller};
use crate::measure::Measurements;
use crate::metrics::Metrics;
use crate::neighbours::Readings;
use crate::observe::{Caches, Seen};
use crate::plan::Prices;
use crate::revision::{self, Content, Revision};
use crate::rollout::{self, Rollout};
use crate::run::chain;
use crate::scale::{self, Advices};
use crate::spec::{Source, Spec};
use crate::status::{self, Findings, Said, Scaled};
use crate::{events, inspect, pods};

/// What stands in the way, with no watch to tell when it is gone, is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// A child of a deleted object of the same name is soon gone.
const LEAVING_AGAIN: Duration = Duration::from_secs(1);

/// No watch tells when other pods leave a node, or a quota changes.
pub const NEIGHBOURS_AGAIN: Duration = Duration::from_secs(5 * 60);
/// Objects of which is remembered what they were held against.
const CONSIDERED_MAX: usize = 100_000;

/// What every reconcile shares.
pub struct Context {
    pub client: Client,
    /// The only one that is watched, or the whole cluster.
    pub namespace: Option<String>,
    pub caches: Arc<Caches>,
    /// What the scaling loop decided.
    pub advices: Arc<Advices>,
    pub metrics: Arc<Metrics>,
    pub teller: Teller,
    pub settings: Settings,
    /// What an hour of a GPU costs, for plans by cost.
    pub prices: Prices,
    pub sharing: Sharing,
    pub taken: Taken,
    /// Tells the time, as far as status and patience need it.
    pub clock: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    pub considered: Considered,
    /// What others ask of nodes and quotas, while it is fresh.
    pub readings: Readings,
    pub measurements: Arc<Measurements>,
}

/// Which revision of which object was last held against which version of the nodes, so that a better plan is looked for only
/// when nodes change. Lost with the process: then all are looked at once.
#[derive(Default)]
pub struct Considered(std::sync::Mutex<HashMap<String, (u64, String)>>);

impl Considered {
    pub fn holds(&self, uid: &str, mark: &(u64, String)) -> bool {
        self.0.lock().expect("no holder panics").get(uid) == Some(mark)
    }

    pub fn note(&self, uid: &str, mark: (u64, String)) {
        let mut marks = self.0.lock().expect("no holder panics");
        // Nobody tells of objects that are gone.
        if marks.len() >= CONSIDERED_MAX {
            marks.clear();
        }
        marks.insert(uid.to_owned(), mark);
    }
}

/// How far a pass came; what it hands to status.
#[derive(Default)]
pub struct Pass {
    pub trouble: Option<Said>,
    pub model: Option<Said>,
    pub facts: Option<ModelFacts>,
    pub planned: Option<Said>,
    /// What stands after this pass.
    pub rollout: Option<Rollout>,
    /// The revision that answers to the spec, which stands unless it failed.
    pub current: Option<Revision>,
    /// Its children were seen to stand.
    pub stood: bool,
    /// They are the first of their object, and this pass made them: what is to be told of them is for the next look, behind
    /// the children of others that wait.
    pub began: bool,
    /// What was put right after another hand.
    pub repaired: Vec<Repair>,
    /// A plan that waits for a person.
    pub offered: Option<Revision>,
    /// Engines run out of memory, and no other plan helps: with what figures.
    pub exhausted: Option<String>,
    /// Pods to run, and what keeps them from being more.
    pub replicas: u32,
    pub held_to: Option<String>,
    pub scaling: Option<ScalingStatus>,
    /// When to look again without being told.
    pub again: Option<Duration>,
}

pub async fn reconcile(
    object: Arc<LLMDeployment>,
    context: Arc<Context>,
) -> Result<Action, ApplyError> {
    context.caches.ready().await;
    if object.metadata.deletion_timestamp.is_some() {
        // Owner references collect the children; nothing is left for us to do.
        return Ok(Action::await_change());
    }
    let started = Instant::now();
    let done = pass(&object, &context).await;
    context.metrics.reconciled(started.elapsed(), done.is_err());
    done
}

async fn pass(object: &LLMDeployment, context: &Context) -> Result<Action, ApplyError> {
    let identity = Identity::of(object);
    let spec = Spec::parse(object);
    let heeded = match &spec {
        Ok(_) => heed(object, &identity, context).await?,
        Err(_) => None,
    };
    let object = heeded.as_ref().unwrap_or(object);
    let replicas = u32::try_from(object.spec.replicas).unwrap_or(0);
    let mut pass = Pass {
        replicas: if object.spec.suspend { 0 } else { replicas },
        scaling: object.status.as_ref().and_then(|status| status.scaling.clone()),
        ..Pass::default()
    };
    let outcome = match spec {
        Ok(spec) => forward(object, &spec, &identity, context, &mut pass).await,
        Err(error) => {
            pass.trouble = Some(Said::no(Reason::InvalidSpec, error.to_string()));
            hold(object, &identity, context, &mut pass).await
        }
    };
    if let Err(error) = outcome
        && let Err(error) = pass.stopped_by(error)
    {
        if pass.trouble.is_none() {
            match in_force(object) {
                true => pass.recall(object),
                false => pass.trouble = Some(Said::no(Reason::Accepted, chain(&error))),
            }
        }
        let is_decided = pass.rollout.is_some() && pass.current.is_some();
        if pass.trouble.is_some() || is_decided {
            tell(object, &identity, context, &pass).await?;
        }
        return Err(error);
    }
    if pass.began {
        return Ok(Action::requeue(Duration::ZERO));
    }
    tell(object, &identity, context, &pass).await?;
    let pods = context.caches.pods_with(&identity.namespace, names::NAME, &identity.name);
    let again = pass.again.into_iter().chain(pods::look_again(&pods, context.now().0)).min();
    Ok(again.map_or_else(Action::await_change, Action::requeue))
}

/// Whether a pass has come to its end with this spec. A passing failure turns nothing that was told then; of a spec that
/// never came so far it is told.
fn in_force(object: &LLMDeployment) -> bool {
    let Some(status) = &object.status else { return false };
    let mut conditions = status.conditions.iter();
    let ready = conditions.find(|held| held.type_ == ConditionType::Ready.name());
    status.observed_generation == object.metadata.generation
        && ready.is_some_and(|ready| ready.reason != Reason::Accepted.name())
}

/// A decision of the scaling loop is written down before anything follows from it, so that an operator which ends in
/// between goes on from it. The object as it stands then; none where there is no such decision.
async fn heed(
    object: &LLMDeployment,
    identity: &Identity,
    context: &Context,
) -> Result<Option<LLMDeployment>, ApplyError> {
    let Some(before) = object.status.as_ref().filter(|status| status.scaling.is_some()) else {
        return Ok(None);
    };
    let advice = context.advices.of(&identity.uid).and_then(|advice| advice.scaling);
    if object.spec.scaling.is_none() || advice.is_none() || advice == before.scaling {
        return Ok(None);
    }
    let status = LLMDeploymentStatus { scaling: advice, ..before.clone() };
    context.writer().write_status(identity, &status).await?;
    context.teller.publish(object, &events::transitions(Some(before), &status)).await;
    Ok(Some(LLMDeployment { status: Some(status), ..object.clone() }))
}

/// What the cluster holds of the object, its revisions, and the hash of the one whose children stand.
fn look(
    object: &LLMDeployment,
    identity: &Identity,
    context: &Context,
) -> (Seen, Vec<Revision>, Option<String>) {
    let seen = context.caches.observe(&identity.namespace, &identity.name);
    let revisions = revision::committed(&seen.revisions, &identity.uid);
    let standing = revision::standing_hash(object, seen.deployment.as_deref());
    (seen, revisions, standing)
}

/// From a valid spec to the children.
async fn forward(
    object: &LLMDeployment,
    spec: &Spec,
    identity: &Identity,
    context: &Context,
    pass: &mut Pass,
) -> Result<(), ApplyError> {
    let (seen, revisions, standing) = look(object, identity, context);
    let digest = revision::spec_digest(&object.spec);
    let standing = standing.as_deref();
    let answering = revision::answering(&revisions, &digest, &spec.plan, standing);
    let outdated = |revision: &Revision| {
        spec.operator_upgrade == OperatorUpgrade::Follow
            && revision::is_outdated(revision, &context.settings.engine_image)
    };

    let deployed_replicas = asked_for(&seen);
    pass.scaling = spec.scaling.map(|scaling| {
        let advice = context.advices.of(&identity.uid);
        scale::standing(&scaling, advice.as_ref(), pass.scaling.as_ref(), deployed_replicas)
    });
    (pass.replicas, pass.held_to) = scale::replicas(spec, pass.scaling.as_ref(), None);

    let (digest, seen, revisions) = (digest.as_str(), &seen, revisions.as_slice());
    let case = Case { spec, digest, identity, seen, revisions, standing, context };
    let decided = match (barred(spec, &context.settings), answering) {
        (Some(barred), _) => {
            pass.trouble = Some(barred);
            Ok(None)
        }
        (None, Some(revision)) if !outdated(revision) => {
            decide::keep(&case, revision, pass).await.map(Some)
        }
        (None, held) => match (decide::decide(&case, pass).await, held) {
            // What cannot be made anew for this operator goes on as it is.
            (Ok(None), Some(held)) => decide::keep(&case, held, pass).await.map(Some),
            (made, _) => made,
        },
    };
    // What cannot be decided anew leaves what runs in place, and in repair.
    let failed = decided.map(|decided| pass.current = decided);
    roll(object, &case, pass).await?;
    failed
}

/// One step of the rollout to the revision that answers to the spec; without one, what runs is held.
async fn roll(object: &LLMDeployment, case: &Case<'_>, pass: &mut Pass) -> Result<(), ApplyError> {
    let Case { spec, identity, seen, revisions, standing, context, .. } = *case;
    let deployment = seen.deployment.as_deref();
    let planned = pass.current.as_ref().or(revision::running(revisions, standing));
    let plan = planned.map(|revision| &revision.content.plan);
    let (replicas, held_to) = scale::replicas(spec, pass.scaling.as_ref(), plan);
    (pass.replicas, pass.held_to) = (replicas, held_to);
    let around = Surroundings::of(spec, replicas, &context.settings);
    let now = context.now().0;
    let rollout = match &pass.current {
        Some(to) => Some(rollout::step(&rollout::Inputs {
            to,
            revisions,
            deployment,
            pods: &seen.pods,
            strategy: spec.strategy,
            replicas,
            now,
        })),
        None => revision::running(revisions, standing)
            .map(|running| rollout::hold(running, deployment, spec.strategy)),
    };
    let Some(rollout) = rollout else { return forget(revisions, None, None, case).await };
    pass.again = pass.again.into_iter().chain(rollout.again).min();
    pass.rollout = Some(rollout.clone());
    let (standing, good) = (&rollout.revision, rollout.memory.good.as_deref());
    if within_bounds(standing, identity, &context.settings) || fewer(seen, replicas) {
        let Content { model_key, shared_download, .. } = &standing.content;
        if *shared_download && deployment.is_none() {
            // Pods mount it: whoever shared it alone may leave before the next look.
            inspect::share(&context.writer(), identity, model_key).await?;
        }
        let stood = stand(object, &rollout, around, identity, context).await?;
        pass.repaired = stood.repaired;
        pass.stood = true;
        let told = object.status.as_ref().and_then(|status| status.observed_generation);
        pass.began = stood.deployment == Applied::Created && told.is_none();
    }
    if pass.began {
        return Ok(());
    }
    release(spec, seen, context).await;
    forget(revisions, Some(&standing.name), good, case).await?;
    if pass.current.as_ref() == Some(standing) {
        let engines = pods::engines(&seen.pods, Some(&standing.hash), now);
        let settled = engines.settled(replicas);
        let key = &standing.content.model_key;
        inspect::belong(&context.writer(), identity, key, settled).await?;
    }
    Ok(())
}

/// What runs goes on, and in repair, under a spec that cannot work, of which nothing else is followed.
async fn hold(
    object: &LLMDeployment,
    identity: &Identity,
    context: &Context,
    pass: &mut Pass,
) -> Result<(), ApplyError> {
    let (seen, revisions, standing) = look(object, identity, context);
    let is_standing = |revision: &&Revision| Some(&revision.hash) == standing.as_ref();
    let Some(running) = revisions.iter().find(is_standing) else { return Ok(()) };
    pass.replicas = held_replicas(object, &seen);
    let strategy = object.spec.rollout.as_ref().and_then(|rollout| rollout.strategy);
    let deployment = seen.deployment.as_deref();
    let rollout = rollout::hold(running, deployment, strategy.unwrap_or_default());
    pass.rollout = Some(rollout.clone());
    let around = Surroundings::held(&object.spec, pass.replicas, &context.settings);
    if within_bounds(running, identity, &context.settings) || fewer(&seen, pass.replicas) {
        pass.repaired = stand(object, &rollout, around, identity, context).await?.repaired;
        pass.stood = true;
    }
    Ok(())
}

/// As many pods as there are to be; where there are to be none, as the spec or its scaling had it.
fn held_replicas(object: &LLMDeployment, seen: &Seen) -> u32 {
    if object.spec.suspend {
        return 0;
    }
    let scaling = object.status.as_ref().and_then(|status| status.scaling.as_ref());
    let wanted = scaling.map_or(object.spec.replicas, |scaling| scaling.desired);
    let wanted = u32::try_from(wanted).unwrap_or(0).min(REPLICAS_MAX);
    asked_for(seen).filter(|deployed| *deployed > 0).unwrap_or(wanted)
}

/// Whether this operator may render a revision: one that was allowed once may reach out of its pods. Of such a one nothing
/// is rendered any more. What runs is left alone, so that starting the operator anew ends nothing that serves.
fn within_bounds(standing: &Revision, identity: &Identity, settings: &Settings) -> bool {
    settings.allow_host_path
        || !reach::template_reaches_out(&standing.content.pod_template, &identity.name)
}

/// Fewer pods than there are may always be asked for.
fn fewer(seen: &Seen, replicas: u32) -> bool {
    asked_for(seen).is_some_and(|asked_for| replicas < asked_for)
}

/// Pods that the Deployment is to have.
fn asked_for(seen: &Seen) -> Option<u32> {
    let replicas = seen.deployment.as_ref()?.spec.replicas?;
    u32::try_from(replicas).ok()
}

/// What a spec may not have under this operator: whatever reaches out of its pod.
fn barred(spec: &Spec, settings: &Settings) -> Option<Said> {
    if settings.allow_host_path {
        return None;
    }
    if matches!(spec.source, Source::File { .. }) {
        return Some(status::source_not_allowed());
    }
    let field = spec.pod_template.as_ref().and_then(reach::reaches_out)?;
    Some(status::overlay_not_allowed(&field))
}

/// What it took to make the children stand.
struct Stood {
    deployment: Applied,
    /// What another hand had changed.
    repaired: Vec<Repair>,
}

/// Children from the rollout's revision and nothing else.
async fn stand(
    object: &LLMDeployment,
    rollout: &Rollout,
    around: Surroundings<'_>,
    identity: &Identity,
    context: &Context,
) -> Result<Stood, ApplyError> {
    let writer = context.writer();
    let owner = Owner::Controller { uid: &identity.uid };
    let children = desired::children(identity, rollout, around);
    let budget = async {
        match &children.disruption_budget {
            // Whether it was there before depends on the number of replicas.
            Some(budget) => writer.apply(budget, owner).await.map(|applied| match applied {
                Applied::Created => Applied::Changed,
                applied => applied,
            }),
            None => writer.prune_budget(identity).await.map(|()| Applied::Unchanged),
        }
    };
    let account = writer.apply(&children.service_account, owner);
    let service = writer.apply(&children.service, owner);
    let policy = writer.apply(&children.network_policy, owner);
    let (account, service, policy, budget) = tokio::try_join!(account, service, policy, budget)?;
    let deployment = writer.apply(&children.deployment, owner).await?;
    monitor(&children, owner, context).await?;
    // A status that tells of this revision was written after its children stood.
    let stood = object.status.as_ref().and_then(|status| status.revision.as_ref());
    let stood = stood == Some(&rollout.revision.name);
    let budgeted = children.disruption_budget.as_ref();
    let repairs = [
        events::repair(&children.service_account, &account, stood),
        events::repair(&children.service, &service, stood),
        // One that an older operator did not make is no repair.
        events::repair(&children.network_policy, &policy, false),
        budgeted.and_then(|want| events::repair(want, &budget, stood)),
        events::repair(&children.deployment, &deployment, stood),
    ];
    Ok(Stood { deployment, repaired: repairs.into_iter().flatten().collect() })
}

/// Monitors and rules, where the cluster knows these kinds. That nobody watches keeps no model from serving.
async fn monitor(
    children: &Children,
    owner: Owner<'_>,
    context: &Context,
) -> Result<(), ApplyError> {
    let writer = context.writer();
    let monitors = async {
        match context.caches.pod_monitors.is_served() {
            true => writer.apply(&children.pod_monitor, owner).await,
            false => Ok(Applied::Unchanged),
        }
    };
    let rules = async {
        match context.caches.prometheus_rules.is_served() {
            true => writer.apply(&children.prometheus_rule, owner).await,
            false => Ok(Applied::Unchanged),
        }
    };
    let (monitors, rules) = tokio::join!(monitors, rules);
    for done in [monitors, rules] {
        match done {
            Err(error @ (ApplyError::Foreign { .. } | ApplyError::Refused { .. })) => {
                tracing::warn!(%error, "nobody watches over this object");
            }
            done => drop(done?),
        }
    }
    Ok(())
}

/// Pods that have come to answer are protected no more. Where that fails they serve all the same, and the next pass tries
/// again.
async fn release(spec: &Spec, seen: &Seen, context: &Context) {
    if protection::is_the_users(spec) {
        return;
    }
    for pod in protection::over(&seen.pods, &seen.nodes) {
        if let Err(error) = context.writer().release(pod.as_ref()).await {
            tracing::warn!(%error, "a pod that answers is still protected");
        }
    }
}

/// An end to revisions beyond the history.
async fn forget(
    revisions: &[Revision],
    standing: Option<&str>,
    good: Option<&str>,
    case: &Case<'_>,
) -> Result<(), ApplyError> {
    let Case { identity, context, .. } = *case;
    for name in revision::to_forget(revisions, standing, good) {
        if let Some(old) = context.caches.get::<ControllerRevision>(&identity.namespace, name) {
            context.writer().delete(old.as_ref()).await?;
        }
    }
    Ok(())
}

/// Whether the status names this revision already.
fn told_of(before: Option<&LLMDeploymentStatus>, standing: Option<&Revision>) -> bool {
    let told = before.and_then(|before| before.revision.as_ref());
    told.is_some() && told == standing.map(|standing| &standing.name)
}

/// Status as computed from what stands now, written where it changed, and the events of what turned.
async fn tell(
    object: &LLMDeployment,
    identity: &Identity,
    context: &Context,
    pass: &Pass,
) -> Result<(), ApplyError> {
    let seen = context.caches.observe(&identity.namespace, &identity.name);
    let advice = context.advices.of(&identity.uid);
    let replicas = pass.replicas;
    let before = object.status.as_ref();
    let standing = pass.rollout.as_ref().map(|rollout| &rollout.revision);
    let failed = pass.rollout.as_ref().zip(pass.current.as_ref());
    let failed = failed.and_then(|(rollout, to)| rollout.trouble(to));
    let rollout = pass.rollout.as_ref().zip(pass.current.as_ref()).map(|(rollout, to)| {
        let engines = pods::engines(&seen.pods, Some(&to.hash), context.now().0);
        let deployment = seen.deployment.as_deref();
        let seen = rollout::Seen { before, deployment, replicas };
        rollout::status(rollout, to, &engines, &seen, context.now().0)
    });
    let found = Findings {
        namespace: &identity.namespace,
        name: &identity.name,
        generation: object.metadata.generation,
        trouble: pass.trouble.clone().or(failed),
        model: pass.model.clone(),
        facts: pass.facts.as_ref(),
        planned: pass.planned.clone(),
        revision: standing,
        stood: pass.stood || told_of(before, standing),
        revision_is_current: standing.is_some() && standing == pass.current.as_ref(),
        rollout,
        offered: pass.offered.as_ref(),
        exhausted: pass.exhausted.as_deref(),
        measured: standing
            .and_then(|standing| context.measurements.of(&identity.uid, &standing.name)),
        suspended: object.spec.suspend,
        replicas,
        held_to: pass.held_to.as_deref(),
        scaling: object.spec.scaling.is_some().then(|| Scaled {
            status: pass.scaling.clone(),
            said: advice.and_then(|advice| advice.said),
        }),
        pods: &seen.pods,
        deployment: seen.deployment.as_deref(),
    };
    let status = status::compute(&found, before, &context.now());
    context.teller.publish(object, &events::repairs(&pass.repaired)).await;
    if before == Some(&status) {
        return Ok(());
    }
    context.writer().write_status(identity, &status).await?;
    let turned = events::transitions(before, &status);
    context.teller.publish(object, &turned).await;
    Ok(())
}

impl Context {
    /// Whole seconds, as the API keeps them.
    pub fn now(&self) -> Time {
        let now = (self.clock)();
        Time(now.round(Unit::Second).unwrap_or(now))
    }

    pub fn writer(&self) -> Writer<'_> {
        let Context { client, caches, metrics, sharing, taken, .. } = self;
        Writer { client, caches, metrics, sharing, taken }
    }
}

impl Pass {
    /// The first of several is told: the others may come of it.
    fn in_the_way(&mut self, said: Said) {
        self.trouble.get_or_insert(said);
    }

    /// What serves under a spec that is in force goes on as decided, and only its pods are told anew. Where the status says more
    /// than that, it is left as it is.
    fn recall(&mut self, object: &LLMDeployment) {
        let (None, Some(rollout), Some(before)) = (&self.current, &self.rollout, &object.status)
        else {
            return;
        };
        let standing = &rollout.revision;
        let stalled =
            before.conditions.iter().any(|held| held.type_ == ConditionType::Stalled.name());
        let mut rolled_out = before.rollout.iter().map(|rollout| &rollout.revision);
        let is_plain =
            !stalled && before.offered.is_none() && rolled_out.all(|name| *name == standing.name);
        if is_plain && told_of(Some(before), Some(standing)) {
            self.model =
                self.model.take().or_else(|| Said::before(before, ConditionType::ModelReady));
            self.planned =
                self.planned.take().or_else(|| Said::before(before, ConditionType::Planned));
            self.current = Some(standing.clone());
        }
    }

    /// What a person must mend goes into status; what may pass goes up and is tried again.
    fn stopped_by(&mut self, error: ApplyError) -> Result<(), ApplyError> {
        let message = error.to_string();
        match error {
            ApplyError::Foreign { .. } | ApplyError::Refused { .. } => {
                self.in_the_way(Said::no(Reason::ChildRejected, message));
                self.again = Some(LOOK_AGAIN);
            }
            ApplyError::Leaving { .. } => {
                self.in_the_way(Said::no(Reason::CreatingPods, message));
                self.again = Some(LEAVING_AGAIN);
            }
            error @ (ApplyError::Neighbours { .. } | ApplyError::Api { .. }) => return Err(error),
        }
        Ok(())
    }
}

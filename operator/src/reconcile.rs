//! One reconcile: spec → observe → facts → plan → revision → rollout → desired → apply → status. This file holds the order of the
//! steps and what each hands to the next; the steps themselves are the files of those names.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{Timestamp, Unit};
use kube::Client;
use kube::runtime::controller::Action;
use kube::runtime::events::Recorder;
use plimsoll_contract::facts::ModelFacts;
use plimsoll_crds::{LLMDeployment, OperatorUpgrade, Reason};
use tokio::sync::Mutex;

use crate::apply::{Applied, ApplyError, Owner, Writer};
use crate::desired::model::Place;
use crate::desired::{
    self, Children, Identity, Settings, Surroundings, deployment, pod, protection, reach,
};
use crate::events::Repair;
use crate::facts::{self, Model};
use crate::inspect::{self, Wanted};
use crate::metrics::Metrics;
use crate::observe::{Caches, Seen};
use crate::plan::{self, Neighbours, Update};
use crate::revision::{self, Content, Revision};
use crate::rollout::{self, Rollout};
use crate::spec::{Source, Spec};
use crate::status::{self, Findings, Said};
use crate::{events, fields, neighbours, pods};

/// What stands in the way, with no watch to tell when it is gone, is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// A child of a deleted object of the same name is soon gone.
const LEAVING_AGAIN: Duration = Duration::from_secs(1);

/// No watch tells when other pods leave a node.
const NEIGHBOURS_AGAIN: Duration = Duration::from_secs(5 * 60);

/// What every reconcile shares.
pub struct Context {
    pub client: Client,
    /// The only one that is watched, or the whole cluster.
    pub namespace: Option<String>,
    pub caches: Arc<Caches>,
    pub metrics: Arc<Metrics>,
    pub recorder: Recorder,
    pub settings: Settings,
    /// See [`Writer::sharing`].
    pub sharing: Mutex<()>,
    /// Tells the time, as far as status and patience need it.
    pub clock: Arc<dyn Fn() -> Timestamp + Send + Sync>,
}

/// How far a pass came; what it hands to status.
#[derive(Default)]
struct Pass {
    trouble: Option<Said>,
    model: Option<Said>,
    facts: Option<ModelFacts>,
    planned: Option<Said>,
    /// What stands after this pass.
    rollout: Option<Rollout>,
    /// The revision that answers to the spec, which stands unless it failed.
    current: Option<Revision>,
    /// What was put right after another hand.
    repaired: Vec<Repair>,
    /// When to look again without being told.
    again: Option<Duration>,
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
    let mut pass = Pass::default();
    let outcome = match Spec::parse(object) {
        Ok(spec) => forward(object, &spec, &identity, context, &mut pass).await,
        Err(error) => {
            pass.trouble = Some(Said::no(Reason::InvalidSpec, error.to_string()));
            Ok(())
        }
    };
    if let Err(error) = outcome {
        let seen = object.status.as_ref().and_then(|status| status.observed_generation);
        let first = seen.is_none();
        if let Err(error) = pass.stopped_by(error) {
            // What serves goes on serving while the API server has trouble; only a new object must not stay silent.
            if first {
                pass.trouble = Some(Said::no(Reason::Accepted, error.to_string()));
                tell(object, &identity, context, &pass).await?;
            }
            return Err(error);
        }
    }
    tell(object, &identity, context, &pass).await?;
    let pods = context.caches.observe(&identity.namespace, &identity.name).pods;
    let again = pass.again.into_iter().chain(pods::look_again(&pods, context.now().0)).min();
    Ok(again.map_or_else(Action::await_change, Action::requeue))
}

/// From a valid spec to the children.
async fn forward(
    object: &LLMDeployment,
    spec: &Spec,
    identity: &Identity,
    context: &Context,
    pass: &mut Pass,
) -> Result<(), ApplyError> {
    let seen = context.caches.observe(&identity.namespace, &identity.name);
    let revisions = revision::committed(&seen.revisions, &identity.uid);
    let digest = revision::spec_digest(&object.spec);
    let answering = revision::answering(&revisions, &digest);
    let outdated = |revision: &&Revision| {
        spec.operator_upgrade == OperatorUpgrade::Follow
            && revision::is_outdated(revision, &context.settings.engine_image)
    };

    let decided = match (barred(spec, &context.settings), answering) {
        (Some(barred), _) => {
            pass.trouble = Some(barred);
            Ok(None)
        }
        (None, Some(revision)) if !outdated(&revision) => {
            keep(spec, revision, identity, context, pass).await.map(Some)
        }
        (None, held) => {
            let made = decide(spec, digest, &revisions, identity, &seen, context, pass).await;
            match (made, held) {
                // What cannot be made anew for this operator goes on as it is.
                (Ok(None), Some(held)) => keep(spec, held, identity, context, pass).await.map(Some),
                (made, _) => made,
            }
        }
    };
    // What cannot be decided anew leaves what runs in place, and in repair.
    let failed = decided.map(|decided| pass.current = decided);
    roll(object, spec, &revisions, identity, &seen, context, pass).await?;
    failed
}

/// One step of the rollout to the revision that answers to the spec; without one, what runs is held.
async fn roll(
    object: &LLMDeployment,
    spec: &Spec,
    revisions: &[Revision],
    identity: &Identity,
    seen: &Seen,
    context: &Context,
    pass: &mut Pass,
) -> Result<(), ApplyError> {
    let deployment = seen.deployment.as_deref();
    let around = Surroundings::of(spec, &context.settings);
    let replicas = around.replicas;
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
        None => revision::running(revisions, revision::deployed_hash(deployment))
            .map(|running| rollout::hold(running, deployment, spec.strategy)),
    };
    let Some(rollout) = rollout else { return Ok(()) };
    pass.again = pass.again.into_iter().chain(rollout.again).min();
    pass.rollout = Some(rollout.clone());
    let standing = &rollout.revision;
    if within_bounds(standing, identity, &context.settings) || fewer(seen, replicas) {
        pass.repaired = stand(object, &rollout, around, identity, context).await?;
    }
    release(spec, seen, context).await?;
    if pass.current.as_ref() == Some(standing) {
        let engines = pods::engines(&seen.pods, Some(&standing.hash), now);
        let settled = engines.settled(replicas);
        tidy(&rollout, revisions, settled, identity, context).await?;
    }
    if pass.current.as_ref() == Some(standing) {
        let engines = pods::engines(&seen.pods, Some(&standing.hash), now);
        let settled = engines.settled(replicas);
        tidy(&rollout, revisions, settled, identity, context).await?;
    }
    Ok(())
}

/// Whether this operator may render a revision: one that was allowed once may reach out of its pods. Of such a one nothing
/// is rendered any more. What runs is left alone, so that starting the operator anew ends nothing that serves.
fn within_bounds(standing: &Revision, identity: &Identity, settings: &Settings) -> bool {
    settings.allow_host_path
        || !reach::template_reaches_out(&standing.content.pod_template, &identity.name)
}

/// Fewer pods than there are may always be asked for.
fn fewer(seen: &Seen, replicas: u32) -> bool {
    let asked_for = seen.deployment.as_ref().and_then(|held| held.spec.replicas);
    asked_for.is_some_and(|asked_for| i64::from(replicas) < i64::from(asked_for))
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

/// The spec was decided on before: only its download is looked after.
async fn keep(
    spec: &Spec,
    revision: &Revision,
    identity: &Identity,
    context: &Context,
    pass: &mut Pass,
) -> Result<Revision, ApplyError> {
    let Content { model, plan, storage_note, model_key, shared_download, .. } = &revision.content;
    pass.planned = Some(Said::yes(Reason::PlanChosen, plan.why.as_str()));
    pass.model = Some(status::model_ready(model, storage_note.as_deref()));
    if *shared_download && inspect::is_lost(&context.caches, &identity.namespace, model_key) {
        let place = Place::Download { key: model_key.clone() };
        let commit = model.revision.as_deref();
        let settings = &context.settings;
        let wanted = Wanted { identity, spec, key: model_key, place: &place, commit, settings };
        learn(&wanted, None, context, pass).await?;
    }
    Ok(revision.clone())
}

/// A spec without a revision: facts → plan → revision. None while the facts are not there, or nothing fits.
async fn decide(
    spec: &Spec,
    digest: String,
    revisions: &[Revision],
    identity: &Identity,
    seen: &Seen,
    context: &Context,
    pass: &mut Pass,
) -> Result<Option<Revision>, ApplyError> {
    let key = facts::key(spec);
    // Cordoned nodes and those kept for others take no pods.
    let open = plan::nodes(&seen.nodes, &Neighbours::default()).len();
    let (place, storage_note) = Place::choose(spec, &key, open);
    let note = storage_note.as_deref();
    let settings = &context.settings;
    let wanted = Wanted { identity, spec, key: &key, place: &place, commit: None, settings };
    let Some(facts) = learn(&wanted, note, context, pass).await? else { return Ok(None) };
    let neighbours = neighbours::read(&context.client, context.namespace.as_deref(), identity)
        .await
        .map_err(|source| ApplyError::Neighbours { source })?;
    let nodes = plan::nodes(&seen.nodes, &neighbours);
    let mut outcome = plan::plan(spec, &facts, &nodes);
    let update = outcome.chosen.as_mut().map(|chosen| {
        let (update, said) = plan::room(spec, chosen, &nodes);
        chosen.why.push_str(&format!("; {said}"));
        update
    });
    let Some(chosen) = &outcome.chosen else {
        pass.again = (!neighbours.asked.is_empty()).then_some(NEIGHBOURS_AGAIN);
        pass.planned = outcome.refusal().map(|(reason, message)| Said::no(reason, message));
        pass.facts = Some(facts);
        return Ok(None);
    };
    pass.planned = Some(Said::yes(Reason::PlanChosen, chosen.why.as_str()));
    let inputs = pod::Inputs {
        name: &identity.name,
        spec,
        plan: chosen,
        facts: &facts,
        place: &place,
        settings: &context.settings,
    };
    let content = Content {
        template_version: revision::TEMPLATE_VERSION,
        engine_image: Some(context.settings.engine_image.clone()),
        spec_digest: digest,
        model_key: key,
        shared_download: matches!(place, Place::Download { .. }),
        storage_note,
        update: update.unwrap_or_default(),
        model: status::model(&facts),
        plan: plan::status(&outcome, chosen),
        pod_template: match &spec.pod_template {
            Some(_) => rehearsed(pod::template(&inputs), identity, context).await?,
            None => pod::template(&inputs),
        },
    };
    let next = revision::new(&identity.name, revisions, content);
    let owner = Owner::Controller { uid: &identity.uid };
    context.writer().create(&revision::wanted(identity, &next), owner).await?;
    Ok(Some(next))
}

/// The facts of the model, or None and the reason in the pass.
async fn learn(
    wanted: &Wanted<'_>,
    note: Option<&str>,
    context: &Context,
    pass: &mut Pass,
) -> Result<Option<ModelFacts>, ApplyError> {
    let Wanted { identity, key, .. } = *wanted;
    match inspect::step(&context.writer(), wanted, (context.clock)()).await? {
        Model::Known(facts) | Model::Told(facts) => {
            pass.model = Some(status::model_ready(&status::model(&facts), note));
            Ok(Some(*facts))
        }
        missing => {
            pass.again = inspect::again(
                &missing,
                &context.caches,
                &identity.namespace,
                key,
                (context.clock)(),
            );
            pass.model = Some(status::model_missing(&missing, key));
            Ok(None)
        }
    }
}

/// A template with an overlay as the API server would store it, so that it can be compared with what is stored ever
/// after. Without an overlay we write every field in that form ourselves.
async fn rehearsed(
    template: serde_json::Value,
    identity: &Identity,
    context: &Context,
) -> Result<serde_json::Value, ApplyError> {
    let trial = deployment::deployment(identity, "rehearsal", &template, 0, Update::Surge, None);
    let answered = context.writer().rehearse(&trial).await?;
    Ok(fields::settled(&template, &answered["spec"]["template"]))
}

/// Children from the rollout's revision and nothing else. Tells of what another hand had changed.
async fn stand(
    object: &LLMDeployment,
    rollout: &Rollout,
    around: Surroundings<'_>,
    identity: &Identity,
    context: &Context,
) -> Result<Vec<Repair>, ApplyError> {
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
    Ok(repairs.into_iter().flatten().collect())
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

/// Pods that have come to answer are protected no more.
async fn release(spec: &Spec, seen: &Seen, context: &Context) -> Result<(), ApplyError> {
    if protection::is_the_users(spec) {
        return Ok(());
    }
    for pod in protection::over(&seen.pods, &seen.nodes) {
        context.writer().release(pod.as_ref()).await?;
    }
    Ok(())
}

/// A share in the model that stands; an end to what serves nothing: revisions beyond the history, other models.
async fn tidy(
    rollout: &Rollout,
    revisions: &[Revision],
    settled: bool,
    identity: &Identity,
    context: &Context,
) -> Result<(), ApplyError> {
    let writer = context.writer();
    let (standing, good) = (&rollout.revision, rollout.memory.good.as_deref());
    for name in revision::to_forget(revisions, &standing.name, good) {
        if let Some(old) = context.caches.get::<ControllerRevision>(&identity.namespace, name) {
            writer.delete(old.as_ref()).await?;
        }
    }
    inspect::belong(&writer, identity, &standing.content.model_key, settled).await
}

/// Status as computed from what stands now, written where it changed, and the events of what turned.
async fn tell(
    object: &LLMDeployment,
    identity: &Identity,
    context: &Context,
    pass: &Pass,
) -> Result<(), ApplyError> {
    let seen = context.caches.observe(&identity.namespace, &identity.name);
    let replicas = u32::try_from(object.spec.replicas).unwrap_or(0);
    let replicas = if object.spec.suspend { 0 } else { replicas };
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
        revision_is_current: standing.is_some() && standing == pass.current.as_ref(),
        rollout,
        suspended: object.spec.suspend,
        replicas,
        pods: &seen.pods,
        deployment: seen.deployment.as_deref(),
    };
    let status = status::compute(&found, before, &context.now());
    events::publish(&context.recorder, object, &events::repairs(&pass.repaired)).await;
    if before == Some(&status) {
        return Ok(());
    }
    context.writer().write_status(identity, &status).await?;
    let turned = events::transitions(before, &status);
    events::publish(&context.recorder, object, &turned).await;
    Ok(())
}

impl Context {
    /// Whole seconds, as the API keeps them.
    fn now(&self) -> Time {
        let now = (self.clock)();
        Time(now.round(Unit::Second).unwrap_or(now))
    }

    fn writer(&self) -> Writer<'_> {
        let Context { client, caches, metrics, sharing, .. } = self;
        Writer { client, caches, metrics, sharing }
    }
}

impl Pass {
    /// What a person must mend goes into status; what may pass goes up and is tried again.
    fn stopped_by(&mut self, error: ApplyError) -> Result<(), ApplyError> {
        let message = error.to_string();
        match error {
            ApplyError::Foreign { .. } | ApplyError::Refused { .. } => {
                self.trouble = Some(Said::no(Reason::ChildRejected, message));
                self.again = Some(LOOK_AGAIN);
            }
            ApplyError::Leaving { .. } => {
                self.trouble = Some(Said::no(Reason::CreatingPods, message));
                self.again = Some(LEAVING_AGAIN);
            }
            error @ (ApplyError::Neighbours { .. } | ApplyError::Api { .. }) => return Err(error),
        }
        Ok(())
    }
}

//! In: a valid spec, the revisions that stand, what the cluster holds. Out: the revision that runs, and what waits for a
//! person beside it. Here facts become a plan, and a plan becomes a revision; what may lead to a new one stands in
//! `lifecycle` and `exhausted`. Never here: a child, a status.
//!
//! Four things lead to a plan: a new spec, a class of machine that is gone, an engine that ran out of memory, and nodes among
//! which another plan would be better. The last is only ever offered.

use k8s_openapi::api::apps::v1::ControllerRevision;
use plimsoll_contract::facts::ModelFacts;
use plimsoll_crds::{PlanCause, PlanChange, PlanStatus, Reason};

use crate::apply::{ApplyError, Owner};
use crate::desired::model::Place;
use crate::desired::{Identity, deployment, pod};
use crate::exhausted::{self, Learned};
use crate::facts::{self, Model};
use crate::inspect::{self, Wanted};
use crate::observe::Seen;
use crate::plan::{self, Neighbours, Overrun, Question, Update};
use crate::reconcile::{Context, NEIGHBOURS_AGAIN, Pass};
use crate::revision::{self, Content, Revision};
use crate::spec::{PlanPolicy, Spec};
use crate::status::{self, Said};
use crate::{change, fields, lifecycle, pods};

/// One object at one moment.
pub struct Case<'a> {
    pub spec: &'a Spec,
    pub digest: &'a str,
    pub identity: &'a Identity,
    pub seen: &'a Seen,
    pub revisions: &'a [Revision],
    /// Hash of the revision whose children stand.
    pub standing: Option<&'a str>,
    pub context: &'a Context,
}

/// Why a plan is made.
struct Occasion<'a> {
    cause: PlanCause,
    /// What runs until then.
    before: Option<&'a Revision>,
    learned: Option<Learned>,
}

/// What became of it.
enum Outcome {
    /// The model is not known yet; the pass says why.
    Unknown,
    /// No plan fits, or for an offer: none is better.
    Nothing(Option<Said>),
    /// The same pods again.
    Unchanged,
    Runs(Box<Revision>),
    Waits(Box<Revision>),
}

/// A spec that no revision answers to. None while nothing may run of it.
pub async fn decide(case: &Case<'_>, pass: &mut Pass) -> Result<Option<Revision>, ApplyError> {
    let before = revision::running(case.revisions, case.standing);
    let waiting = revision::proposal(case.revisions, case.digest);
    if let Some(waiting) = waiting.filter(|waiting| case.is_considered(waiting)) {
        let Content { model, storage_note, .. } = &waiting.content;
        pass.model = Some(status::model_ready(model, storage_note.as_deref()));
        pass.wait(case.spec, waiting.clone());
        return Ok(None);
    }
    let key = facts::key(case.spec);
    let learned = before.and_then(|before| before.content.learned.clone());
    let learned = learned.filter(|_| before.is_some_and(|held| held.content.model_key == key));
    let occasion = Occasion { cause: PlanCause::SpecChanged, before, learned };
    match replan(case, occasion, pass).await? {
        Outcome::Unknown | Outcome::Unchanged => Ok(None),
        Outcome::Nothing(refusal) => {
            pass.planned = refusal;
            Ok(None)
        }
        Outcome::Runs(revision) => {
            pass.planned = Some(chosen(&revision));
            Ok(Some(*revision))
        }
        Outcome::Waits(proposal) => {
            case.consider(&proposal);
            pass.wait(case.spec, *proposal);
            Ok(None)
        }
    }
}

/// The spec was decided on before: its download is looked after, and whether its plan still stands.
pub async fn keep(
    case: &Case<'_>,
    standing: &Revision,
    pass: &mut Pass,
) -> Result<Revision, ApplyError> {
    let Content { model, storage_note, model_key, shared_download, .. } = &standing.content;
    pass.planned = Some(chosen(standing));
    pass.model = Some(status::model_ready(model, storage_note.as_deref()));
    let Identity { namespace, .. } = case.identity;
    if *shared_download && inspect::is_lost(&case.context.caches, namespace, model_key) {
        let place = Place::Download { key: model_key.clone() };
        let wanted = Wanted {
            identity: case.identity,
            spec: case.spec,
            key: model_key,
            place: &place,
            commit: model.revision.as_deref(),
            settings: &case.context.settings,
        };
        learn(&wanted, None, case.context, pass).await?;
    }
    pass.offered = revision::offered(case.revisions, standing).cloned();
    let next = match exhausted::look(&case.seen.pods, standing) {
        Some(learned) => out_of_memory(case, standing, learned, pass).await?,
        None if class_gone(case, standing, pass) => leave_class(case, standing, pass).await?,
        None => {
            consider_better(case, standing, pass).await?;
            None
        }
    };
    Ok(next.unwrap_or_else(|| standing.clone()))
}

fn chosen(revision: &Revision) -> Said {
    Said::yes(Reason::PlanChosen, revision.content.plan.why.as_str())
}

/// An engine needed more than was planned: planned anew once, with what it needed.
async fn out_of_memory(
    case: &Case<'_>,
    standing: &Revision,
    learned: Learned,
    pass: &mut Pass,
) -> Result<Option<Revision>, ApplyError> {
    let figures = learned.figures();
    if standing.content.cause == PlanCause::OutOfMemory {
        let first = standing.content.learned.as_ref().map(Learned::figures).unwrap_or_default();
        pass.exhausted = Some(format!("{first}; planned anew with that, {figures}"));
        return Ok(None);
    }
    if pass.offers(PlanCause::OutOfMemory) {
        return Ok(None);
    }
    let occasion =
        Occasion { cause: PlanCause::OutOfMemory, before: Some(standing), learned: Some(learned) };
    match replan(case, occasion, pass).await? {
        Outcome::Runs(next) => {
            pass.planned = Some(chosen(&next));
            Ok(Some(*next))
        }
        Outcome::Unchanged => {
            pass.exhausted = Some(format!("{figures}, and no other plan comes of that"));
            Ok(None)
        }
        Outcome::Waits(proposal) => {
            pass.offered = Some(*proposal);
            Ok(None)
        }
        Outcome::Nothing(refusal) => {
            let why = refusal.map(|refusal| refusal.message).unwrap_or_default();
            pass.exhausted = Some(format!("{figures}, and no plan fits with that: {why}"));
            Ok(None)
        }
        Outcome::Unknown => Ok(None),
    }
}

/// Whether the machines of the plan are gone for good; says so while that is not sure.
fn class_gone(case: &Case<'_>, standing: &Revision, pass: &mut Pass) -> bool {
    let class = &standing.content.plan.accelerator;
    let Some(since) = pods::waits_for_node_since(&case.seen.pods, &standing.hash) else {
        return false;
    };
    if !lifecycle::class_is_gone(&case.seen.nodes, class) {
        return false;
    }
    let waited = case.context.now().0.duration_since(since).unsigned_abs();
    let left = lifecycle::CLASS_GONE_PATIENCE.saturating_sub(waited);
    if !left.is_zero() {
        let minutes = lifecycle::CLASS_GONE_PATIENCE.as_secs() / 60;
        let why = &standing.content.plan.why;
        let message = format!(
            "no node of class {class} is left; planned anew once a pod has waited {minutes} minutes for one; {why}"
        );
        pass.planned = Some(Said::yes(Reason::PlanChosen, message));
        pass.again = Some(left);
    }
    left.is_zero()
}

async fn leave_class(
    case: &Case<'_>,
    standing: &Revision,
    pass: &mut Pass,
) -> Result<Option<Revision>, ApplyError> {
    let waiting = pass.offered.take().filter(|held| held.content.cause == PlanCause::ClassGone);
    let waiting = waiting.filter(|held| case.is_considered(held));
    let outcome = match waiting {
        Some(waiting) => Outcome::Waits(Box::new(waiting)),
        None => {
            let learned = standing.content.learned.clone();
            let cause = PlanCause::ClassGone;
            replan(case, Occasion { cause, before: Some(standing), learned }, pass).await?
        }
    };
    match outcome {
        Outcome::Runs(next) => {
            pass.planned = Some(chosen(&next));
            Ok(Some(*next))
        }
        Outcome::Waits(proposal) => {
            case.consider(&proposal);
            pass.wait(case.spec, *proposal);
            Ok(None)
        }
        Outcome::Nothing(refusal) => {
            pass.planned = refusal;
            Ok(None)
        }
        Outcome::Unknown | Outcome::Unchanged => Ok(None),
    }
}

/// Looks for a better plan when nodes have changed since the last look, and offers it. The first look is without the pods of
/// others and reads nothing; only where it finds something they are read.
async fn consider_better(
    case: &Case<'_>,
    standing: &Revision,
    pass: &mut Pass,
) -> Result<(), ApplyError> {
    if case.is_considered(standing) {
        return Ok(());
    }
    let Content { model_key, plan, learned, .. } = &standing.content;
    let held = case.context.caches.observe_model(&case.identity.namespace, model_key);
    let Model::Known(facts) = facts::look(&held, false, case.context.now().0) else {
        return Ok(());
    };
    let nodes = plan::nodes(&case.seen.nodes, &Neighbours::default());
    let overruns = overruns(learned.as_ref());
    let (_, feasible) = plan::choose_among(&Question {
        overruns: &overruns,
        ..Question::of(case.spec, &facts, &nodes, &case.context.prices)
    });
    let best = lifecycle::better(plan, &feasible);
    let offered = pass.offered.take();
    let still = |held: &Revision| match best {
        _ if held.content.cause != PlanCause::BetterPlan => true,
        Some(best) => lifecycle::alike(&held.content.plan, best),
        None => false,
    };
    if offered.as_ref().is_some_and(still) {
        pass.offered = offered;
    } else if best.is_some() {
        let learned = learned.clone();
        let occasion = Occasion { cause: PlanCause::BetterPlan, before: Some(standing), learned };
        if let Outcome::Waits(proposal) = replan(case, occasion, pass).await? {
            pass.offered = Some(*proposal);
        }
    }
    if pass.offered.is_none() {
        withdraw(case, standing).await?;
    }
    case.consider(standing);
    Ok(())
}

/// What is no better any more is offered no more.
async fn withdraw(case: &Case<'_>, standing: &Revision) -> Result<(), ApplyError> {
    let Some(offered) = revision::offered(case.revisions, standing) else { return Ok(()) };
    let Context { caches, .. } = case.context;
    match caches.get::<ControllerRevision>(&case.identity.namespace, &offered.name) {
        Some(stored) => case.context.writer().delete(stored.as_ref()).await,
        None => Ok(()),
    }
}

fn overruns(learned: Option<&Learned>) -> Vec<Overrun> {
    learned.map(Learned::overrun).into_iter().collect()
}

/// facts → plan → revision.
async fn replan(
    case: &Case<'_>,
    occasion: Occasion<'_>,
    pass: &mut Pass,
) -> Result<Outcome, ApplyError> {
    let Case { spec, identity, seen, context, .. } = *case;
    let key = facts::key(spec);
    // Cordoned nodes and those kept for others take no pods.
    let open = plan::nodes(&seen.nodes, &Neighbours::default()).len();
    let (place, storage_note) = Place::choose(spec, &key, open);
    let note = storage_note.as_deref();
    let settings = &context.settings;
    let wanted = Wanted { identity, spec, key: &key, place: &place, commit: None, settings };
    let Some(facts) = learn(&wanted, note, context, pass).await? else {
        return Ok(Outcome::Unknown);
    };
    let scope = context.namespace.as_deref();
    let neighbours = context
        .readings
        .of(&context.client, &context.caches, scope, identity)
        .await
        .map_err(|source| ApplyError::Neighbours { source })?;
    let nodes = plan::nodes(&seen.nodes, &neighbours);
    let overruns = overruns(occasion.learned.as_ref());
    let (outcome, feasible) = plan::choose_among(&Question {
        quota: neighbours.quota,
        overruns: &overruns,
        ..Question::of(spec, &facts, &nodes, &context.prices)
    });
    let choice = match (occasion.cause, occasion.before) {
        (PlanCause::BetterPlan, Some(before)) => lifecycle::better(&before.content.plan, &feasible)
            .filter(|plan| plan::room_for(plan, &nodes) > 0)
            .map(|plan| lifecycle::Choice { plan, waits: Some(Reason::PlanNotPinned) }),
        _ => lifecycle::choose(&spec.plan, &feasible),
    };
    let Some(choice) = choice else {
        if occasion.cause == PlanCause::SpecChanged {
            pass.facts = Some(facts);
        }
        let others = !neighbours.asked.is_empty() || neighbours.quota.gpus.is_some();
        if occasion.cause != PlanCause::BetterPlan && others {
            pass.again = Some(NEIGHBOURS_AGAIN);
        }
        let refusal = outcome.refusal().map(|(reason, message)| Said::no(reason, message));
        return Ok(Outcome::Nothing(refusal));
    };
    let made = Made { spec, key, facts: &facts, nodes: &nodes, outcome: &outcome, choice };
    freeze(case, occasion, made, place, storage_note).await
}

/// A plan, and everything it was made from.
struct Made<'a> {
    spec: &'a Spec,
    key: String,
    facts: &'a ModelFacts,
    nodes: &'a [plan::NodeResources],
    outcome: &'a plan::PlanOutcome,
    choice: lifecycle::Choice<'a>,
}

/// plan → revision.
async fn freeze(
    case: &Case<'_>,
    occasion: Occasion<'_>,
    made: Made<'_>,
    place: Place,
    storage_note: Option<String>,
) -> Result<Outcome, ApplyError> {
    let Case { identity, context, .. } = *case;
    let Made { spec, key, facts, nodes, outcome, choice } = made;
    let Occasion { cause, before, learned } = occasion;
    let (update, plan) = in_words(spec, choice.plan, nodes, learned.as_ref());
    let settings = &context.settings;
    let name = &identity.name;
    let inputs = pod::Inputs { name, spec, plan: &plan, facts, place: &place, settings };
    let pod_template = match &spec.pod_template {
        Some(_) => rehearsed(pod::template(&inputs), identity, context).await?,
        None => pod::template(&inputs),
    };
    let same = |before: &Revision| revision::has_pods_of(before, &pod_template);
    if cause == PlanCause::OutOfMemory && before.is_some_and(same) {
        return Ok(Outcome::Unchanged);
    }
    let mut planned = plan::status(outcome, &plan);
    planned.changed = before.and_then(|before| changed(&before.content.plan, &planned, cause));
    let replaced = before.filter(|_| cause != PlanCause::SpecChanged);
    let content = Content {
        template_version: revision::TEMPLATE_VERSION,
        engine_image: Some(context.settings.engine_image.clone()),
        spec_digest: case.digest.to_owned(),
        model_key: key,
        shared_download: matches!(place, Place::Download { .. }),
        storage_note,
        update,
        cause,
        replaces: replaced.map(|before| before.hash.clone()),
        waits_for_pin: choice.waits.is_some(),
        learned,
        model: status::model(facts),
        plan: planned,
        pod_template,
    };
    let next = Box::new(commit(case, content).await?);
    Ok(if choice.waits.is_some() { Outcome::Waits(next) } else { Outcome::Runs(next) })
}

/// None where it is the same plan again.
fn changed(before: &PlanStatus, after: &PlanStatus, cause: PlanCause) -> Option<PlanChange> {
    let values = change::values(before, after);
    let from = before.hash.clone();
    (before.hash != after.hash).then_some(PlanChange { from, cause, values })
}

/// The plan with everything that its sentence has to say.
fn in_words(
    spec: &Spec,
    plan: &plan::Plan,
    nodes: &[plan::NodeResources],
    learned: Option<&Learned>,
) -> (Update, plan::Plan) {
    let mut plan = plan.clone();
    let (update, room) = plan::room(spec, &plan, nodes);
    let learned = learned.filter(|learned| learned.class == plan.accelerator);
    let learned = learned.map(Learned::sentence);
    for sentence in learned.into_iter().chain([room]) {
        plan.why.push_str("; ");
        plan.why.push_str(&sentence);
    }
    (update, plan)
}

/// Stores a revision; one that has stood before with the same pods is taken as it is.
async fn commit(case: &Case<'_>, content: Content) -> Result<Revision, ApplyError> {
    let next = revision::new(&case.identity.name, case.revisions, content);
    if let Some(held) = case.revisions.iter().find(|held| held.hash == next.hash) {
        return Ok(held.clone());
    }
    let owner = Owner::Controller { uid: &case.identity.uid };
    case.context.writer().create(&revision::wanted(case.identity, &next), owner).await?;
    Ok(next)
}

/// The facts of the model, or None and the reason in the pass.
async fn learn(
    wanted: &Wanted<'_>,
    note: Option<&str>,
    context: &Context,
    pass: &mut Pass,
) -> Result<Option<ModelFacts>, ApplyError> {
    let Wanted { identity, key, .. } = *wanted;
    match inspect::step(&context.writer(), wanted, &*context.clock).await? {
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

impl Case<'_> {
    /// Whether this revision was held against the nodes as they are.
    fn is_considered(&self, revision: &Revision) -> bool {
        self.context.considered.holds(&self.identity.uid, &self.mark(revision))
    }

    fn consider(&self, revision: &Revision) {
        self.context.considered.note(&self.identity.uid, self.mark(revision));
    }

    /// What the answer depends on beside the spec.
    fn mark(&self, revision: &Revision) -> (u64, String) {
        let PlanPolicy { manual, pinned_hash } = &self.spec.plan;
        let pinned = pinned_hash.as_deref().unwrap_or_default();
        (self.context.caches.nodes_version(), format!("{} {manual} {pinned}", revision.hash))
    }
}

impl Pass {
    /// Nothing runs of the spec before a person has named this plan.
    fn wait(&mut self, spec: &Spec, proposal: Revision) {
        self.planned = Some(lifecycle::waits(&spec.plan, &proposal.content.plan));
        self.offered = Some(proposal);
    }

    fn offers(&self, cause: PlanCause) -> bool {
        self.offered.as_ref().is_some_and(|offered| offered.content.cause == cause)
    }
}

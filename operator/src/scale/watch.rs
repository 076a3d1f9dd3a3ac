//! In: the caches and Prometheus, every interval. Out: an [`Advice`] for each scaled object, and a word to the reconcile where
//! it is news. One task for all objects. Reads quotas when more replicas are wanted, and writes nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::channel::mpsc;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, ResourceQuota};
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Client, ResourceExt};
use plimsoll_crds::{LLMDeployment, PlanStatus, Reason, ScalingStatus};
use tokio::time::{Instant, MissedTickBehavior};

use super::decide::{Aims, Bounds, Look, Seen, Tempo, Verdict, decide};
use super::prometheus::{AskError, Prometheus};
use super::query::{Answers, PodName};
use super::signals::{Pods, Told, gather};
use super::{Advice, Advices, bounds, decided, kept};
use crate::desired::{Identity, names};
use crate::metrics::Metrics;
use crate::observe::Caches;
use crate::pods::{self, Engines};
use crate::revision;
use crate::spec::{Scaling, Spec};
use crate::status::Said;

/// Looks in a row that find something amiss before it is told: a pod that has just come is not scraped yet.
const AMISS_LOOKS: u32 = 3;
/// Objects that may wait to be looked at by the reconcile; it looks at all of them anyway when they are more.
pub const TRIGGERS_MAX: usize = 4096;

/// The loop's own.
pub struct Scaler {
    /// None where the operator was not told where it is.
    pub prometheus: Option<Prometheus>,
    pub tempo: Tempo,
    pub client: Client,
    pub caches: Arc<Caches>,
    pub metrics: Arc<Metrics>,
    pub advices: Arc<Advices>,
    pub triggers: mpsc::Sender<ObjectRef<LLMDeployment>>,
    pub watched: HashMap<String, Watched>,
    pub quotas: HashMap<String, (Instant, Vec<ResourceQuota>)>,
}

/// What the loop remembers of one object.
#[derive(Default)]
pub struct Watched {
    revision: Option<String>,
    seen: Seen,
    amiss: u32,
    advice: Option<Advice>,
}

/// One scaled object, as of one look.
struct Case {
    object: Arc<LLMDeployment>,
    identity: Identity,
    spec: Spec,
    scaling: Scaling,
    plan: PlanStatus,
    revision: Option<String>,
    engines: Engines,
    /// Names of the pods that answer.
    answering: Vec<PodName>,
    settled_seconds: i64,
}

/// Runs for as long as the process leads.
pub async fn run(mut scaler: Scaler) {
    scaler.caches.ready().await;
    let period = Duration::from_secs(scaler.tempo.interval_seconds.unsigned_abs());
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        scaler.look().await;
    }
}

impl Scaler {
    async fn look(&mut self) {
        let now = Timestamp::now();
        let cases = cases(&self.caches, now);
        let uids: Vec<&str> = cases.iter().map(|case| case.identity.uid.as_str()).collect();
        self.watched.retain(|uid, _| uids.contains(&uid.as_str()));
        self.advices.keep(|uid| uids.contains(&uid));
        if cases.is_empty() {
            return;
        }
        let told = self.ask(&cases).await;
        for case in &cases {
            self.look_at(case, told.as_ref(), now.as_second()).await;
        }
    }

    /// None where there is no Prometheus to ask.
    async fn ask(&self, cases: &[Case]) -> Option<Result<Answers, AskError>> {
        let prometheus = self.prometheus.as_ref()?;
        let pods: Vec<PodName> =
            cases.iter().flat_map(|case| case.answering.iter().cloned()).collect();
        if pods.is_empty() {
            return Some(Ok(Answers::default()));
        }
        let answered = prometheus.ask(&pods, self.tempo).await;
        self.metrics.asked_prometheus(answered.is_err());
        if let Err(error) = &answered {
            tracing::warn!(error = crate::run::chain(error), "no figures to scale on");
        }
        Some(answered)
    }

    async fn look_at(&mut self, case: &Case, told: Option<&Result<Answers, AskError>>, now: i64) {
        let uid = &case.identity.uid;
        let mut watched = self.watched.remove(uid).unwrap_or_default();
        if watched.revision != case.revision {
            watched = Watched {
                revision: case.revision.clone(),
                advice: watched.advice,
                ..Watched::default()
            };
        }
        let held = watched.advice.as_ref().and_then(|advice| advice.scaling.clone());
        let status = case.object.status.as_ref().and_then(|status| status.scaling.clone());
        let mut advice = watched.advice.clone().unwrap_or(Advice { scaling: None, said: None });
        let none = Answers::default();
        let answers = told.and_then(|told| told.as_ref().ok()).unwrap_or(&none);
        let known: Vec<&Told> =
            case.answering.iter().filter_map(|pod| answers.pods.get(pod)).collect();
        let signals = gather(&known, case.pods(), case.scaling.queue_per_replica, self.tempo);
        if let Some(said) = watched.say(case, told, signals.ready, signals.reporting) {
            advice.said = Some(said);
        }
        if let Some(scaling) = held.or(status) {
            let kept = kept(&scaling, case.revision.as_deref());
            let aims = case.aims();
            let mut bounds = bounds::bounds(&case.scaling, &case.spec, &case.plan);
            let tempo = self.tempo;
            let look = |bounds: &Bounds, seen: &mut Seen| {
                let (signals, kept, aims) = (&signals, &kept, &aims);
                decide(&Look { signals, aims, bounds, kept, tempo, now }, seen)
            };
            let mut seen = watched.seen.clone();
            let mut verdict = look(&bounds, &mut seen);
            if matches!(verdict, Verdict::Move { to, .. } if to > kept.desired) {
                bounds = self.under_quotas(bounds, kept.desired, case).await;
                seen = watched.seen.clone();
                verdict = look(&bounds, &mut seen);
            }
            watched.seen = seen;
            advice.scaling = case.heard(&scaling, verdict, now).or(advice.scaling);
        }
        watched.advice = Some(advice.clone());
        self.watched.insert(uid.clone(), watched);
        if self.advices.set(uid, advice) {
            let object = ObjectRef::from_obj(case.object.as_ref());
            if self.triggers.try_send(object).is_err() {
                tracing::warn!(object = case.identity.name, "a decision waits for the next change");
            }
        }
    }

    async fn under_quotas(&mut self, bounds: Bounds, desired: u32, case: &Case) -> Bounds {
        let namespace = &case.identity.namespace;
        let deployment = self.caches.get::<Deployment>(namespace, &case.identity.name);
        let Some(deployment) = deployment else { return bounds };
        let template =
            serde_json::to_value(&deployment.spec.template).expect("objects of the API are JSON");
        let keep = Duration::from_secs(self.tempo.window().unsigned_abs());
        self.quotas.retain(|_, (read_at, _)| read_at.elapsed() < keep);
        if !self.quotas.contains_key(namespace) {
            let api: Api<ResourceQuota> = Api::namespaced(self.client.clone(), namespace);
            match api.list(&ListParams::default()).await {
                Ok(list) => {
                    self.quotas.insert(namespace.clone(), (Instant::now(), list.items));
                }
                // Quotas hold by themselves: pods beyond them are refused, and status says so.
                Err(error) => tracing::warn!(%error, namespace, "cannot read quotas"),
            }
        }
        let quotas = self.quotas.get(namespace).map(|(_, quotas)| quotas.as_slice());
        bounds::under_quotas(bounds, desired, &template, quotas.unwrap_or_default())
    }
}

impl Watched {
    /// What ScalingActive is to say; none where it stays as it is.
    fn say(
        &mut self,
        case: &Case,
        told: Option<&Result<Answers, AskError>>,
        ready: u32,
        reporting: u32,
    ) -> Option<Said> {
        let amiss = match told {
            None => {
                let message = "this operator was started without --prometheus-address";
                return Some(Said::no(Reason::PrometheusNotSet, message));
            }
            Some(Err(error)) => Said::no(Reason::PrometheusUnreachable, crate::run::chain(error)),
            Some(Ok(_)) if ready == 0 => return None,
            Some(Ok(_)) if reporting == 0 => {
                let message = "Prometheus has no recent sample of any ready pod";
                Said::no(Reason::MetricsMissing, message)
            }
            Some(Ok(_)) if reporting < ready => {
                let message = "Prometheus has recent samples of some of the ready pods only";
                Said::no(Reason::MetricsPartial, message)
            }
            Some(Ok(_)) => {
                self.amiss = 0;
                let Scaling { min, max, .. } = case.scaling;
                let message = format!("every ready pod reports; {min} to {max} replicas");
                return Some(Said::yes(Reason::ScalingOnMetrics, message));
            }
        };
        self.amiss += 1;
        (self.amiss >= AMISS_LOOKS).then_some(amiss)
    }
}

impl Case {
    fn pods(&self) -> Pods {
        Pods {
            ready: u32::try_from(self.answering.len()).unwrap_or(u32::MAX),
            unschedulable: self.engines.unschedulable.is_some(),
            rolling_out: self.engines.older > 0,
            settled_seconds: self.settled_seconds,
        }
    }

    fn aims(&self) -> Aims {
        let [ttft_seconds, tpot_seconds] = self.spec.preferences.slo.seconds();
        Aims {
            queue_per_replica: self.scaling.queue_per_replica,
            concurrency: u32::try_from(self.plan.concurrency).unwrap_or(1).max(1),
            ttft_seconds,
            tpot_seconds,
            stabilization_seconds: self.scaling.stabilization_seconds.into(),
        }
    }

    /// What status is to hold after `verdict`; none where nothing changes.
    fn heard(&self, before: &ScalingStatus, verdict: Verdict, now: i64) -> Option<ScalingStatus> {
        match verdict {
            Verdict::Move { to, why, capacity } => {
                tracing::info!(
                    object = self.identity.name,
                    from = before.desired,
                    to,
                    why,
                    "scaling"
                );
                Some(decided(before, to, &why, capacity, self.revision.as_deref(), now))
            }
            // The first limit after a decision stands until the next decision, so that status does not flap.
            Verdict::Stay { limit: Some(limit) } if before.limit.is_none() => {
                Some(ScalingStatus { limit: Some(limit), ..before.clone() })
            }
            Verdict::Stay { .. } => None,
        }
    }
}

/// Everything that is to be scaled now.
fn cases(caches: &Caches, now: Timestamp) -> Vec<Case> {
    let scaled = caches.objects.state_filter(|object| {
        object.spec.scaling.is_some()
            && !object.spec.suspend
            && object.metadata.deletion_timestamp.is_none()
    });
    let cases = scaled.into_iter().filter_map(|object| {
        let identity = Identity::of(&object);
        let pods = caches.pods_with(&identity.namespace, names::NAME, &identity.name);
        case(object, identity, &pods, now)
    });
    cases.collect()
}

/// None where there is no valid spec or no plan yet, so that nothing runs that could be scaled.
fn case(
    object: Arc<LLMDeployment>,
    identity: Identity,
    pods: &[Arc<Pod>],
    now: Timestamp,
) -> Option<Case> {
    let spec = Spec::parse(&object).ok()?;
    let status = object.status.as_ref()?;
    let revision = status.revision.clone();
    let hash = revision.as_deref().and_then(|name| revision::hash_of(name, &identity.name));
    let answering = pods::answering(pods);
    let newest = answering.iter().filter_map(|(_, since)| *since).max();
    Some(Case {
        scaling: spec.scaling?,
        plan: status.plan.clone()?,
        engines: pods::engines(pods, hash, now),
        answering: answering
            .iter()
            .map(|(pod, _)| (pod.namespace().unwrap_or_default(), pod.name_any()))
            .collect(),
        settled_seconds: newest.map_or(i64::MAX, |newest| now.as_second() - newest.as_second()),
        spec,
        revision,
        identity,
        object,
    })
}

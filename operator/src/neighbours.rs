//! In: the namespace the operator may see, or the whole cluster. Out: the memory, CPU and GPUs that others' pods ask for on each
//! node, and what quotas leave, as of now. Engines are known from the cache; all other pods are read when a plan is made, once
//! for all plans of the same moment, and at no other time: a watch on every pod of a cluster, kept for a plan now and then,
//! would make the operator large and busy. Reading engines too would cost a fleet of a thousand objects a million pods. Never
//! here: a decision.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, ResourceQuota};
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::desired::{Identity, names};
use crate::observe::Caches;
use crate::plan::{self, Asked, Neighbours};

/// Pods are read in pages of this many, so that a large cluster fills no memory.
const PAGE_PODS: u32 = 500;
/// Nodes of a cluster of a thousand pages are not what a person waits for.
const PAGES_MAX: usize = 1000;
const FORBIDDEN: u16 = 403;
/// What has ended asks for nothing any more, and what is not bound may still go anywhere.
const BOUND: &str = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed";
/// Plans so close to one another are made from one reading: a pod that comes meanwhile might as well come after the plan.
const SAME_MOMENT: Duration = Duration::from_secs(1);

/// By the name of its node.
type AskedByNode = BTreeMap<String, Asked>;

/// What was read last, for the plans of the same moment.
#[derive(Default)]
pub struct Readings {
    pods: Held<AskedByNode>,
    quotas: std::sync::Mutex<HashMap<String, Arc<Held<Vec<ResourceQuota>>>>>,
}

/// A namespace that nobody plans in any more is forgotten with all others once there are so many.
const NAMESPACES_MAX: usize = 1000;

/// Whoever comes while it is read waits for that reading.
struct Held<T>(Mutex<Option<Reading<T>>>);

struct Reading<T> {
    began: Instant,
    read: Arc<T>,
}

impl<T> Default for Held<T> {
    fn default() -> Held<T> {
        Held(Mutex::default())
    }
}

impl<T> Held<T> {
    async fn or_read(
        &self,
        read: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<Arc<T>, kube::Error> {
        let came = Instant::now();
        let mut held = self.0.lock().await;
        // However long whoever had the turn took to read.
        let fits =
            |reading: &&Reading<T>| came.saturating_duration_since(reading.began) < SAME_MOMENT;
        if let Some(reading) = held.as_ref().filter(fits) {
            return Ok(reading.read.clone());
        }
        let began = Instant::now();
        let read = Arc::new(read.await?);
        *held = Some(Reading { began, read: read.clone() });
        Ok(read)
    }
}

impl Readings {
    /// All pods but the engines of the object itself, which a new revision replaces.
    pub async fn of(
        &self,
        client: &Client,
        caches: &Caches,
        namespace: Option<&str>,
        object: &Identity,
    ) -> Result<Neighbours, kube::Error> {
        let others = self.pods.or_read(read_others(client, namespace)).await?;
        let quotas = self.quotas_of(&object.namespace);
        let quotas = quotas.or_read(read_quotas(client, &object.namespace)).await?;
        let mut asked = AskedByNode::clone(&others);
        let mut own_gpus = 0;
        caches.each_pod(|namespace, _, pod| {
            let Some((node, more)) = &pod.asked else { return };
            let is_own =
                namespace == object.namespace && pod.object.as_deref() == Some(&*object.name);
            if is_own {
                own_gpus += more.gpus;
            } else {
                add(&mut asked, node, *more);
            }
        });
        let quota = plan::quota(&quotas, own_gpus);
        Ok(Neighbours { asked, namespaced: namespace.is_some(), quota })
    }

    fn quotas_of(&self, namespace: &str) -> Arc<Held<Vec<ResourceQuota>>> {
        let mut quotas = self.quotas.lock().expect("no holder panics");
        if quotas.len() >= NAMESPACES_MAX && !quotas.contains_key(namespace) {
            quotas.clear();
        }
        quotas.entry(namespace.to_owned()).or_default().clone()
    }
}

fn add(asked: &mut AskedByNode, node: &str, more: Asked) {
    match asked.get_mut(node) {
        Some(sum) => *sum = sum.plus(more),
        None => drop(asked.insert(node.to_owned(), more)),
    }
}

/// Pods that are not ours.
async fn read_others(client: &Client, namespace: Option<&str>) -> Result<AskedByNode, kube::Error> {
    let pods: Api<Pod> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let mut asked = AskedByNode::new();
    let not_ours = format!("{}!={}", names::MANAGED_BY, names::MANAGER);
    let mut page = ListParams::default().fields(BOUND).labels(&not_ours).limit(PAGE_PODS);
    for _ in 0..PAGES_MAX {
        let list = pods.list(&page).await?;
        for pod in &list.items {
            if let Some((node, more)) = plan::asked(pod) {
                add(&mut asked, node, more);
            }
        }
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => break,
        }
    }
    Ok(asked)
}

/// An operator that may not read them, because its role is of an older chart, knows of none.
async fn read_quotas(client: &Client, namespace: &str) -> Result<Vec<ResourceQuota>, kube::Error> {
    let quotas: Api<ResourceQuota> = Api::namespaced(client.clone(), namespace);
    // What the server's own cache holds: a list that must be the newest waits there for a tenth of a second.
    match quotas.list(&ListParams::default().match_any()).await {
        Ok(list) => Ok(list.items),
        Err(kube::Error::Api(refused)) if refused.code == FORBIDDEN => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn plans_of_one_moment_share_a_reading_however_long_it_takes_and_a_failed_one_is_made_anew()
     {
        let (held, reads) = (Held::default(), AtomicUsize::new(0));
        let read = async |seconds: u64, fails: bool| {
            let number = reads.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            if fails { Err(kube::Error::LinesCodecMaxLineLengthExceeded) } else { Ok(number) }
        };
        let slow = || held.or_read(read(10, false));
        let (a, b, c) = tokio::join!(slow(), slow(), slow());
        assert_eq!([*a.unwrap(), *b.unwrap(), *c.unwrap()], [0, 0, 0]);
        assert_eq!(*held.or_read(read(0, false)).await.unwrap(), 1, "it began ten seconds ago");
        assert_eq!(*held.or_read(read(0, false)).await.unwrap(), 1);
        tokio::time::sleep(SAME_MOMENT).await;
        assert!(held.or_read(read(0, true)).await.is_err());
        assert_eq!(*held.or_read(read(0, false)).await.unwrap(), 3, "no failure is kept");
    }
}

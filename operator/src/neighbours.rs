//! In: the namespace the operator may see, or the whole cluster. Out: the memory, CPU and GPUs that others' pods ask for on each
//! node, and what quotas leave, as of now. Engines are known from the cache; all other pods are read once for each plan that
//! is made, and at no other time: a watch on every pod of a cluster, kept for a plan now and then, would make the operator
//! large and busy. Reading engines too would cost a fleet of a thousand objects a million pods. Never here: a decision.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, ResourceQuota};
use kube::api::ListParams;
use kube::{Api, Client};

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

/// All pods but the engines of the object itself, which a new revision replaces.
pub async fn read(
    client: &Client,
    caches: &Caches,
    namespace: Option<&str>,
    object: &Identity,
) -> Result<Neighbours, kube::Error> {
    let pods: Api<Pod> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let mut asked: BTreeMap<String, Asked> = BTreeMap::new();
    let mut own_gpus = 0;
    let mut count = |pod: &Pod| {
        let Some((node, more)) = plan::asked(pod) else { return };
        if object.has_engine(pod) {
            own_gpus += more.gpus;
            return;
        }
        match asked.get_mut(node) {
            Some(sum) => *sum = sum.plus(more),
            None => drop(asked.insert(node.to_owned(), more)),
        }
    };
    caches.pods().iter().filter(|pod| !is_over(pod)).for_each(|pod| count(pod));
    let not_ours = format!("{}!={}", names::MANAGED_BY, names::MANAGER);
    let mut page = ListParams::default().fields(BOUND).labels(&not_ours).limit(PAGE_PODS);
    for _ in 0..PAGES_MAX {
        let list = pods.list(&page).await?;
        list.items.iter().for_each(&mut count);
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => break,
        }
    }
    let quota = plan::quota(&quotas(client, object).await?, own_gpus);
    Ok(Neighbours { asked, namespaced: namespace.is_some(), quota })
}

fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Of the object's namespace. An operator that may not read them, because its role is of an older chart, knows of none.
async fn quotas(client: &Client, object: &Identity) -> Result<Vec<ResourceQuota>, kube::Error> {
    let quotas: Api<ResourceQuota> = Api::namespaced(client.clone(), &object.namespace);
    match quotas.list(&ListParams::default().limit(PAGE_PODS)).await {
        Ok(list) => Ok(list.items),
        Err(kube::Error::Api(refused)) if refused.code == FORBIDDEN => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

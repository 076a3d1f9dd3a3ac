//! In: the namespace the operator may see, or the whole cluster. Out: the memory and CPU that others' pods ask for on each node,
//! as of now. Read once for each plan that is made, and at no other time: a watch on every pod of a cluster, kept for a
//! plan now and then, would make the operator large and busy. Never here: a decision.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};

use crate::desired::Identity;
use crate::plan::{self, Asked, Neighbours};

/// Pods are read in pages of this many, so that a large cluster fills no memory.
const PAGE_PODS: u32 = 500;
/// Nodes of a cluster of a thousand pages are not what a person waits for.
const PAGES_MAX: usize = 1000;
/// What has ended asks for nothing any more, and what is not bound may still go anywhere.
const BOUND: &str = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed";

/// All pods but the engines of the object itself, which a new revision replaces.
pub async fn read(
    client: &Client,
    namespace: Option<&str>,
    object: &Identity,
) -> Result<Neighbours, kube::Error> {
    let pods: Api<Pod> = match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    };
    let mut asked = BTreeMap::new();
    let mut page = ListParams::default().fields(BOUND).limit(PAGE_PODS);
    for _ in 0..PAGES_MAX {
        let list = pods.list(&page).await?;
        for pod in list.items.iter().filter(|pod| !object.has_engine(pod)) {
            if let Some((node, more)) = plan::asked(pod) {
                let sum: &mut Asked = asked.entry(node.to_owned()).or_default();
                *sum = sum.plus(more);
            }
        }
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => break,
        }
    }
    Ok(Neighbours { asked, namespaced: namespace.is_some() })
}

//! In: a committed revision, the object's name and the number of replicas. Out: the children as the cluster shall hold
//! them. Pure: no client, no clock. What a pod looks like is decided once, when the revision is made (`pod`), and read
//! from the revision ever after.

pub mod deployment;
pub mod model;
pub mod monitoring;
pub mod names;
pub mod network_policy;
pub mod pod;
pub mod policy;
pub mod protection;
pub mod quantity;
pub mod reach;
pub mod service;

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;
use plimsoll_crds::{Clients, LLMDeployment, LLMDeploymentSpec};
use serde_json::{Value, json};

use self::monitoring::{PodMonitor, PrometheusRule, Promises};
use crate::apply::Want;
use crate::rollout::Rollout;
use crate::spec::Spec;
use crate::spec::preferences::Slo;

/// The object whose children we render.
#[derive(Clone, Debug)]
pub struct Identity {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl Identity {
    pub fn of(object: &LLMDeployment) -> Identity {
        Identity {
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
        }
    }

    /// Metadata of a child that this object controls.
    pub fn metadata(&self) -> Value {
        self.metadata_named(&self.name)
    }

    pub fn metadata_named(&self, child: &str) -> Value {
        json!({
            "name": child,
            "namespace": self.namespace,
            "labels": names::labels(&self.name),
            "ownerReferences": [self.controller()],
        })
    }

    fn controller(&self) -> Value {
        let mut owner = self.co_owner();
        owner["controller"] = true.into();
        owner["blockOwnerDeletion"] = true.into();
        owner
    }

    /// One owner among several: of what the objects of one model source share.
    pub fn co_owner(&self) -> Value {
        json!({
            "apiVersion": names::API_VERSION,
            "kind": names::KIND,
            "name": self.name,
            "uid": self.uid,
        })
    }
}

/// What the operator was started with, as far as pods depend on it.
#[derive(Clone, Debug)]
pub struct Settings {
    pub engine_image: String,
    /// file:// sources mount a path of the node.
    pub allow_host_path: bool,
    /// Another model hub than the public one.
    pub hub_endpoint: Option<String>,
    /// The operator's own namespace.
    pub home: String,
    /// Who may reach engines whose spec does not say.
    pub clients: Clients,
    /// Labels by which a Prometheus finds monitors and rules.
    pub monitor_labels: BTreeMap<String, String>,
}

/// What lies around the pods of one object and follows its spec at once: it makes no revision.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    pub replicas: u32,
    pub clients: Clients,
    pub promises: Promises,
    pub settings: &'a Settings,
}

impl<'a> Surroundings<'a> {
    pub fn of(spec: &Spec, replicas: u32, settings: &'a Settings) -> Surroundings<'a> {
        Surroundings {
            replicas,
            clients: spec.clients.unwrap_or(settings.clients),
            promises: Promises::of(spec.preferences.slo),
            settings,
        }
    }

    /// For what runs on under a spec that cannot work, from the fields that can.
    pub fn held(
        spec: &LLMDeploymentSpec,
        replicas: u32,
        settings: &'a Settings,
    ) -> Surroundings<'a> {
        let clients = spec.network.as_ref().and_then(|network| network.clients);
        Surroundings {
            replicas,
            clients: clients.unwrap_or(settings.clients),
            promises: Promises::of(Slo::of(spec)),
            settings,
        }
    }
}

/// The children of one object.
pub struct Children {
    pub service_account: Want<ServiceAccount>,
    pub service: Want<Service>,
    pub network_policy: Want<NetworkPolicy>,
    pub pod_monitor: Want<PodMonitor>,
    pub prometheus_rule: Want<PrometheusRule>,
    pub disruption_budget: Option<Want<PodDisruptionBudget>>,
    pub deployment: Want<Deployment>,
}

/// The children as a rollout's revision has them, with what lies around them.
pub fn children(identity: &Identity, rollout: &Rollout, around: Surroundings<'_>) -> Children {
    let Rollout { revision, update, memory, .. } = rollout;
    let Surroundings { replicas, clients, promises, settings } = around;
    Children {
        service_account: service::service_account(identity),
        service: service::service(identity),
        network_policy: network_policy::network_policy(
            identity,
            &revision.content.pod_template,
            clients,
            settings,
        ),
        pod_monitor: monitoring::pod_monitor(identity, &settings.monitor_labels),
        prometheus_rule: monitoring::prometheus_rule(identity, &settings.monitor_labels, promises),
        disruption_budget: policy::disruption_budget(identity, replicas),
        deployment: deployment::deployment(
            identity,
            &revision.hash,
            &revision.content.pod_template,
            replicas,
            *update,
            memory.kept().as_deref(),
        ),
    }
}

#[cfg(test)]
pub mod tests;

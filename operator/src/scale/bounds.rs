//! In: the bounds of a spec, what one pod takes, the quotas of its namespace. Out: between how many replicas there is a
//! choice, and what sets the upper end. Pure.

use k8s_openapi::api::core::v1::{ResourceQuota, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use plimsoll_crds::PlanStatus;
use serde_json::Value;
use std::collections::BTreeMap;

use super::decide::Bounds;
use crate::amount;
use crate::plan::{self, CPU_CLASS};
use crate::spec::{Scaling, Spec};

/// GPUs that one replica holds.
pub fn gpus_per_replica(plan: &PlanStatus) -> u32 {
    if plan.accelerator == CPU_CLASS {
        return 0;
    }
    u32::try_from(plan.tensor_parallel).unwrap_or(1).max(1)
}

/// Replicas that `spec.accelerators.maxGPUs` allows, with the words for it; none where it bounds nothing.
pub fn gpu_budget(spec: &Spec, plan: &PlanStatus) -> Option<(u32, String)> {
    let each = gpus_per_replica(plan);
    let budget = spec.preferences.gpus_max.filter(|_| each > 0)?;
    let why = format!("spec.accelerators.maxGPUs is {budget} and a replica holds {each}");
    Some((budget / each, why))
}

/// The bounds of the loop, without quotas.
pub fn bounds(scaling: &Scaling, spec: &Spec, plan: &PlanStatus) -> Bounds {
    let own = (scaling.max, format!("spec.scaling.max is {}", scaling.max));
    let (max, max_because) = match gpu_budget(spec, plan) {
        Some(budget) if budget.0 < own.0 => budget,
        _ => own,
    };
    Bounds { min: scaling.min, max, max_because }
}

/// The same under the quotas of the namespace, which let `desired` replicas be: they bound only what is new.
pub fn under_quotas(
    bounds: Bounds,
    desired: u32,
    pod_template: &Value,
    quotas: &[ResourceQuota],
) -> Bounds {
    let asks = asks(pod_template);
    let tightest = quotas.iter().filter_map(|quota| room(quota, &asks)).min_by_key(|room| room.0);
    match tightest {
        Some((more, why)) if desired.saturating_add(more) < bounds.max => {
            Bounds { max: desired + more, max_because: why, ..bounds }
        }
        _ => bounds,
    }
}

/// What one pod asks of a quota, in thousandths by the quota's names.
fn asks(pod_template: &Value) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::from([("pods".to_owned(), 1000), ("count/pods".to_owned(), 1000)]);
    let containers = pod_template["spec"]["containers"].as_array().into_iter().flatten();
    for container in containers {
        let resources: ResourceRequirements =
            serde_json::from_value(container["resources"].clone()).unwrap_or_default();
        let mut add = |prefix: &str, resources: Option<BTreeMap<String, Quantity>>| {
            for (name, Quantity(text)) in resources.into_iter().flatten() {
                let millis = amount::millis(&text).unwrap_or(0);
                *sums.entry(format!("{prefix}{name}")).or_default() += millis;
                if prefix == "requests." && matches!(name.as_str(), "cpu" | "memory") {
                    *sums.entry(name).or_default() += millis;
                }
            }
        };
        add("requests.", resources.requests);
        add("limits.", resources.limits);
    }
    sums
}

/// How many such pods a quota still lets in, and the words for it. Quotas of a part of the pods are left to the API server.
fn room(quota: &ResourceQuota, asks: &BTreeMap<String, u64>) -> Option<(u32, String)> {
    let status = quota.status.as_ref()?;
    if quota.spec.as_ref().is_none_or(plan::is_scoped) {
        return None;
    }
    let name = quota.metadata.name.as_deref().unwrap_or_default();
    let used = |resource: &str| {
        let held = status.used.as_ref().and_then(|used| used.get(resource));
        held.and_then(|Quantity(text)| amount::millis(text)).unwrap_or(0)
    };
    let hard = status.hard.iter().flatten();
    let rooms = hard.filter_map(|(resource, Quantity(text))| {
        let each = asks.get(resource).copied().filter(|each| *each > 0)?;
        let left = amount::millis(text).unwrap_or(0).saturating_sub(used(resource));
        let more = u32::try_from(left / each).unwrap_or(u32::MAX);
        Some((more, format!("ResourceQuota {name} allows {text} of {resource}")))
    });
    rooms.min_by_key(|room| room.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fields::overlay;
    use crate::revision::fixtures;

    fn spec(fields: Value) -> Spec {
        let mut whole = json!({"scaling": {"min": 2, "max": 9}});
        overlay(&mut whole, &fields);
        crate::plan::tests::spec(whole)
    }

    fn plan(accelerator: &str, tensor_parallel: i32) -> PlanStatus {
        fixtures::plan(&json!({"accelerator": accelerator, "tensorParallel": tensor_parallel}))
    }

    fn bounds_of(spec: &Spec, plan: &PlanStatus) -> Bounds {
        bounds(&spec.scaling.unwrap(), spec, plan)
    }

    #[test]
    fn dynamo_11220_the_gpu_budget_bounds_whatever_the_spec_allows() {
        let held = spec(json!({"accelerators": {"maxGPUs": 7}}));
        let bounds = bounds_of(&held, &plan("nvidia-h200", 2));
        assert_eq!((bounds.min, bounds.max), (2, 3), "7 GPUs are three pairs");
        assert!(bounds.max_because.contains("maxGPUs is 7 and a replica holds 2"));
        assert_eq!(bounds_of(&held, &plan("nvidia-h200", 8)).max, 0, "not one has room");
        assert_eq!(bounds_of(&held, &plan("cpu", 1)).max, 9, "CPUs are no GPUs");
        assert_eq!(bounds_of(&spec(json!({})), &plan("nvidia-h200", 2)).max, 9);
    }

    fn quota(hard: Value, used: Value) -> ResourceQuota {
        serde_json::from_value(json!({"metadata": {"name": "team"}, "spec": {"hard": hard},
            "status": {"hard": hard, "used": used}}))
        .unwrap()
    }

    #[test]
    fn a_quota_bounds_what_is_new_by_its_scarcest_resource() {
        let template = json!({"spec": {"containers": [{"resources": {
            "requests": {"cpu": "500m", "memory": "1Gi", "nvidia.com/gpu": "1"},
            "limits": {"memory": "2Gi", "nvidia.com/gpu": "1"}}}]}});
        let nine = bounds_of(&spec(json!({})), &plan("cpu", 1));
        let under = |quotas: &[ResourceQuota]| under_quotas(nine.clone(), 3, &template, quotas);
        let gpus = quota(
            json!({"requests.nvidia.com/gpu": "5", "pods": "20"}),
            json!({"requests.nvidia.com/gpu": "3", "pods": "3"}),
        );
        assert_eq!(under(std::slice::from_ref(&gpus)).max, 5);
        assert!(
            under(std::slice::from_ref(&gpus))
                .max_because
                .contains("team allows 5 of requests.nvidia.com/gpu")
        );
        let memory =
            quota(json!({"limits.memory": "7Gi", "cpu": "10"}), json!({"limits.memory": "6Gi"}));
        assert_eq!(under(&[gpus, memory]).max, 3, "1 GiB is no room for a limit of 2 GiB");
        let ample = quota(json!({"pods": "100", "services": "0"}), json!({"pods": "3"}));
        assert_eq!(under(&[ample]), nine);
        let mut scoped = quota(json!({"pods": "3"}), json!({"pods": "3"}));
        scoped.spec.as_mut().unwrap().scopes = Some(vec!["Terminating".to_owned()]);
        assert_eq!(under(&[scoped]), nine);
    }
}

//! Quotas of a namespace enter; what it may still ask for leaves. Pure. Quotas with a scope hold for some pods only, and are not
//! reckoned with.

use k8s_openapi::api::core::v1::{ResourceQuota, ResourceQuotaSpec};

use super::cards::RESOURCE;
use crate::amount;

/// What a namespace may still ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// None where no quota speaks of GPUs.
    pub gpus: Option<u64>,
}

/// The tightest of all quotas; `own` GPUs are held by pods that a new plan replaces.
pub fn quota(quotas: &[ResourceQuota], own: u64) -> Quota {
    let left = quotas.iter().filter_map(|quota| gpus_left(quota, own));
    Quota { gpus: left.min() }
}

/// Whether a quota holds for a part of the pods only.
pub fn is_scoped(spec: &ResourceQuotaSpec) -> bool {
    spec.scope_selector.is_some() || spec.scopes.as_ref().is_some_and(|scopes| !scopes.is_empty())
}

fn gpus_left(quota: &ResourceQuota, own: u64) -> Option<u64> {
    let spec = quota.spec.as_ref().filter(|spec| !is_scoped(spec))?;
    let name = format!("requests.{RESOURCE}");
    let hard = &spec.hard.as_ref()?.get(&name)?.0;
    // Quantities of zero are none that `amount` reads.
    let amount = |text: &str| amount::units(text).unwrap_or(0);
    let status = quota.status.as_ref().and_then(|status| status.used.as_ref());
    let used = status.and_then(|used| used.get(&name)).map_or(0, |used| amount(&used.0));
    Some((amount(hard) + own).saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(quotas: Value, own: u64) -> Option<u64> {
        let quotas: Vec<ResourceQuota> = serde_json::from_value(quotas).unwrap();
        quota(&quotas, own).gpus
    }

    #[test]
    fn the_tightest_quota_counts_and_our_own_pods_give_theirs_back() {
        let one = |hard: &str, used: &str| {
            json!({"spec": {"hard": {"requests.nvidia.com/gpu": hard, "pods": "9"}},
                "status": {"used": {"requests.nvidia.com/gpu": used}}})
        };
        assert_eq!(of(json!([one("8", "5"), one("4", "0")]), 0), Some(3));
        assert_eq!(of(json!([one("8", "8")]), 2), Some(2));
        assert_eq!(of(json!([one("0", "0")]), 0), Some(0));
        assert_eq!(of(json!([{"spec": {"hard": {"pods": "9"}}}]), 0), None);
        let scoped =
            json!([{"spec": {"hard": {"requests.nvidia.com/gpu": "1"}, "scopes": ["BestEffort"]}}]);
        assert_eq!(of(scoped, 0), None);
        assert_eq!(of(json!([]), 0), None);
    }
}

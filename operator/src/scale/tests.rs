//! What the loop and the reconcile hand to each other.

use serde_json::json;

use super::*;
use crate::plan::tests::spec;
use crate::revision::fixtures;

fn plan() -> PlanStatus {
    fixtures::plan(&json!({"accelerator": "nvidia-h200", "dtype": "BF16", "tensorParallel": 2,
        "cache": {"dtype": "BF16"}}))
}

#[test]
fn scaling_overrides_replicas_and_the_gpu_budget_bounds_both() {
    let by_hand = spec(json!({"replicas": 5}));
    assert_eq!(replicas(&by_hand, None, Some(&plan())), (5, None));
    let bounded = spec(json!({"replicas": 5, "accelerators": {"maxGPUs": 6}}));
    let (count, why) = replicas(&bounded, None, Some(&plan()));
    assert_eq!((count, why.is_some()), (3, true));
    assert_eq!(replicas(&bounded, None, None).0, 5, "what one holds is not known before the plan");
    let scaled = spec(json!({"replicas": 5, "scaling": {"max": 9}}));
    let scaling = begin(&scaled.scaling.unwrap(), None);
    assert_eq!(replicas(&scaled, Some(&scaling), Some(&plan())), (1, None));
    let suspended = spec(json!({"scaling": {"max": 9}, "suspend": true}));
    assert_eq!(replicas(&suspended, Some(&scaling), Some(&plan())), (0, None));
}

#[test]
fn a_lost_status_goes_on_with_the_pods_there_are() {
    let scaling = spec(json!({"scaling": {"min": 2, "max": 4}})).scaling.unwrap();
    let at = |deployed| standing(&scaling, None, None, deployed).desired;
    assert_eq!([None, Some(0), Some(3), Some(9)].map(at), [2, 2, 3, 4]);
    let status = ScalingStatus { desired: 4, ..begin(&scaling, None) };
    assert_eq!(standing(&scaling, None, Some(&status), Some(2)).desired, 4);
    let newer =
        Advice { scaling: Some(ScalingStatus { desired: 3, ..status.clone() }), said: None };
    assert_eq!(standing(&scaling, Some(&newer), Some(&status), Some(2)).desired, 3);
}

#[test]
fn status_keeps_five_decisions_and_brings_back_what_it_was_given() {
    let scaling = spec(json!({"scaling": {"max": 9}})).scaling.unwrap();
    let mut status = begin(&scaling, None);
    status.limit = Some("spec.scaling.max is 9".to_owned());
    let capacity = Some(Capacity { requests_per_second: 0.25, seen_at: 90 });
    for to in 2..=8 {
        status = decided(&status, to, "it grows", capacity, Some("a-1"), 100 + i64::from(to));
    }
    assert_eq!(status.recent.len(), DECISIONS_MAX);
    assert_eq!((status.recent[0].from, status.recent[0].to), (7, 8));
    assert_eq!((status.desired, &status.limit), (8, &None));
    let back = kept(&status, Some("a-1"));
    assert_eq!((back.desired, back.decided_at, back.capacity), (8, 108, capacity));
    assert_eq!(kept(&status, Some("a-2")).capacity, None, "another revision is another engine");
}

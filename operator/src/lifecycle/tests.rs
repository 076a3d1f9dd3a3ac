use k8s_openapi::api::core::v1::Node;
use plimsoll_crds::{PlanCause, PlanChange};
use serde_json::json;

use super::*;
use crate::plan::cards::Card;
use crate::plan::tests::{facts, node, spec};
use crate::plan::{NodeResources, Prices, Question};

const GIB: u64 = 1 << 30;

fn with_card(memory_bytes: u64, product: &str, card_bytes: u64) -> NodeResources {
    let card = Card {
        product: product.to_owned(),
        memory_bytes: card_bytes,
        driver_bytes: GIB,
        used_bytes: 0,
    };
    let gpus = Gpus::Card(card);
    NodeResources { gpus, gpu_count: 1, name: product.to_owned(), ..node(memory_bytes) }
}

fn plans(nodes: &[NodeResources]) -> Vec<Plan> {
    let (spec, facts, prices) = (spec(json!({})), facts(), Prices::default());
    plan::choose_among(&Question::of(&spec, &facts, nodes, &prices)).1
}

fn status(nodes: &[NodeResources]) -> PlanStatus {
    let outcome = plan::plan(&spec(json!({})), &facts(), nodes);
    plan::status(&outcome, outcome.chosen.as_ref().unwrap())
}

fn policy(manual: bool, pinned: Option<&str>) -> PlanPolicy {
    PlanPolicy { manual, pinned_hash: pinned.map(str::to_owned) }
}

#[test]
fn the_best_of_the_plans_that_fit_is_the_one_that_is_chosen() {
    for nodes in
        [vec![node(64 * GIB)], vec![node(64 * GIB), with_card(64 * GIB, "NVIDIA-L4", 22 * GIB)]]
    {
        let outcome = plan::plan(&spec(json!({})), &facts(), &nodes);
        assert_eq!(plans(&nodes).first(), outcome.chosen.as_ref());
    }
    assert!(plans(&[node(GIB)]).is_empty());
}

#[test]
fn manual_waits_for_a_hash_and_a_hash_binds_auto_too() {
    let feasible = plans(&[node(64 * GIB)]);
    let [best, second] = &feasible[..] else { panic!("F32 and F16 fit: {feasible:?}") };
    let cases = [
        (policy(false, None), best, None),
        (policy(true, None), best, Some(Reason::PlanNotPinned)),
        (policy(true, Some(&best.hash)), best, None),
        (policy(true, Some(&second.hash)), second, None),
        (policy(false, Some(&second.hash)), second, None),
        (policy(true, Some("0badcafe")), best, Some(Reason::PinnedPlanGone)),
        (policy(false, Some("0badcafe")), best, Some(Reason::PinnedPlanGone)),
    ];
    for (policy, plan, waits) in cases {
        assert_eq!(choose(&policy, &feasible), Some(Choice { plan, waits }), "{policy:?}");
    }
    assert_eq!(choose(&policy(false, None), &[]), None);
}

#[test]
fn what_waits_names_the_line_to_write_and_what_would_change() {
    let mut proposal = status(&[node(64 * GIB)]);
    let said = waits(&policy(true, None), &proposal);
    let line = format!("waits for spec.plan.pinnedHash: {}", proposal.hash);
    assert!(said.message.starts_with(&line), "{}", said.message);
    assert_eq!((said.holds, said.reason), (Some(false), Reason::PlanNotPinned));
    proposal.changed = Some(PlanChange {
        from: "11aa22bb".to_owned(),
        cause: PlanCause::SpecChanged,
        values: vec!["dtype: F16 → F32".to_owned()],
    });
    let said = waits(&policy(false, Some("0badcafe")), &proposal);
    assert_eq!(said.reason, Reason::PinnedPlanGone);
    for part in ["0badcafe", &proposal.hash, "or remove it", "against 11aa22bb: dtype: F16 → F32"]
    {
        assert!(said.message.contains(part), "{}", said.message);
    }
    assert!(!waits(&policy(true, Some("0badcafe")), &proposal).message.contains("or remove it"));
}

#[test]
fn better_is_another_way_to_run_or_a_longer_context_and_never_a_lesser_plan() {
    let roomy = node(64 * GIB);
    let running = status(std::slice::from_ref(&roomy));
    assert_eq!(better(&running, &plans(&[node(256 * GIB)])), None, "more memory for the same");
    let with_gpu = plans(&[roomy.clone(), with_card(64 * GIB, "NVIDIA-H200", 140 * GIB)]);
    let offered = better(&running, &with_gpu).unwrap();
    assert_eq!(offered.accelerator, "nvidia-h200");
    // A node that shrank has worse plans alone, and what runs goes on.
    assert_eq!(better(&running, &plans(&[node(4 * GIB)])), None);
    assert_eq!(better(&running, &[]), None);
    // The context was cut to what a small node held.
    let cut = status(&[node(7 * GIB)]);
    assert!(cut.context_tokens < 131_072, "{cut:?}");
    assert_eq!(better(&cut, &plans(&[roomy])).unwrap().context_tokens, 131_072);
}

#[test]
fn a_class_is_gone_when_no_node_of_it_is_left_and_not_when_one_is_cordoned() {
    let gpu = |product: &str, spec: serde_json::Value| -> Arc<Node> {
        let labels = json!({"nvidia.com/gpu.product": product, "nvidia.com/gpu.memory": "143771"});
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": product, "labels": labels}, "spec": spec,
                "status": {"allocatable": {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"}},
            }))
            .unwrap(),
        )
    };
    let there = [gpu("NVIDIA-H200", json!({"unschedulable": true}))];
    assert!(!class_is_gone(&there, "nvidia-h200"));
    assert!(!class_is_gone(&there, "cpu"), "every node has a CPU");
    assert!(class_is_gone(&there, "nvidia-l4"));
    assert!(class_is_gone(&[], "cpu"));
}

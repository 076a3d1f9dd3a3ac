//! What holds for every plan, over random models, machines and wishes; and how long planning takes.

use std::time::{Duration, Instant};

use plimsoll_crds::Objective;
use proptest::prelude::*;
use serde_json::json;

use super::gpus::gpu_node;
use super::*;

fn any_facts() -> impl Strategy<Value = ModelFacts> {
    (1u32..=80, 1u32..=16, 1u32..=8, 6u32..=8, 1u64..=80_000_000_000, 64u32..=262_144).prop_map(
        |(layers, kv_heads, groups, log_head_dim, parameters, context_tokens)| ModelFacts {
            layers,
            kv_heads,
            heads: kv_heads * groups,
            head_dim: 1 << log_head_dim,
            hidden: (kv_heads * groups) << log_head_dim,
            parameters: ParametersByRole { mlp: parameters, ..Default::default() },
            context_tokens,
            ..facts()
        },
    )
}

fn any_spec() -> impl Strategy<Value = Spec> {
    let tokens = || proptest::option::of(64i64..=200_000);
    let workload = (tokens(), tokens(), proptest::option::of(1i32..=256));
    (workload, tokens(), tokens(), proptest::option::of(1u64..=200), any::<bool>()).prop_map(
        |((prompt, output, concurrency), context, cache, memory, half)| Spec {
            workload: crate::spec::Workload {
                prompt_tokens: prompt.map(|tokens| tokens as u32),
                output_tokens: output.map(|tokens| tokens as u32),
                concurrency: concurrency.map(|requests| requests as u32),
            },
            context_tokens: context.map(|tokens| tokens as u32),
            cache_tokens: cache.map(|tokens| tokens.max(context.unwrap_or(64)) as u64),
            preferences: crate::spec::Preferences {
                cache_dtype: half.then_some(KvDtype::F16),
                ..Default::default()
            },
            budget: crate::spec::Budget {
                memory_bytes: memory.map(|gib| gib * GIB),
                cpu_millis: None,
            },
            ..spec(json!({}))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn more_memory_never_makes_a_plan_infeasible_nor_serves_less(
        spec in any_spec(), facts in any_facts(), small in 1u64..=200, more in 1u64..=200,
    ) {
        let before = plan(&spec, &facts, &[node(small * GIB)]);
        let after = plan(&spec, &facts, &[node((small + more) * GIB)]);
        if let Some(before) = before.chosen {
            let after = after.chosen.expect("more memory never makes a plan infeasible");
            prop_assert!(after.dtype <= before.dtype || after.cache.tokens >= before.cache.tokens);
            if after.dtype == before.dtype {
                prop_assert!(after.cache.tokens >= before.cache.tokens);
                prop_assert!(after.context_tokens >= before.context_tokens);
            }
        }
    }

    #[test]
    fn a_chosen_plan_fits_and_serves_its_longest_request(
        spec in any_spec(), facts in any_facts(), memory in 1u64..=400,
    ) {
        if let Some(chosen) = plan(&spec, &facts, &[node(memory * GIB)]).chosen {
            prop_assert!(chosen.memory.total() <= chosen.capacity);
            prop_assert!(u64::from(chosen.context_tokens) <= chosen.cache.tokens);
            prop_assert!(chosen.context_tokens <= facts.context_tokens);
            if let Some(context) = spec.context_tokens {
                prop_assert_eq!(chosen.context_tokens, context);
            }
            if let Some(budget) = spec.budget.memory_bytes {
                prop_assert!(chosen.memory.total() <= budget);
            }
        }
    }

    #[test]
    fn a_plan_for_a_gpu_fits_its_card_and_is_taken_wherever_it_fits(
        spec in any_spec(), facts in any_facts(), gib in 1u64..=200, memory in 1u64..=400,
    ) {
        let gpu = gpu_node("g", "NVIDIA-X", gib << 10);
        let alone = NodeResources { open_to: OpenTo::GpuPods, ..gpu.clone() };
        let fits = plan(&spec, &facts, std::slice::from_ref(&alone)).chosen;
        let beside = plan(&spec, &facts, &[alone, node(memory * GIB)]).chosen;
        if let Some(fits) = fits {
            prop_assert!(fits.memory.total() <= fits.capacity);
            prop_assert!(fits.capacity < gib * GIB);
            prop_assert!(u64::from(fits.context_tokens) <= fits.cache.tokens);
            prop_assert_eq!(Some(fits), beside);
        } else {
            let without = plan(&spec, &facts, &[node(memory * GIB)]).chosen;
            prop_assert_eq!(without, beside);
        }
    }

    #[test]
    fn the_order_of_nodes_does_not_matter(
        spec in any_spec(), facts in any_facts(), sizes in prop::collection::vec(1u64..=400, 0..6),
    ) {
        let mut nodes: Vec<_> = sizes
            .iter()
            .enumerate()
            .map(|(index, gib)| match gib % 7 {
                5 | 6 => gpu_node(&index.to_string(), &format!("NVIDIA-{}", gib % 3), gib % 4 * 9000),
                few => NodeResources { name: index.to_string(), ..node(few * GIB) },
            })
            .collect();
        let forward = plan(&spec, &facts, &nodes);
        nodes.reverse();
        prop_assert_eq!(forward, plan(&spec, &facts, &nodes));
    }
}

/// Cards whose speed is known, by a number.
fn any_card(number: usize) -> NodeResources {
    let cards: Vec<_> = figures::all().collect();
    let card = cards[number % cards.len()];
    gpu_node(card.product, card.product, card.memory_mebibytes)
}

fn with_slo(spec: &Spec, objective: usize, tpot: Option<u64>) -> Spec {
    let objectives =
        [None, Some(Objective::Latency), Some(Objective::Throughput), Some(Objective::Cost)];
    let mut spec = spec.clone();
    spec.preferences.objective = objectives[objective % 4];
    spec.preferences.slo.tpot = tpot;
    spec.preferences.cache_dtype = None;
    spec.budget.memory_bytes = None;
    spec
}

/// From no bound to a loose one, and from that to a strict one.
fn stricter_is_no_slower(
    planned: impl Fn(Option<u64>) -> Option<Plan>,
    time: impl Fn(cost::Predicted) -> u64,
    loose: u64,
    strict: u64,
) -> Result<(), TestCaseError> {
    for (before, bound) in [(None, loose), (Some(loose), strict)] {
        let (before, after) = (planned(before), planned(Some(bound)));
        let Some(after) = after else { continue };
        let taken = after.predicted.map(&time).expect("an slo needs figures");
        prop_assert!(taken <= bound);
        let before = before.expect("a stricter bound never makes a plan possible");
        if let Some(then) = before.predicted.map(&time) {
            prop_assert!(taken <= then || then <= bound && before.hash == after.hash);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn a_stricter_slo_never_picks_a_slower_plan(
        spec in any_spec(), facts in any_facts(), objective in 0usize..4,
        cards in prop::collection::vec(0usize..100, 1..5),
        loose in 1_000u64..1_000_000, share in 1u64..=1000,
    ) {
        let mut nodes: Vec<_> = cards.into_iter().map(any_card).collect();
        nodes.push(node(400 * GIB));
        let planned = |tpot| plan(&with_slo(&spec, objective, tpot), &facts, &nodes).chosen;
        stricter_is_no_slower(planned, |times| times.tpot, loose, loose * share / 1000)?;
    }

    #[test]
    fn a_stricter_time_to_first_token_never_picks_a_slower_plan(
        spec in any_spec(), facts in any_facts(), objective in 0usize..4,
        cards in prop::collection::vec(0usize..100, 1..5),
        loose in 10_000u64..100_000_000, share in 1u64..=1000,
    ) {
        let mut nodes: Vec<_> = cards.into_iter().map(any_card).collect();
        nodes.push(node(400 * GIB));
        let planned = |ttft| {
            let mut spec = with_slo(&spec, objective, None);
            spec.preferences.slo.ttft = ttft;
            plan(&spec, &facts, &nodes).chosen
        };
        stricter_is_no_slower(planned, |times| times.ttft, loose, loose * share / 1000)?;
    }

    #[test]
    fn more_memory_of_a_card_never_makes_a_plan_infeasible(
        spec in any_spec(), facts in any_facts(), objective in 0usize..4, card in 0usize..100,
        more in 0u64..100_000, tpot in prop::option::of(1_000u64..1_000_000),
    ) {
        let spec = with_slo(&spec, objective, tpot);
        let small = any_card(card);
        let cards::Gpus::Card(card) = &small.gpus else { panic!("a card") };
        let mebibytes = card.memory_bytes / MIB + more;
        let large = gpu_node(&card.product, &card.product, mebibytes);
        let gpu_only = |node: NodeResources| NodeResources { open_to: OpenTo::GpuPods, ..node };
        let before = plan(&spec, &facts, &[gpu_only(small)]).chosen;
        let after = plan(&spec, &facts, &[gpu_only(large)]).chosen;
        if let Some(before) = before {
            let after = after.expect("more memory never makes a plan infeasible");
            prop_assert!(after.cache.tokens >= before.cache.tokens);
            prop_assert!(after.memory.total() <= after.capacity);
        }
    }

    #[test]
    fn budgets_of_gpus_are_kept(
        spec in any_spec(), facts in any_facts(), objective in 0usize..4,
        cards in prop::collection::vec(0usize..100, 0..4),
        replicas in 0u32..20, bound in 0u32..20,
    ) {
        let mut spec = with_slo(&spec, objective, None);
        spec.replicas = replicas;
        spec.preferences.gpus_max = Some(bound);
        let nodes: Vec<_> = cards.into_iter().map(any_card).chain([node(400 * GIB)]).collect();
        if let Some(chosen) = plan(&spec, &facts, &nodes).chosen
            && chosen.device != Device::Cpu
        {
            prop_assert!(chosen.tensor_parallel * replicas.max(1) <= bound);
            let (update, _) = room(&spec, &chosen, &nodes);
            if update == Update::Surge {
                prop_assert!(chosen.tensor_parallel * (replicas.max(1) + 1) <= bound);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn everything_that_could_be_had_fits_its_card(
        spec in any_spec(), facts in any_facts(), card in 0usize..100,
    ) {
        let nodes = [any_card(card)];
        let prices = Prices::default();
        let outcome = choose(&Question {
            spec: &spec,
            facts: &facts,
            nodes: &nodes,
            quota: Quota::default(),
            overruns: &[],
            prices: &prices,
            scope: Scope::Everything,
        });
        for other in outcome.rejected.iter().filter(|other| other.predicted.is_some()) {
            let memory = other.memory.expect("what has a speed has a size");
            prop_assert!(memory.total() <= other.capacity, "{other:?}");
        }
    }
}

fn takes_less_than_a_millisecond(spec: &Spec, nodes: &[NodeResources]) {
    let facts = facts();
    let fastest = (0..20)
        .map(|_| {
            let start = Instant::now();
            assert!(plan(spec, &facts, nodes).chosen.is_some());
            start.elapsed()
        })
        .min()
        .unwrap();
    assert!(fastest < Duration::from_millis(1), "{fastest:?}");
}

#[test]
fn a_plan_over_a_thousand_nodes_with_all_kinds_of_cards_takes_less_than_a_millisecond() {
    let nodes: Vec<_> = (0..1000)
        .map(|index| NodeResources { name: index.to_string(), ..any_card(index) })
        .collect();
    let spec = spec(json!({"objective": "Cost", "slo": {"tpotMilliseconds": 50}}));
    takes_less_than_a_millisecond(&spec, &nodes);
}

#[test]
fn a_plan_over_a_thousand_nodes_takes_less_than_a_millisecond() {
    let nodes: Vec<_> = (1..=1000).map(|index| node(index * GIB)).collect();
    let spec = spec(json!({}));
    takes_less_than_a_millisecond(&spec, &nodes);
}

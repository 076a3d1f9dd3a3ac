//! What objective, slo, quality, budgets and neighbours change. Tests that bear the number of a thread hold what its users
//! complained about.

use serde_json::{Value, json};

use super::gpus::{gpu_node, h200};
use super::speed::eight_billion;
use super::*;

fn l4() -> NodeResources {
    NodeResources { name: "small".to_owned(), ..gpu_node("small", "NVIDIA-L4", 23_034) }
}

fn asked(spec: &Spec, facts: &ModelFacts, nodes: &[NodeResources], prices: &Prices) -> PlanOutcome {
    choose(&Question {
        spec,
        facts,
        nodes,
        quota: Quota::default(),
        overruns: &[],
        prices,
        scope: Scope::Runnable,
    })
}

fn everything(fields: Value, facts: &ModelFacts, nodes: &str) -> PlanOutcome {
    let parts: Vec<_> = nodes.split(',').map(str::to_owned).collect();
    let nodes = what_if::nodes(&parts, what_if::Host::default()).unwrap();
    let spec = spec(fields);
    choose(&Question {
        spec: &spec,
        facts,
        nodes: &nodes,
        quota: Quota::default(),
        overruns: &[],
        prices: &Prices::default(),
        scope: Scope::Everything,
    })
}

fn found<'a>(outcome: &'a PlanOutcome, candidate: &str) -> &'a Rejected {
    let of = |rejected: &&Rejected| rejected.candidate == candidate;
    outcome.rejected.iter().find(of).unwrap_or_else(|| panic!("no {candidate} in {outcome:#?}"))
}

fn classes(fields: Value) -> Vec<String> {
    let outcome = plan(&spec(fields), &facts(), &[h200(), l4()]);
    let chosen = outcome.chosen.map(|plan| plan.accelerator);
    chosen.into_iter().chain(outcome.rejected.into_iter().map(|r| r.why)).collect()
}

#[test]
fn the_objective_decides_which_card_and_says_by_what_figure_the_other_lost() {
    assert_eq!(classes(json!({}))[0], "nvidia-l4", "the smallest card that carries the load");
    let fast = classes(json!({"objective": "Latency"}));
    assert_eq!(fast[0], "nvidia-h200");
    // 2.47 GB of weights and 1.6 GB of KV (32 requests of 1,536 tokens on average) at 0.27 and at 4.3 TB/s.
    assert!(fast[1].starts_with("TPOT 1") && fast[1].contains("against TPOT 1."), "{fast:?}");
    let busy = classes(json!({"objective": "Throughput"}));
    assert_eq!(busy[0], "nvidia-h200");
    assert!(busy[1].contains("tokens/s of each GPU against"), "{busy:?}");
    let cheap = classes(json!({"objective": "Cost"}));
    assert_eq!(cheap[0], "nvidia-h200", "sixteen times as fast at ten times the price");
    assert!(cheap[1].contains("per million tokens against $"), "{cheap:?}");
}

#[test]
fn other_prices_make_another_card_the_cheapest() {
    let prices = Prices::overridden(&json!({"nvidia-l4": 0.05})).unwrap();
    let spec = spec(json!({"objective": "Cost"}));
    let outcome = asked(&spec, &facts(), &[h200(), l4()], &prices);
    let chosen = outcome.chosen.unwrap();
    assert_eq!(chosen.accelerator, "nvidia-l4");
    assert!(chosen.why.contains("the cheapest per token of 4 that run and fit"), "{}", chosen.why);
    let predicted = chosen.predicted.unwrap();
    // Dollars of an hour over millions of tokens of an hour.
    let per_million = 0.05 / (predicted.tokens_per_second as f64 * 3600.0 / 1e6);
    let off = predicted.microdollars.unwrap() as f64 / (per_million * 1e6) - 1.0;
    assert!(off.abs() < 0.01, "{predicted:?}");
}

#[test]
fn an_slo_rejects_what_would_break_it_with_both_figures() {
    let slo = |tpot: u32| json!({"slo": {"tpotMilliseconds": tpot}});
    let loose = plan(&spec(slo(500)), &facts(), &[h200(), l4()]);
    assert_eq!(loose.chosen.unwrap().accelerator, "nvidia-l4");
    let tight = plan(&spec(slo(10)), &facts(), &[h200(), l4()]);
    assert_eq!(tight.chosen.as_ref().unwrap().accelerator, "nvidia-h200");
    let lost = found(&tight, "None · BF16 · TP 1 · nvidia-l4");
    assert_eq!(lost.reason, Reason::SloUnattainable);
    assert!(lost.why.starts_with("TPOT ") && lost.why.ends_with(" ms > slo 10 ms"), "{}", lost.why);
    assert_eq!(lost.miss.unwrap().unit, Unit::Microseconds);
    let impossible = plan(&spec(slo(1)), &facts(), &[h200(), l4(), node(64 * GIB)]);
    let (reason, message) = impossible.refusal().unwrap();
    assert_eq!(reason, Reason::SloUnattainable);
    assert!(message.contains("> slo 1.0 ms") && message.contains("no speed is known of cpu"));
    let first = json!({"slo": {"ttftMilliseconds": 20}, "workload": {"promptTokens": 8192, "outputTokens": 8}});
    let (reason, message) = plan(&spec(first), &facts(), &[h200()]).refusal().unwrap();
    assert_eq!(reason, Reason::SloUnattainable);
    assert!(message.contains(": TTFT ") && message.contains("> slo 20 ms"), "{message}");
}

/// A budget of GPUs must not be exceeded by planning (50 of 32, dynamo#8583) nor fall away in silence (dynamo#11220).
#[test]
fn dynamo_8583_and_11220_a_budget_of_gpus_is_a_hard_bound() {
    let fields = |replicas: u32| json!({"replicas": replicas, "accelerators": {"maxGPUs": 1}});
    let kept = plan(&spec(fields(1)), &facts(), &[h200()]);
    assert_eq!(kept.chosen.as_ref().unwrap().accelerator, "nvidia-h200");
    // One pod more while it is updated would be one GPU more.
    let (update, said) = room(&spec(fields(1)), &kept.chosen.unwrap(), &[h200()]);
    assert_eq!(update, Update::InPlace);
    assert!(said.contains("would exceed spec.accelerators.maxGPUs 1"), "{said}");
    let outcome = plan(&spec(fields(2)), &facts(), &[h200()]);
    let rejected = found(&outcome, "None · BF16 · TP 1 · nvidia-h200");
    assert_eq!(rejected.why, "2 GPUs > maxGPUs 1");
    assert_eq!(rejected.miss, Some(Miss::new(Unit::Gpus, 2, 1)));
    assert_eq!(outcome.chosen.unwrap().accelerator, "cpu");
    let none = json!({"accelerators": {"maxGPUs": 0}});
    assert_eq!(plan(&spec(none), &facts(), &[h200()]).chosen.unwrap().accelerator, "cpu");

    let spec = spec(json!({"replicas": 3}));
    let quota = Quota { gpus: Some(2) };
    let prices = Prices::default();
    let (facts, nodes) = (facts(), [NodeResources { open_to: OpenTo::GpuPods, ..h200() }]);
    let question = Question {
        spec: &spec,
        facts: &facts,
        nodes: &nodes,
        quota,
        overruns: &[],
        prices: &prices,
        scope: Scope::Runnable,
    };
    assert_eq!(choose(&question).refusal().unwrap().1, "3 GPUs > quota 2");
}

/// One pod cannot have GPUs of several nodes (modelplane#32: 11 GPUs on one pod).
#[test]
fn modelplane_32_a_pod_never_asks_for_more_gpus_than_a_node_has() {
    let outcome = everything(json!({"tensorParallel": 8}), &eight_billion(), "nvidia-h200=4");
    let (_, why) = outcome.refusal().unwrap();
    assert!(why.contains("8 GPUs of one node > 4"), "{why}");
    let outcome = everything(json!({}), &eight_billion(), "nvidia-h200=3");
    assert!(outcome.rejected.iter().all(|other| !other.candidate.contains("TP 4")));
}

/// Sizes are those of one GPU, and the sentence says so (kaito#1838).
#[test]
fn kaito_1838_memory_on_several_gpus_is_that_of_each() {
    let fields = json!({"tensorParallel": 2, "quantization": "None", "contextTokens": 8192,
        "cache": {"dtype": "BF16", "strategy": "Dynamic"}});
    let outcome = everything(fields, &eight_billion(), "nvidia-a10=2");
    let two = found(&outcome, "None · BF16 · TP 2 · nvidia-a10");
    let weights = two.memory.unwrap().weights;
    // Half of all matrices; norms are whole on each.
    assert_eq!(weights, 2 * ((8_030_261_248 - 266_240) / 2 + 266_240));
    assert!(!two.runnable && two.why.contains("does not run it"), "{}", two.why);
    let tight = json!({"tensorParallel": 2, "cache": {"tokens": 1_000_000}});
    let outcome = everything(tight, &eight_billion(), "nvidia-a10=2");
    let two = found(&outcome, "None · BF16 · TP 2 · nvidia-a10");
    assert!(two.why.contains("on each of 2 nvidia-a10 of"), "{}", two.why);
}

/// A plan must leave what driver, context and graphs take (aiconfigurator#1396: 99.8 % of a card; kaito#1374: driver memory
/// uncounted), and a context that has no room is shortened and not promised (dynamo#10104).
#[test]
fn aiconfigurator_1396_kaito_1374_dynamo_10104_a_plan_leaves_what_others_take_and_promises_no_more()
{
    let l4 = l4();
    let chosen = plan(&spec(json!({})), &eight_billion(), &[l4]).chosen.unwrap();
    let whole = 23_034 * MIB;
    assert!(chosen.memory.total() <= whole - whole / 50 - 640 * MIB);
    assert!(chosen.memory.process >= 256 * MIB, "kernels and graphs");
    assert!(u64::from(chosen.context_tokens) <= chosen.cache.tokens);
    assert!(chosen.context_tokens < 131_072, "{}", chosen.context_tokens);
}

/// KV tokens were planned 2.7 times wrong (configiq#112): here by hand.
#[test]
fn configiq_112_tokens_of_the_cache_are_bytes_over_bytes_per_token() {
    let chosen = plan(&spec(json!({})), &eight_billion(), &[h200()]).chosen.unwrap();
    // 32 layers of 8 heads of 128 values, K and V, two bytes each.
    assert_eq!(chosen.memory.kv, chosen.cache.tokens * 131_072);
    let fp8 = json!({"cache": {"dtype": "FP8"}, "quantization": "None", "tensorParallel": 1});
    let outcome = everything(fp8, &eight_billion(), "nvidia-h200=1");
    let memory = found(&outcome, "None · BF16 · KV FP8 · TP 1 · nvidia-h200").memory.unwrap();
    assert_eq!(memory.kv, memory.kv_tokens * 65_536);
}

#[test]
fn nothing_is_quantized_below_the_floor_unless_it_is_named() {
    let names = |fields: Value| {
        let outcome = everything(fields, &eight_billion(), "nvidia-h200=1");
        let of = |part: &str| {
            let mut found = outcome.rejected.iter().filter(|r| r.candidate.starts_with(part));
            found.next().map(|rejected| rejected.why.clone()).unwrap_or_default()
        };
        (of("W4A16 · TP 1"), of("None · BF16 · KV INT4"))
    };
    let (four, kv) = names(json!({}));
    assert_eq!(four, "4 bits per weight < spec.quality.minWeightBits 8");
    assert_eq!(kv, "4 bits per key or value < spec.quality.minKvBits 8");
    let (four, kv) = names(json!({"quality": {"minWeightBits": 4, "minKvBits": 4}}));
    assert!(four.contains("does not run it") && kv.contains("does not run it"), "{four}; {kv}");
    let (four, _) = names(json!({"quantization": "W4A16"}));
    assert!(four.contains("does not run it"), "named in so many words: {four}");
    // A cluster's operator weighs what runs, and says that the rest does not.
    let outcome = plan(&spec(json!({"quantization": "W4A16"})), &facts(), &[h200()]);
    let (reason, why) = outcome.refusal().unwrap();
    assert_eq!(reason, Reason::InvalidSpec);
    assert!(why.contains("spec.quantization asks for W4A16, and this is None"), "{why}");
}

#[test]
fn a_checkpoint_that_is_quantized_on_disk_stays_as_it_is() {
    let awq = ModelFacts { quantization: Some("awq".to_owned()), ..eight_billion() };
    let outcome = everything(json!({}), &awq, "nvidia-h200=1");
    assert!(outcome.rejected.iter().all(|other| other.candidate.starts_with("W4A16")));
    // 4.156 bits of each of 6.98 billion, and 16 of the rest.
    let weights = found(&outcome, "W4A16 · TP 1 · nvidia-h200").memory.unwrap().weights;
    let matrices: u64 = (1_342_177_280 + 5_637_144_576) / 32;
    let others = 2 * (2 * 525_336_576 + 266_240);
    assert_eq!(weights, 32 * (matrices * 4156).div_ceil(8000) + others);
    let unknown = ModelFacts { quantization: Some("hqq".to_owned()), ..eight_billion() };
    let (reason, why) = everything(json!({}), &unknown, "nvidia-h200=1").refusal().unwrap();
    assert_eq!(reason, Reason::UnsupportedModel);
    assert!(why.contains("quantized on disk (hqq)"), "{why}");
}

#[test]
fn gpus_divide_heads_evenly_and_cards_multiply_only_what_they_have_units_for() {
    let odd = ModelFacts { kv_heads: 6, heads: 24, ..eight_billion() };
    let outcome = everything(json!({}), &odd, "nvidia-h200=8");
    let four = found(&outcome, "None · BF16 · TP 4 · nvidia-h200");
    assert_eq!(four.why, "4 GPUs cannot divide 6 KV heads evenly");
    let outcome = everything(json!({}), &eight_billion(), "nvidia-a100-80gb=1");
    let fp8 = found(&outcome, "W8A8-FP8 · TP 1 · nvidia-a100-80gb");
    assert_eq!(fp8.why, "nvidia-a100-80gb has no units that multiply FP8");
}

#[test]
fn a_class_that_is_full_gives_way_to_one_that_is_free_and_a_full_cluster_says_how_full() {
    let full = || NodeResources { asked_gpus: 8, ..l4() };
    let outcome = plan(&spec(json!({})), &facts(), &[h200(), full()]);
    assert_eq!(outcome.chosen.as_ref().unwrap().accelerator, "nvidia-h200");
    let why = &found(&outcome, "None · BF16 · TP 1 · nvidia-l4").why;
    assert!(
        why.ends_with("but 0 of 8 nvidia-l4 are free at the moment, and nvidia-h200 is"),
        "{why}"
    );
    let outcome = plan(&spec(json!({})), &facts(), &[full(), node(64 * GIB)]);
    let chosen = outcome.chosen.unwrap();
    assert_eq!(
        chosen.accelerator, "nvidia-l4",
        "a wait is better than a CPU that nobody asked for"
    );
    let (update, said) = room(&spec(json!({})), &chosen, &[full()]);
    assert_eq!(update, Update::InPlace);
    assert!(
        said.starts_with("room for 0 of 1 replica at the moment (0 of 8 nvidia-l4 are free)"),
        "{said}"
    );
    let one_left = NodeResources { asked_gpus: 7, ..l4() };
    let (update, said) = room(&spec(json!({})), &chosen, &[one_left]);
    assert_eq!((update, said.contains("no pod more")), (Update::InPlace, true), "{said}");
}

#[test]
fn only_classes_that_the_spec_lists_are_used() {
    let only = |class: &str| json!({"accelerators": {"classes": [class]}});
    let outcome = plan(&spec(only("nvidia-h200")), &facts(), &[h200(), l4()]);
    assert_eq!(outcome.chosen.as_ref().unwrap().accelerator, "nvidia-h200");
    let lost = found(&outcome, "None · BF16 · TP 1 · nvidia-l4");
    assert_eq!(lost.why, "spec.accelerators.classes allows nvidia-h200 only");
    let outcome = plan(&spec(only("cpu")), &facts(), &[h200()]);
    assert_eq!(outcome.chosen.unwrap().accelerator, "cpu");
    assert!(plan(&spec(only("nvidia-b200")), &facts(), &[h200()]).chosen.is_none());
}

#[test]
fn what_an_engine_took_beyond_its_plan_is_not_planned_with_again() {
    let spec = spec(json!({}));
    let (facts, nodes, prices) = (facts(), [l4()], Prices::default());
    let overruns = [Overrun { class: "nvidia-l4".to_owned(), bytes: GIB }];
    let question = Question {
        spec: &spec,
        facts: &facts,
        nodes: &nodes,
        quota: Quota::default(),
        overruns: &overruns,
        prices: &prices,
        scope: Scope::Runnable,
    };
    let (before, after) = (plan(&spec, &facts, &nodes), choose(&question));
    let (before, after) = (before.chosen.unwrap(), after.chosen.unwrap());
    assert_eq!(after.memory.process, before.memory.process + GIB);
    assert!(after.memory.total() <= after.capacity && after.hash != before.hash);
    assert!(after.cache.tokens < before.cache.tokens);
}

#[test]
fn strategies_have_the_memory_that_their_names_promise() {
    let load = json!({"workload": {"promptTokens": 7000, "outputTokens": 1000, "concurrency": 256},
        "contextTokens": 8192, "tensorParallel": 1, "quantization": "None", "cache": {"dtype": "BF16"}});
    let windowed = ModelFacts {
        sliding_window: Some(plimsoll_contract::facts::SlidingWindow { tokens: 1024, layers: 16 }),
        ..eight_billion()
    };
    let outcome = everything(load, &windowed, "nvidia-h100-80gb=1");
    let memory = |name: &str| {
        found(&outcome, &format!("None · BF16 · {name} · TP 1 · nvidia-h100-80gb")).memory.unwrap()
    };
    // Static: 256 sequences of 8,192 tokens at 128 KiB each, which no card of 80 GB holds beside the weights.
    assert_eq!(memory("Static").kv, 256 * 8192 * 131_072);
    // Half of the layers keep an eighth of a sequence of full length.
    let sliding = memory("SlidingWindow");
    assert_eq!(sliding.kv, sliding.kv_tokens * 131_072 * 9 / 16);
    let dynamic = outcome.chosen.as_ref().unwrap();
    assert!(sliding.kv_tokens > dynamic.cache.tokens * 3 / 2);
    let offloaded = found(&outcome, "None · BF16 · Offloaded · TP 1 · nvidia-h100-80gb");
    let slower = offloaded.predicted.unwrap().tpot;
    assert!(slower > 2 * dynamic.predicted.unwrap().tpot, "KV over PCIe: {slower} µs");
}

#[test]
fn flags_name_what_is_not_usual() {
    let spec = spec(json!({}));
    let chosen = plan(&spec, &facts(), &[h200()]).chosen.unwrap();
    let other = Plan {
        quantization: Quantization::W8A8Fp8,
        cache: CachePlan {
            dtype: KvDtype::Fp8,
            strategy: CacheStrategy::Offloaded,
            ..chosen.cache
        },
        tensor_parallel: 2,
        ..chosen.clone()
    };
    let flags = flags(&other, &spec);
    for flag in [
        "--quantization=w8a8-fp8",
        "--kv-dtype=fp8",
        "--cache-strategy=offloaded",
        "--tensor-parallel=2",
    ] {
        assert!(flags.iter().any(|found| found == flag), "{flag} in {flags:?}");
    }
}

#[test]
fn everything_is_ranked_with_what_does_not_run_yet_marked() {
    let outcome = everything(json!({}), &eight_billion(), "nvidia-h200=8,nvidia-l4=4");
    assert_eq!(outcome.chosen.as_ref().unwrap().accelerator, "nvidia-l4");
    // Eight quantizations, four types of KV, four strategies; one, two, four and eight GPUs, or up to four.
    assert_eq!(outcome.rejected.len() + 1, 8 * 4 * 4 * (4 + 3));
    let runnable: Vec<_> = outcome.rejected.iter().filter(|other| other.runnable).collect();
    assert_eq!(runnable.len(), 1, "{runnable:#?}");
    let fits = |other: &&Rejected| other.miss.is_none() && other.predicted.is_some();
    assert!(outcome.rejected.iter().filter(fits).count() > 100);
    for objective in ["Latency", "Throughput", "Cost"] {
        let fields = json!({"objective": objective});
        let outcome = everything(fields, &eight_billion(), "nvidia-h200=8,nvidia-l4=4");
        let chosen = outcome.chosen.unwrap();
        assert_eq!(chosen.accelerator, "nvidia-h200", "{objective}: {}", chosen.why);
    }
}

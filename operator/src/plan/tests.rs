//! The planner by tables and by properties over random models, machines and wishes.

use std::time::{Duration, Instant};

use plimsoll_contract::facts::{Family, ParametersByRole};
use plimsoll_crds::LLMDeployment;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

pub fn spec(fields: Value) -> Spec {
    let mut spec = json!({"model": {"source": "file:///m"}});
    spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let object: LLMDeployment = serde_json::from_value(json!({
        "apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment",
        "metadata": {"name": "a"}, "spec": spec,
    }))
    .unwrap();
    Spec::parse(&object).unwrap()
}

/// A model of about a billion parameters: 4.6 GiB in F32, 64 KiB of F32 cache per token.
pub fn facts() -> ModelFacts {
    ModelFacts {
        family: Family::Llama,
        architecture: "LlamaForCausalLM".to_owned(),
        revision: None,
        parameters: ParametersByRole {
            embedding: 262_668_288,
            attention: 167_772_160,
            mlp: 805_306_368,
            norm: 67_584,
            head: 0,
        },
        disk_bytes: [("BF16".to_owned(), 2_471_628_800)].into(),
        quantization: None,
        layers: 16,
        hidden: 2048,
        intermediate: 8192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 128_256,
        context_tokens: 131_072,
        tied_head: true,
        sliding_window: None,
        chat_template: true,
        tokenizer_bytes: 1 << 20,
    }
}

pub fn node(memory_bytes: u64) -> NodeResources {
    NodeResources {
        name: "n".to_owned(),
        memory_bytes,
        asked_bytes: 0,
        asked_cpu_millis: 0,
        pods_seen: PodsSeen::All,
        cpu_millis: 8000,
        gpus: cards::Gpus::None,
        open_to: OpenTo::All,
    }
}

#[test]
fn a_roomy_node_runs_the_most_exact_type_and_leaves_half_of_itself() {
    let outcome = plan(&spec(json!({})), &facts(), &[node(64 * GIB)]);
    let chosen = outcome.chosen.unwrap();
    assert_eq!(chosen.dtype, Dtype::F32);
    assert_eq!(chosen.cache.tokens, 131_072);
    assert_eq!(chosen.context_tokens, 131_072);
    assert!(chosen.memory.total() <= 32 * GIB);
    assert_eq!(chosen.cpu_millis, 2000);
    assert!(chosen.why.contains("F32 is the most exact type"), "{}", chosen.why);
    assert_eq!(outcome.rejected.len(), 1);
    assert!(outcome.rejected[0].why.contains("more exact"), "{:?}", outcome.rejected);
}

/// As README.md has it, so that it cannot drift.
#[test]
fn the_manifest_of_the_readme_has_five_lines_or_six_and_a_plan() {
    let readme = include_str!("../../../README.md");
    let manifest = readme.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next());
    let manifest = manifest.expect("the README shows a manifest");
    assert!(manifest.lines().count() <= 6, "{manifest}");
    let object = crate::manifest::parse(manifest).unwrap();
    let chosen = plan(&Spec::parse(&object).unwrap(), &facts(), &[node(64 * GIB)]).chosen.unwrap();
    assert_eq!((chosen.dtype, chosen.device), (Dtype::F32, Device::Cpu));
}

#[test]
fn what_other_pods_ask_for_is_not_planned_with_and_stands_in_the_arithmetic() {
    let beside = |gib: u64| NodeResources { asked_bytes: gib * GIB, ..node(64 * GIB) };
    let planned = |nodes: &[NodeResources]| plan(&spec(json!({})), &facts(), nodes);
    let alone = planned(&[beside(0)]).chosen.unwrap();
    let with_room = planned(&[beside(20)]).chosen.unwrap();
    assert_eq!(with_room.memory, alone.memory, "half of the node is still there");
    assert_eq!(with_room.capacity, 44 * GIB);
    assert!(with_room.why.contains("44.0 GiB on n (64.0 GiB less 20.0 GiB for other pods)"));
    let tight = planned(&[beside(60)]);
    assert_eq!(tight.chosen.as_ref().map(|chosen| chosen.dtype), Some(Dtype::F16));
    let why = &tight.rejected[0].why;
    let sum = "of 4.0 GiB on n (64.0 GiB less 60.0 GiB for other pods): weights 4.6 GiB";
    assert!(why.contains(sum), "{why}");
    let seen_in_part = NodeResources { pods_seen: PodsSeen::OneNamespace, ..beside(60) };
    let why = planned(&[seen_in_part]).chosen.unwrap().why;
    assert!(why.contains("those of others are not seen"), "{why}");

    // Less memory of which more is left is better, and a node that is more than full is full.
    let small = NodeResources { name: "small".to_owned(), ..node(16 * GIB) };
    assert!(planned(&[beside(60), small]).chosen.unwrap().why.contains("on small"));
    assert_eq!(planned(&[beside(65)]).refusal().unwrap().0, Reason::DoesNotFit);
    // A budget is kept to where it is left, and no more than is left counts.
    let budget = spec(json!({"resources": {"memory": "8Gi"}}));
    assert_eq!(plan(&budget, &facts(), &[beside(20)]).chosen.unwrap().capacity, 8 * GIB);
    assert_eq!(plan(&budget, &facts(), &[beside(60)]).chosen.unwrap().capacity, 4 * GIB);
}

#[test]
fn where_the_exact_type_does_not_fit_the_half_sized_one_is_taken_with_the_sum() {
    let outcome = plan(&spec(json!({})), &facts(), &[node(4 * GIB)]);
    let chosen = outcome.chosen.unwrap();
    assert_eq!(chosen.dtype, Dtype::F16);
    assert!(chosen.memory.total() <= 4 * GIB);
    let [rejected] = &outcome.rejected[..] else { panic!("{:?}", outcome.rejected) };
    assert_eq!(rejected.candidate, "None · F32 · TP 1 · cpu");
    assert!(
        rejected.why.starts_with("needs 4.9 GiB of 4.0 GiB on n: weights 4.6 GiB"),
        "{}",
        rejected.why
    );
}

#[test]
fn a_load_that_only_the_half_sized_type_carries_decides_for_it() {
    let load = json!({"workload": {"promptTokens": 1024, "outputTokens": 1024, "concurrency": 32},
        "resources": {"memory": "8Gi"}});
    let outcome = plan(&spec(load), &facts(), &[node(64 * GIB)]);
    let chosen = outcome.chosen.unwrap();
    assert_eq!((chosen.dtype, chosen.cache.tokens), (Dtype::F16, 131_072));
    assert!(outcome.rejected[0].why.contains("of the 65,536 tokens"), "{:?}", outcome.rejected);
}

#[test]
fn nothing_fits_means_the_sum_of_every_candidate() {
    let outcome = plan(&spec(json!({})), &facts(), &[node(512 * MIB)]);
    assert_eq!(outcome.chosen, None);
    let (reason, message) = outcome.refusal().unwrap();
    assert_eq!(reason, Reason::DoesNotFit);
    assert!(message.contains("of 512 MiB"), "{message}");
    assert!(message.contains("F32") && message.contains("F16"), "{message}");
}

#[test]
fn wishes_that_no_machine_can_grant_are_refused_by_name() {
    for (fields, reason, words) in [
        (json!({"contextTokens": 200_000}), Reason::InvalidSpec, "trained for 131,072"),
        (
            json!({"workload": {"promptTokens": 131_072, "outputTokens": 1}}),
            Reason::InvalidSpec,
            "are 131,073",
        ),
        (json!({"resources": {"cpu": "64"}}), Reason::DoesNotFit, "asks for 64 CPUs"),
        (json!({"resources": {"memory": "1Gi"}}), Reason::DoesNotFit, "of 1.0 GiB"),
    ] {
        let outcome = plan(&spec(fields), &facts(), &[node(64 * GIB)]);
        let (found, message) = outcome.refusal().unwrap();
        assert_eq!(found, reason, "{message}");
        assert!(message.contains(words), "{message}");
    }
    let quantized = ModelFacts { quantization: Some("awq".to_owned()), ..facts() };
    let outcome = plan(&spec(json!({})), &quantized, &[node(64 * GIB)]);
    assert_eq!(outcome.refusal().unwrap().0, Reason::UnsupportedModel);
    assert_eq!(plan(&spec(json!({})), &facts(), &[]).refusal().unwrap().0, Reason::NoNodes);
}

#[test]
fn a_cache_dtype_and_a_cache_size_are_obeyed() {
    let fields = json!({"cache": {"dtype": "F16", "tokens": 5000}, "contextTokens": 4096});
    let chosen = plan(&spec(fields), &facts(), &[node(64 * GIB)]).chosen.unwrap();
    assert_eq!((chosen.cache.dtype, chosen.cache.tokens), (Dtype::F16, 5056));
    assert_eq!(chosen.context_tokens, 4096);
}

#[test]
fn flags_say_every_value_of_the_plan() {
    let spec = spec(json!({"cache": {"prefixReuse": false}, "rollout": {"drainSeconds": 7}}));
    let chosen = plan(&spec, &facts(), &[node(16 * GIB)]).chosen.unwrap();
    let flags = flags(&chosen, &spec);
    for flag in [
        "--served-name=a",
        "--dtype=f32",
        "--running-max=32",
        "--step-tokens-max=512",
        "--drain-timeout=7s",
        "--no-prefix-reuse",
        &format!("--kv-tokens={}", chosen.cache.tokens),
        &format!("--context-tokens={}", chosen.context_tokens),
    ] {
        assert!(flags.iter().any(|found| found == flag), "{flag} in {flags:?}");
    }
}

#[test]
fn the_hash_follows_values_and_nothing_else() {
    let base = plan(&spec(json!({})), &facts(), &[node(64 * GIB)]).chosen.unwrap();
    let other_sentence = Plan { why: "other".to_owned(), capacity: 1, ..base.clone() };
    assert_eq!(hash(&base), hash(&other_sentence));
    let other_value = Plan { running_max: 31, ..base.clone() };
    assert_ne!(hash(&base), hash(&other_value));
    assert_eq!(base.hash.len(), 8);
}

#[test]
fn status_fits_its_schema_bounds() {
    let outcome = plan(&spec(json!({})), &facts(), &[node(64 * GIB)]);
    let status = status(&outcome, outcome.chosen.as_ref().unwrap());
    assert_eq!(status.cache.dtype, "F32");
    assert_eq!(status.memory_bytes.capacity, (64 * GIB) as i64);
    let MemoryStatus { weights, kv, workspace, process, total, .. } = status.memory_bytes;
    assert_eq!(weights + kv + workspace + process, total);
    assert!(status.rejected.len() <= REJECTED_MAX);
}

/// A node of 64 GiB with cards of `mebibytes`, as its label says.
fn gpu_node(name: &str, product: &str, mebibytes: u64) -> NodeResources {
    let labels = json!({cards::PRODUCT_LABEL: product, cards::MEMORY_LABEL: mebibytes.to_string()});
    gpu_node_labelled(name, labels)
}

fn gpu_node_labelled(name: &str, labels: Value) -> NodeResources {
    let node = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": labels},
        "status": {"allocatable": {"cpu": "8", "memory": "64Gi", cards::RESOURCE: "8"}},
    }))
    .unwrap();
    let [node] = &nodes::<k8s_openapi::api::core::v1::Node>(&[node], &Neighbours::default())[..]
    else {
        panic!("one node")
    };
    node.clone()
}

fn h200() -> NodeResources {
    gpu_node("big", "NVIDIA-H200", 143_771)
}

#[test]
fn a_plan_for_cpus_keeps_the_hash_it_had_before_there_were_gpus() {
    let chosen = plan(&spec(json!({})), &facts(), &[node(64 * GIB)]).chosen.unwrap();
    assert_eq!(chosen.hash, "b3a2ea86");
    assert_eq!(chosen.device, Device::Cpu);
    assert!(flags(&chosen, &spec(json!({}))).contains(&"--device=cpu".to_owned()));
}

#[test]
fn a_gpu_that_holds_the_model_comes_before_cpus_and_is_filled() {
    let spec = spec(json!({}));
    let outcome = plan(&spec, &facts(), &[node(512 * GIB), h200()]);
    let chosen = outcome.chosen.as_ref().unwrap();
    assert_eq!(chosen.device, Device::Cuda { product: "NVIDIA-H200".to_owned() });
    assert_eq!((chosen.accelerator.as_str(), chosen.dtype), ("nvidia-h200", Dtype::Bf16));
    assert_eq!((chosen.running_max, chosen.step_tokens_max, chosen.cpu_millis), (256, 2048, 2000));
    // What the label says less the driver's gibibyte and the context.
    assert_eq!(chosen.capacity, (143_771 - 1024 - 640) * MIB);
    assert_eq!(chosen.memory.weights, 2 * 1_235_814_400);
    // 16 layers of 8 heads of 64 values of 2 bytes, K and V; the last page that would not fit is left out.
    let page = 64 * (2 * 16 * 8 * 64 * 2);
    assert!((0..page).contains(&(chosen.capacity - chosen.memory.total())));
    assert_eq!(chosen.context_tokens, 131_072);
    let words = "on the nvidia-h200 of big (140 GiB less 1.6 GiB for driver and context)";
    assert!(chosen.why.starts_with("BF16 is what runs on a GPU"), "{}", chosen.why);
    assert!(chosen.why.contains(words), "{}", chosen.why);
    let flags = flags(chosen, &spec);
    for flag in ["--device=cuda", "--dtype=bf16", "--running-max=256", "--step-tokens-max=2048"] {
        assert!(flags.iter().any(|found| found == flag), "{flag} in {flags:?}");
    }
    let lost: Vec<_> = outcome.rejected.iter().map(|other| other.candidate.as_str()).collect();
    assert_eq!(lost, ["None · F32 · TP 1 · cpu", "None · F16 · TP 1 · cpu"]);
    let comes_first = "but nvidia-h200 comes before CPUs";
    assert!(outcome.rejected.iter().all(|other| other.why.contains(comes_first)));
    let shown = status(&outcome, chosen);
    assert_eq!((shown.quantization.as_str(), shown.dtype.as_str()), ("None", "BF16"));
    assert_eq!(shown.memory_bytes.capacity, chosen.capacity as i64);
}

#[test]
fn the_memory_of_the_spec_is_the_hosts_where_a_gpu_computes() {
    let fields = json!({"resources": {"memory": "2Gi", "cpu": "3"}, "cache": {"tokens": 100_000}});
    let chosen = plan(&spec(fields), &facts(), &[h200()]).chosen.unwrap();
    assert_eq!((chosen.accelerator.as_str(), chosen.cpu_millis), ("nvidia-h200", 3000));
    assert_eq!(chosen.cache.tokens, 100_032);
}

#[test]
fn a_gpu_that_cannot_be_used_is_rejected_with_the_reason_and_the_cpu_plan_stays_as_it_was() {
    let crowded = NodeResources { asked_bytes: 63 * GIB, ..h200() };
    let busy = NodeResources {
        gpus: cards::Gpus::Card(cards::Card {
            product: "NVIDIA-H200".to_owned(),
            memory_bytes: 140 * GIB,
            driver_bytes: cards::CONTEXT_BYTES,
            used_bytes: 138 * GIB,
        }),
        ..h200()
    };
    let product = json!({cards::PRODUCT_LABEL: "NVIDIA-H200"});
    let t4 = json!({cards::PRODUCT_LABEL: "Tesla-T4", cards::MEMORY_LABEL: "15360",
        "nvidia.com/gpu.compute.major": "7", "nvidia.com/gpu.compute.minor": "5"});
    let one_gib = json!({"resources": {"memory": "1Gi"}, "cache": {"tokens": 64}});
    let small = ModelFacts {
        parameters: ParametersByRole { mlp: 1_000_000, ..Default::default() },
        context_tokens: 64,
        ..facts()
    };
    for (fields, facts, gpu, words) in [
        (
            json!({}),
            facts(),
            gpu_node("small", "NVIDIA-A2", 2048),
            "needs 3.0 GiB of 1.3 GiB on the nvidia-a2 of small (2.0 GiB less 681 MiB for driver and context): weights 2.3 GiB + KV 64.0 MiB for 2,048 tokens + workspace",
        ),
        (json!({}), facts(), busy, "140 GiB less 640 MiB for driver and context and 138 GiB that"),
        (json!({"cache": {"dtype": "F16"}}), facts(), h200(), "asks for F16, and this keeps BF16"),
        (
            one_gib,
            small,
            h200(),
            "needs 1.2 GiB of memory beside the card, and spec.resources.memory allows 1.0 GiB",
        ),
        (json!({}), facts(), crowded, "there is 1.0 GiB on big (64.0 GiB less 63.0 GiB for other"),
        (
            json!({}),
            facts(),
            gpu_node_labelled("bare", json!({})),
            "bare: offers nvidia.com/gpu and has no usable label nvidia.com/gpu.product: install GPU feature discovery, or",
        ),
        (json!({}), facts(), gpu_node_labelled("half", product), "label nvidia.com/gpu.memory: "),
        (
            json!({}),
            facts(),
            gpu_node_labelled("old", t4),
            "old: its cards have compute capability 7.5",
        ),
    ] {
        let spec = spec(fields);
        let alone = plan(&spec, &facts, &[node(64 * GIB)]);
        // A node for GPU pods alone, so that the CPU of the GPU's node does not count.
        let gpu = NodeResources { open_to: OpenTo::GpuPods, ..gpu };
        let beside = plan(&spec, &facts, &[gpu, node(64 * GIB)]);
        assert_eq!(beside.chosen, alone.chosen, "{words}");
        assert_eq!(beside.rejected.len(), alone.rejected.len() + 1, "{words}");
        let said: Vec<_> = beside.rejected.iter().map(|other| other.why.as_str()).collect();
        assert!(said.iter().any(|why| why.contains(words)), "{words}\nin {said:#?}");
    }
}

#[test]
fn of_two_cards_the_smaller_one_that_carries_the_load_is_taken() {
    let l4 = || gpu_node("l4", "NVIDIA-L4", 23_034);
    let outcome = plan(&spec(json!({})), &facts(), &[h200(), l4()]);
    assert_eq!(outcome.chosen.unwrap().accelerator, "nvidia-l4");
    let why = &outcome.rejected[0].why;
    assert!(
        why.contains("22.5 GiB carries the load too and leaves the 140 GiB to larger"),
        "{why}"
    );
    // Unless the pod template selects the larger one.
    let selector = json!({cards::PRODUCT_LABEL: "NVIDIA-H200"});
    let chosen = json!({"podTemplate": {"spec": {"nodeSelector": selector}}});
    let outcome = plan(&spec(chosen), &facts(), &[h200(), l4()]);
    assert_eq!(outcome.chosen.unwrap().accelerator, "nvidia-h200");
    // 64 requests of 32,768 tokens are 64 GiB of cache.
    let load =
        json!({"workload": {"promptTokens": 32_000, "outputTokens": 768, "concurrency": 64}});
    let outcome = plan(&spec(load), &facts(), &[h200(), l4()]);
    assert_eq!(outcome.chosen.unwrap().accelerator, "nvidia-h200");
    let why = &outcome.rejected[0].why;
    assert!(
        why.contains("of the 2,097,152 tokens that the workload asks for, and nvidia-h200"),
        "{why}"
    );
}

#[test]
fn nodes_whose_gpus_lack_the_same_label_are_named_together() {
    let bare = |name: &str| gpu_node_labelled(name, json!({}));
    let outcome = plan(&spec(json!({})), &facts(), &[bare("c"), bare("a"), bare("b")]);
    assert_eq!(outcome.chosen.unwrap().device, Device::Cpu);
    let unusable = outcome.rejected.last().unwrap();
    assert_eq!(unusable.candidate, "None · BF16 · TP 1 · gpu");
    assert!(unusable.why.starts_with("a and 2 more: offers nvidia.com/gpu"), "{}", unusable.why);
}

#[test]
fn a_pod_may_land_on_any_node_of_a_product_so_that_the_least_card_counts() {
    let nodes = [gpu_node("a", "NVIDIA-L4", 23_034), gpu_node("b", "NVIDIA-L4", 22_000)];
    let chosen = plan(&spec(json!({})), &facts(), &nodes).chosen.unwrap();
    assert_eq!(chosen.capacity, 22_000 * MIB - 22_000 * MIB / 50 - 640 * MIB);
}

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
            cache_dtype: half.then_some(Dtype::F16),
            budget: crate::spec::Budget {
                memory_bytes: memory.map(|gib| gib * GIB),
                cpu_millis: None,
            },
            ..spec(json!({}))
        },
    )
}

proptest! {
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

#[test]
fn a_plan_over_a_thousand_nodes_takes_less_than_a_millisecond() {
    let nodes: Vec<_> = (1..=1000).map(|index| node(index * GIB)).collect();
    let (spec, facts) = (spec(json!({})), facts());
    let fastest = (0..20)
        .map(|_| {
            let start = Instant::now();
            assert!(plan(&spec, &facts, &nodes).chosen.is_some());
            start.elapsed()
        })
        .min()
        .unwrap();
    assert!(fastest < Duration::from_millis(1), "{fastest:?}");
}

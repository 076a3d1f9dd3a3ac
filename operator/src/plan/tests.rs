//! The planner by tables; with GPUs, choices, speeds and random problems in the files below.

use plimsoll_contract::facts::{Family, ParametersByRole};
use plimsoll_crds::{LLMDeployment, MemoryStatus, REJECTED_MAX};
use serde_json::{Value, json};

use super::*;

mod choice;
mod gpus;
mod properties;
mod speed;

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
        gpu_count: 0,
        asked_gpus: 0,
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
        rejected.why.starts_with("needs 5.1 GiB of 4.0 GiB on n: weights 4.6 GiB"),
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
    assert_eq!((chosen.cache.dtype, chosen.cache.tokens), (KvDtype::F16, 5056));
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

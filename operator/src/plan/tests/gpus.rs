//! Plans for machines with GPUs, as tables.

use serde_json::{Value, json};

use super::*;

/// A node of 64 GiB with cards of `mebibytes`, as its label says.
pub fn gpu_node(name: &str, product: &str, mebibytes: u64) -> NodeResources {
    let labels = json!({cards::PRODUCT_LABEL: product, cards::MEMORY_LABEL: mebibytes.to_string()});
    gpu_node_labelled(name, labels)
}

pub fn gpu_node_labelled(name: &str, labels: Value) -> NodeResources {
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

pub fn h200() -> NodeResources {
    gpu_node("big", "NVIDIA-H200", 143_771)
}

#[test]
fn a_plan_for_cpus_keeps_its_hash_as_gpus_come_to_be_known() {
    let chosen = plan(&spec(json!({})), &facts(), &[node(64 * GIB)]).chosen.unwrap();
    assert_eq!(chosen.hash, "d408a651");
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

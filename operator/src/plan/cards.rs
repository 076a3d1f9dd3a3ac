//! A GPU enters, as its driver names it or as the labels of its node describe it. Its class leaves, with what of its memory
//! a plan may count on; or why no plan may count on it. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Node;
use plimsoll_contract::abilities::{CUDA_COMPUTE_MAJOR_MIN, CUDA_MAJOR_MIN};
use plimsoll_contract::facts::Gpu;

use super::explain;
use crate::amount;

/// What a device plugin offers and a pod asks for; also the key of the taint that keeps other pods away.
pub const RESOURCE: &str = "nvidia.com/gpu";
/// GPU feature discovery's labels: the name of the card, and the memory of one card in MiB.
pub const PRODUCT_LABEL: &str = "nvidia.com/gpu.product";
pub const MEMORY_LABEL: &str = "nvidia.com/gpu.memory";
/// More than one pod is given the same card where this is more than 1.
const REPLICAS_LABEL: &str = "nvidia.com/gpu.replicas";
const COMPUTE_MAJOR_LABEL: &str = "nvidia.com/gpu.compute.major";
const COMPUTE_MINOR_LABEL: &str = "nvidia.com/gpu.compute.minor";
/// The CUDA of the driver, under its name of today and the one before.
const CUDA_MAJOR_LABELS: [&str; 2] =
    ["nvidia.com/cuda.runtime-version.major", "nvidia.com/cuda.runtime.major"];

/// What the context of one process takes of a card before the process has asked for anything.
pub const CONTEXT_BYTES: u64 = 640 << 20;
/// The label counts what the driver keeps for itself too, which no program ever sees: 0.6 GiB of an H200, a
/// seventieth of an L4. Half as much again is left alone.
const DRIVER_SHARE: u64 = 50;
const DRIVER_BYTES_MAX: u64 = 1 << 30;

/// What stands in the product label of a slice before its profile, where all cards of a node are sliced alike.
const SLICE: &str = "-MIG-";

/// Class of a card whose name nobody tells.
pub const CLASS_UNKNOWN: &str = "gpu";

/// What a node has of GPUs, as far as one pod can use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gpus {
    None,
    /// One of its cards; all of a node are alike.
    Card(Card),
    Unusable {
        class: String,
        /// A sentence without the node's name.
        why: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// As GPU feature discovery writes it, and as a pod selects its node by it.
    pub product: String,
    pub memory_bytes: u64,
    /// What of it the driver and the context of one process hold.
    pub driver_bytes: u64,
    /// What other processes hold; in a cluster a card belongs to one pod.
    pub used_bytes: u64,
}

impl Card {
    pub fn class(&self) -> String {
        class(&self.product)
    }

    /// What is left for weights, KV and steps.
    pub fn free_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(self.driver_bytes + self.used_bytes)
    }

    /// As a label gives product and MiB.
    pub fn labelled(product: &str, mebibytes: u64) -> Card {
        let memory_bytes = mebibytes.saturating_mul(1 << 20);
        Card {
            product: product.to_owned(),
            memory_bytes,
            driver_bytes: CONTEXT_BYTES + (memory_bytes / DRIVER_SHARE).min(DRIVER_BYTES_MAX),
            used_bytes: 0,
        }
    }

    /// A part of a card, which has no way to other parts.
    pub fn is_slice(&self) -> bool {
        self.product.contains(SLICE)
    }

    /// As the engine found it on this machine. What is used beyond the context of the process that looked is others'.
    pub fn found(gpu: &Gpu) -> Card {
        let held = gpu.memory_bytes.saturating_sub(gpu.memory_free_bytes);
        Card {
            product: gpu.name.replace(' ', "-"),
            memory_bytes: gpu.memory_bytes,
            driver_bytes: CONTEXT_BYTES,
            used_bytes: held.saturating_sub(CONTEXT_BYTES),
        }
    }
}

/// As the labels of a node describe what it offers to pods.
pub fn of_node(node: &Node) -> Gpus {
    if offered(node) == 0 {
        return Gpus::None;
    }
    let none = BTreeMap::new();
    of_labels(node.metadata.labels.as_ref().unwrap_or(&none))
}

/// Cards, or slices of cards, that a node offers to pods.
pub fn offered(node: &Node) -> u32 {
    let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let offered = allocatable.and_then(|amounts| amount::units(&amounts.get(RESOURCE)?.0));
    u32::try_from(offered.unwrap_or(0)).unwrap_or(u32::MAX)
}

fn of_labels(labels: &BTreeMap<String, String>) -> Gpus {
    let number = |label: &str| labels.get(label).and_then(|text| text.parse::<u64>().ok());
    let product = labels.get(PRODUCT_LABEL);
    let unusable = |why: String| Gpus::Unusable {
        class: product.map_or_else(|| CLASS_UNKNOWN.to_owned(), |product| class(product)),
        why,
    };
    let Some(product) = product else { return unusable(explain::unlabelled_card(PRODUCT_LABEL)) };
    let Some(mebibytes) = number(MEMORY_LABEL) else {
        return unusable(explain::unlabelled_card(MEMORY_LABEL));
    };
    if let Some(pods) = number(REPLICAS_LABEL).filter(|pods| *pods > 1) {
        return unusable(explain::shared_card(pods));
    }
    if let Some(major) = number(COMPUTE_MAJOR_LABEL).filter(|major| *major < CUDA_COMPUTE_MAJOR_MIN)
    {
        return unusable(explain::old_card(major, number(COMPUTE_MINOR_LABEL).unwrap_or(0)));
    }
    let cuda = CUDA_MAJOR_LABELS.into_iter().find_map(number);
    if let Some(major) = cuda.filter(|major| *major < CUDA_MAJOR_MIN) {
        return unusable(explain::old_driver(major));
    }
    Gpus::Card(Card::labelled(product, mebibytes))
}

/// From a card's name or product label: lower case, dashes, without form factor and kind of memory.
pub fn class(name: &str) -> String {
    let lower = name.to_lowercase();
    let words = lower.split([' ', '-']).filter(|word| !word.is_empty() && !is_form(word));
    words.collect::<Vec<_>>().join("-")
}

/// `sxm4`, `pcie`, `nvl`, `hbm3e`.
fn is_form(word: &str) -> bool {
    let version = ["sxm", "pcie", "nvl", "hbm"].iter().find_map(|form| word.strip_prefix(form));
    version.is_some_and(|version| version.chars().all(|c| c.is_ascii_digit() || c == 'e'))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_class_is_the_name_without_its_form() {
        for (name, class_of_it) in [
            ("NVIDIA H200", "nvidia-h200"),
            ("NVIDIA H200 NVL", "nvidia-h200"),
            ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb"),
            ("NVIDIA-H100-80GB-HBM3", "nvidia-h100-80gb"),
            ("NVIDIA A100-SXM4-80GB", "nvidia-a100-80gb"),
            ("NVIDIA A100 80GB PCIe", "nvidia-a100-80gb"),
            ("NVIDIA A100-PCIE-40GB", "nvidia-a100-40gb"),
            ("NVIDIA L4", "nvidia-l4"),
            ("NVIDIA L40S", "nvidia-l40s"),
            ("NVIDIA A10", "nvidia-a10"),
            ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
            ("NVIDIA B200", "nvidia-b200"),
        ] {
            assert_eq!(class(name), class_of_it, "{name}");
        }
    }

    fn node(gpus: &str, labels: Value) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": "n", "labels": labels},
            "status": {"allocatable": {"cpu": "8", "memory": "64Gi", RESOURCE: gpus}},
        }))
        .unwrap()
    }

    fn h200(more: Value) -> Value {
        let mut labels = json!({PRODUCT_LABEL: "NVIDIA-H200", MEMORY_LABEL: "143771",
            COMPUTE_MAJOR_LABEL: "9", COMPUTE_MINOR_LABEL: "0", REPLICAS_LABEL: "1",
            "nvidia.com/cuda.runtime.major": "13"});
        labels.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        labels
    }

    #[test]
    fn labels_tell_the_memory_of_which_the_driver_keeps_some() {
        let Gpus::Card(card) = of_node(&node("8", h200(json!({})))) else { panic!("a card") };
        assert_eq!((card.product.as_str(), card.class()), ("NVIDIA-H200", "nvidia-h200".into()));
        assert_eq!(card.memory_bytes, 143_771 * MIB);
        assert_eq!(card.free_bytes(), (143_771 - 640 - 1024) * MIB);
        let l4 = json!({PRODUCT_LABEL: "NVIDIA-L4", MEMORY_LABEL: "23034"});
        let Gpus::Card(card) = of_node(&node("1", l4)) else { panic!("a card") };
        assert_eq!(card.free_bytes(), 23_034 * MIB - 23_034 * MIB / 50 - 640 * MIB);
    }

    #[test]
    fn a_slice_of_a_card_is_a_class_of_its_own() {
        let labels = h200(json!({PRODUCT_LABEL: "NVIDIA-H200-MIG-1g.18gb", MEMORY_LABEL: "16384"}));
        let Gpus::Card(card) = of_node(&node("7", labels)) else { panic!("a card") };
        assert_eq!(card.class(), "nvidia-h200-mig-1g.18gb");
        assert!(card.is_slice() && card.memory_bytes == 16_384 * MIB);
    }

    #[test]
    fn what_one_pod_cannot_have_for_itself_or_cannot_run_is_named() {
        let product = json!({PRODUCT_LABEL: "NVIDIA-H200"});
        for (labels, class_of_it, words) in [
            (json!({}), "gpu", "nvidia.com/gpu.product"),
            (product, "nvidia-h200", "install GPU feature discovery, or label"),
            (h200(json!({MEMORY_LABEL: "much"})), "nvidia-h200", "nvidia.com/gpu.memory"),
            (h200(json!({REPLICAS_LABEL: "4"})), "nvidia-h200", "shared by 4 pods"),
            (h200(json!({COMPUTE_MAJOR_LABEL: "7", COMPUTE_MINOR_LABEL: "5"})), "h200", "7.5"),
            (h200(json!({"nvidia.com/cuda.runtime.major": "12"})), "nvidia-h200", "CUDA 12"),
        ] {
            let Gpus::Unusable { class, why } = of_node(&node("1", labels.clone())) else {
                panic!("{labels} should be refused")
            };
            assert!(class.contains(class_of_it) && why.contains(words), "{class}: {why}");
        }
        assert_eq!(of_node(&node("0", h200(json!({})))), Gpus::None);
        assert_eq!(of_node(&Node::default()), Gpus::None);
    }

    #[test]
    fn on_this_machine_the_memory_that_others_use_is_not_counted_on() {
        let gpu = |free: u64| Gpu {
            name: "NVIDIA H100 80GB HBM3".to_owned(),
            memory_bytes: 81_000 * MIB,
            memory_free_bytes: free * MIB,
            compute_capability: "9.0".to_owned(),
            multiprocessors: 132,
            driver: None,
        };
        let alone = Card::found(&gpu(80_500));
        assert_eq!((alone.class(), alone.used_bytes), ("nvidia-h100-80gb".into(), 0));
        assert_eq!(alone.free_bytes(), (81_000 - 640) * MIB);
        assert_eq!(Card::found(&gpu(40_000)).free_bytes(), 40_000 * MIB);
    }
}

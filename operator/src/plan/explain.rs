//! Sentences with figures, as status, `plimsoll plan` and `plimsoll up` show them. Pure.

use plimsoll_contract::abilities::{Backend, Dtype};
use plimsoll_contract::memory::MemoryPlan;

use super::candidates::Candidate;
use super::cards::{self, Card};
use super::memory::Fitted;
use super::{NodeResources, PodsSeen};
use crate::spec::Spec;

/// As status and tables write a type.
pub fn dtype(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
    }
}

/// Three digits and a binary unit: `3.1 GiB`, `143 MiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut amount = bytes as f64;
    while amount >= 1023.5 && unit + 1 < UNITS.len() {
        amount /= 1024.0;
        unit += 1;
    }
    let places = if unit == 0 || amount >= 99.95 { 0 } else { 1 };
    format!("{amount:.places$} {}", UNITS[unit])
}

/// Thousands apart: `65,536`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn cpus(millis: u32) -> String {
    if millis.is_multiple_of(1000) {
        format!("{}", millis / 1000)
    } else {
        format!("{:.1}", f64::from(millis) / 1000.0)
    }
}

pub fn does_not_fit(spec: &Spec, candidate: &Candidate, least: &MemoryPlan) -> String {
    let MemoryPlan { weights, workspace, process, kv, kv_tokens } = *least;
    let capacity = candidate.capacity;
    format!(
        "needs {} of {} {}: weights {} + KV {} for {} tokens + workspace {} + process {}; short by {}",
        bytes(least.total()),
        bytes(capacity),
        of_what(spec, candidate),
        bytes(weights),
        bytes(kv),
        count(kv_tokens),
        bytes(workspace),
        bytes(process),
        bytes(least.total() - capacity),
    )
}

pub fn quantized_on_disk(method: &str) -> String {
    format!(
        "the checkpoint is quantized on disk ({method}), which the engine does not run: use the unquantized model"
    )
}

pub fn context_too_long(wanted: u32, trained: u32) -> String {
    format!(
        "spec.contextTokens is {}, and the model was trained for {}: lower it, or leave it out",
        count(wanted.into()),
        count(trained.into()),
    )
}

pub fn request_too_long(request: u64, trained: u32) -> String {
    format!(
        "spec.workload: promptTokens + outputTokens are {}, and the model was trained for {}: lower them",
        count(request),
        count(trained.into()),
    )
}

pub fn other_cache_dtype(wanted: Dtype, kept: Dtype) -> String {
    format!("spec.cache.dtype asks for {}, and this keeps {}", dtype(wanted), dtype(kept))
}

pub fn too_little_host(spec: &Spec, host: &NodeResources, needed: u64) -> String {
    let needed = bytes(needed);
    match spec.budget.memory_bytes {
        Some(budget) if budget <= host.free_bytes() => format!(
            "needs {needed} of memory beside the card, and spec.resources.memory allows {}",
            bytes(budget)
        ),
        _ => format!(
            "needs {needed} of memory beside the card, and there is {} {}",
            bytes(host.free_bytes()),
            of_node(host),
        ),
    }
}

/// A sentence of nodes that are alike.
pub fn of_nodes(names: &[&str], why: &str) -> String {
    match names {
        [] => why.to_owned(),
        [one] => format!("{one}: {why}"),
        [first, others @ ..] => format!("{first} and {} more: {why}", others.len()),
    }
}

pub fn unlabelled_card(missing: &str) -> String {
    format!(
        "offers {} and has no usable label {missing}: install GPU feature discovery, or label the node with {} and {} (MiB of one card)",
        cards::RESOURCE,
        cards::PRODUCT_LABEL,
        cards::MEMORY_LABEL,
    )
}

pub fn sliced_card() -> String {
    "its cards are sliced by MIG, which is not planned with yet".to_owned()
}

pub fn shared_card(pods: u64) -> String {
    format!("each card is shared by {pods} pods, so that none can count on its memory")
}

pub fn old_card(major: u64, minor: u64) -> String {
    format!(
        "its cards have compute capability {major}.{minor}, and the kernels need {}.0 or newer",
        plimsoll_contract::abilities::CUDA_COMPUTE_MAJOR_MIN
    )
}

pub fn old_driver(major: u64) -> String {
    format!(
        "its driver is of CUDA {major}, and the kernels need {}: update the driver to 580 or later",
        plimsoll_contract::abilities::CUDA_MAJOR_MIN
    )
}

pub fn too_little_cpu(wanted: u32, available: u32) -> String {
    format!(
        "spec.resources.cpu asks for {} CPUs, and the most that other pods leave of a node is {}: lower it, or add a larger node",
        cpus(wanted),
        cpus(available),
    )
}

pub fn chosen(spec: &Spec, candidate: &Candidate, fitted: &Fitted) -> String {
    let merit = match (candidate.ability.backend, candidate.preference) {
        (Backend::Cuda, _) => "what runs on a GPU, which comes before CPUs",
        (Backend::Cpu, 0) => "the most exact type",
        (Backend::Cpu, _) => "the most exact type that carries the load",
    };
    let MemoryPlan { kv_tokens, .. } = fitted.memory;
    let load = if fitted.carries_workload() {
        String::new()
    } else {
        format!(", short of the {} that the workload asks for", count(fitted.demanded_tokens))
    };
    let of_what = of_what(spec, candidate);
    format!(
        "{} is {merit}; {} of {} {of_what}, with {} tokens of KV cache{load}",
        dtype(candidate.ability.weights),
        bytes(fitted.memory.total()),
        bytes(candidate.capacity),
        count(kv_tokens),
    )
}

/// Where the bytes are that a pod may use, and why not more of them.
fn of_what(spec: &Spec, candidate: &Candidate) -> String {
    if let Some(card) = &candidate.machine.card {
        return of_card(&candidate.machine.class, card, &candidate.machine.best.name);
    }
    if spec.budget.memory_bytes == Some(candidate.capacity) {
        return "(spec.resources.memory)".to_owned();
    }
    of_node(&candidate.machine.best)
}

fn of_card(class: &str, card: &Card, node: &str) -> String {
    let Card { product: _, memory_bytes, driver_bytes, used_bytes } = card;
    let (whole, driver) = (bytes(*memory_bytes), bytes(*driver_bytes));
    let used = match used_bytes {
        0 => String::new(),
        used => format!(" and {} that other programs use", bytes(*used)),
    };
    format!("on the {class} of {node} ({whole} less {driver} for driver and context{used})")
}

fn of_node(node: &NodeResources) -> String {
    let NodeResources { name, memory_bytes, asked_bytes, pods_seen, .. } = node;
    let whole = bytes(*memory_bytes);
    let asked = bytes(*asked_bytes);
    match (asked_bytes, pods_seen) {
        (0, PodsSeen::All) => format!("on {name}"),
        (0, PodsSeen::OneNamespace) => format!("on {name} (pods of other namespaces are not seen)"),
        (_, PodsSeen::All) => format!("on {name} ({whole} less {asked} for other pods)"),
        (_, PodsSeen::OneNamespace) => format!(
            "on {name} ({whole} less {asked} for other pods of this namespace; those of others are not seen)"
        ),
    }
}

/// How many pods find room, and what that means for an update.
pub fn room(replicas: u64, held: u64) -> String {
    let pods = if replicas == 1 { "replica" } else { "replicas" };
    let all = count(replicas);
    let in_place = "an update ends an old pod before it starts a new one";
    if held > replicas {
        format!("room for {all} {pods} and one pod more while they are replaced")
    } else if held == replicas {
        format!("room for {all} {pods} and no pod more, so that {in_place}")
    } else {
        format!(
            "room for {} of {all} {pods} at the moment; the others wait as Unschedulable, and {in_place}",
            count(held)
        )
    }
}

/// Why a plan that fits was not taken.
pub fn passed_over(
    best: &Candidate,
    best_fit: &Fitted,
    other: &Candidate,
    other_fit: &Fitted,
) -> String {
    let fits = format!(
        "fits with {} and {} tokens of KV cache",
        bytes(other_fit.memory.total()),
        count(other_fit.memory.kv_tokens),
    );
    let on_gpus = (best.machine.card.as_ref(), other.machine.card.as_ref());
    if let (Some(_), None) = on_gpus {
        return format!("{fits}, but {} comes before CPUs", best.machine.class);
    }
    let best_name = match on_gpus {
        (Some(_), _) => best.machine.class.as_str(),
        (None, _) => dtype(best.ability.weights),
    };
    if other_fit.served_tokens() < best_fit.served_tokens() {
        return format!(
            "holds {} of the {} tokens that the workload asks for, and {best_name} holds {}",
            count(other_fit.memory.kv_tokens),
            count(other_fit.demanded_tokens),
            count(best_fit.memory.kv_tokens),
        );
    }
    if let (Some(best_card), Some(card)) = on_gpus {
        let (best_card, card) = (bytes(best_card.memory_bytes), bytes(card.memory_bytes));
        return format!(
            "{fits}, but {best_name} with {best_card} carries the load too and leaves the {card} to larger models"
        );
    }
    format!("{fits}, but {best_name} is more exact and carries the load too")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_as_a_person_writes_them() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(143 << 20), "143 MiB");
        assert_eq!(bytes(3_328_599_654), "3.1 GiB");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert_eq!(count(65_536), "65,536");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_000_000), "1,000,000");
    }
}

//! Sentences with figures, as status, `plimsoll plan` and `plimsoll up` show them: why a candidate cannot be had. Why one was
//! taken before another stands in `verdict`. Pure.

use plimsoll_contract::abilities::{ABILITIES, Backend, Dtype, KvDtype};
use plimsoll_contract::memory::MemoryPlan;

use super::candidates::{Candidate, Format};
use super::cards::{self, Card};
use super::machines::CPU_CLASS;
use super::{NodeResources, PodsSeen};
use crate::spec::Spec;

mod verdict;

pub use verdict::{chosen, passed_over};

/// As status and tables write a type.
pub fn dtype(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
    }
}

pub fn kv_dtype(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::F32 => "F32",
        KvDtype::F16 => "F16",
        KvDtype::Bf16 => "BF16",
        KvDtype::Int8 => "INT8",
        KvDtype::Fp8 => "FP8",
        KvDtype::Int4 => "INT4",
    }
}

/// The usual candidate on a class that no candidate may use.
pub fn any_on(class: &str) -> String {
    let backend = if class == CPU_CLASS { Backend::Cpu } else { Backend::Cuda };
    let usual = ABILITIES.iter().find(|ability| ability.backend == backend);
    let format = usual.map_or_else(|| "-".to_owned(), |ability| Format(*ability).to_string());
    format!("{format} · TP 1 · {class}")
}

/// Microseconds in three digits: `940 µs`, `5.0 ms`, `61 ms`, `1.2 s`.
pub fn time(microseconds: u64) -> String {
    let amount = microseconds as f64;
    let (amount, unit) = match microseconds {
        0..1_000 => (amount, "µs"),
        1_000..1_000_000 => (amount / 1e3, "ms"),
        _ => (amount / 1e6, "s"),
    };
    let places = usize::from(amount < 9.95 && unit != "µs");
    format!("{amount:.places$} {unit}")
}

/// Millionths of a dollar: `$0.42`, `$0.0031`.
pub fn dollars(millionths: u64) -> String {
    let places = if millionths < 10_000 { 4 } else { 2 };
    format!("${:.places$}", millionths as f64 / 1e6)
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

pub fn does_not_fit(spec: &Spec, candidate: &Candidate<'_>, least: &MemoryPlan) -> String {
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

pub fn other_cache_dtype(wanted: KvDtype, kept: KvDtype) -> String {
    format!("spec.cache.dtype asks for {}, and this keeps {}", kv_dtype(wanted), kv_dtype(kept))
}

pub fn other_wish(field: &str, wanted: &str, is: &str) -> String {
    format!("{field} asks for {wanted}, and this is {is}: the engine of this version has no other")
}

pub fn below_quality(bits: u64, of: &str, field: &str, floor: u64) -> String {
    format!("{bits} bits per {of} < spec.quality.{field} {floor}")
}

pub fn nothing_to_offload(demanded: u64) -> String {
    format!("the card holds the {} tokens that the workload asks for", count(demanded))
}

pub fn no_window() -> String {
    "no layer of the model has a window, so that nothing would be freed".to_owned()
}

pub fn indivisible(degree: u32, what: &str, count: u32) -> String {
    format!("{degree} GPUs cannot divide {count} {what} evenly")
}

pub fn no_units(class: &str, what: &str) -> String {
    format!("{class} has no units that multiply {what}")
}

pub fn too_many_gpus(wanted: u64, name: &str, bound: u64) -> String {
    let gpus = if wanted == 1 { "GPU" } else { "GPUs" };
    format!("{wanted} {gpus} > {name} {bound}")
}

pub fn too_few_gpus_together(degree: u32, of_a_node: u32) -> String {
    format!("{degree} GPUs of one node > {of_a_node}, the most that a node of this class has")
}

pub fn left_out(classes: &[String]) -> String {
    format!("spec.accelerators.classes allows {} only", classes.join(", "))
}

pub fn too_slow(name: &str, time_taken: u64, bound: u64) -> String {
    format!("{name} {} > slo {}", time(time_taken), time(bound))
}

pub fn no_speed(candidate: &Candidate<'_>) -> String {
    format!(
        "no speed is known of {}, so that spec.slo cannot be kept by plan: leave it out, or use a class that docs/planner.md lists",
        candidate.machine.class
    )
}

pub fn heads_too_wide(head_dim: u32, widest: u32) -> String {
    format!("the model's heads are {head_dim} wide, and the kernels for GPUs take at most {widest}")
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

/// Where the bytes are that a pod may use, and why not more of them.
fn of_what(spec: &Spec, candidate: &Candidate<'_>) -> String {
    if let Some(card) = &candidate.machine.card {
        return of_card(candidate, card);
    }
    if spec.budget.memory_bytes == Some(candidate.capacity) {
        return "(spec.resources.memory)".to_owned();
    }
    of_node(&candidate.machine.best)
}

fn of_card(candidate: &Candidate<'_>, card: &Card) -> String {
    let Card { product: _, memory_bytes, driver_bytes, used_bytes } = card;
    let (whole, driver) = (bytes(*memory_bytes), bytes(*driver_bytes));
    let used = match used_bytes {
        0 => String::new(),
        used => format!(" and {} that other programs use", bytes(*used)),
    };
    let (class, node) = (&candidate.machine.class, &candidate.machine.best.name);
    let which = match candidate.tensor_parallel {
        1 => format!("the {class}"),
        degree => format!("each of {degree} {class}"),
    };
    format!("on {which} of {node} ({whole} less {driver} for driver and context{used})")
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

/// Where one pod more would have room, and not the budget.
pub fn room_within(replicas: u64, gpus_max: u64) -> String {
    let pods = if replicas == 1 { "replica" } else { "replicas" };
    format!(
        "room for {} {pods}, and one pod more would exceed spec.accelerators.maxGPUs {gpus_max}, so that {IN_PLACE}",
        count(replicas)
    )
}

pub fn free_cards(class: &str, free: u64, all: u64) -> String {
    format!(" ({} of {} {class} are free)", count(free), count(all))
}

const IN_PLACE: &str = "an update ends an old pod before it starts a new one";

/// How many pods find room, and what that means for an update; `free` says how many cards there are, where they are too few.
pub fn room(replicas: u64, held: u64, free: &str) -> String {
    let pods = if replicas == 1 { "replica" } else { "replicas" };
    let all = count(replicas);
    if held > replicas {
        format!("room for {all} {pods} and one pod more while they are replaced")
    } else if held == replicas {
        format!("room for {all} {pods} and no pod more, so that {IN_PLACE}")
    } else {
        format!(
            "room for {} of {all} {pods} at the moment{free}; the others wait as Unschedulable, and {IN_PLACE}",
            count(held)
        )
    }
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
        assert_eq!(time(940), "940 µs");
        assert_eq!(time(4976), "5.0 ms");
        assert_eq!(time(61_000), "61 ms");
        assert_eq!(time(1_240_000), "1.2 s");
        assert_eq!(dollars(420_000), "$0.42");
        assert_eq!(dollars(3_100), "$0.0031");
        assert_eq!(count(1_000_000), "1,000,000");
    }
}

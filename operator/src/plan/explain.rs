//! Sentences with figures, as status, `plimsoll plan` and `plimsoll up` show them. Pure.

use plimsoll_contract::abilities::Dtype;
use plimsoll_contract::memory::MemoryPlan;

use super::candidates::Candidate;
use super::memory::Fitted;
use super::{NodeResources, PodsSeen};
use crate::spec::Spec;

/// As status and tables write a type.
pub fn dtype(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
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

pub fn other_cache_dtype(wanted: Dtype) -> String {
    format!("spec.cache.dtype asks for {}", dtype(wanted))
}

pub fn too_little_cpu(wanted: u32, available: u32) -> String {
    format!(
        "spec.resources.cpu asks for {} CPUs, and the largest node has {}: lower it, or add a larger node",
        cpus(wanted),
        cpus(available),
    )
}

pub fn chosen(spec: &Spec, candidate: &Candidate, fitted: &Fitted) -> String {
    let exactness = match candidate.preference {
        0 => "the most exact type",
        _ => "the most exact type that carries the load",
    };
    let MemoryPlan { kv_tokens, .. } = fitted.memory;
    let load = if fitted.carries_workload() {
        String::new()
    } else {
        format!(", short of the {} that the workload asks for", count(fitted.demanded_tokens))
    };
    let of_what = of_what(spec, candidate);
    format!(
        "{} is {exactness}; {} of {} {of_what}, with {} tokens of KV cache{load}",
        dtype(candidate.ability.weights),
        bytes(fitted.memory.total()),
        bytes(candidate.capacity),
        count(kv_tokens),
    )
}

/// Where the bytes are that a pod may use, and why not more of them.
fn of_what(spec: &Spec, candidate: &Candidate) -> String {
    if spec.budget.memory_bytes == Some(candidate.capacity) {
        return "(spec.resources.memory)".to_owned();
    }
    let NodeResources { name, memory_bytes, asked_bytes, pods_seen, cpu_millis: _ } =
        &candidate.machine.best;
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

/// Why a plan that fits was not taken.
pub fn passed_over(best: &Candidate, best_fit: &Fitted, other: &Fitted) -> String {
    let best_dtype = dtype(best.ability.weights);
    if other.served_tokens() < best_fit.served_tokens() {
        return format!(
            "holds {} of the {} tokens that the workload asks for, and {best_dtype} holds {}",
            count(other.memory.kv_tokens),
            count(other.demanded_tokens),
            count(best_fit.memory.kv_tokens),
        );
    }
    format!(
        "fits with {} and {} tokens of KV cache, but {best_dtype} is more exact and carries the load too",
        bytes(other.memory.total()),
        count(other.memory.kv_tokens),
    )
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

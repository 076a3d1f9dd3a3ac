//! What fits: facts and a number of bytes become a KV budget, or a refusal that shows the sum. The arithmetic itself is
//! shared with the planner in the contract crate. Enters: facts, limits, bytes. Leaves: a plan. Never here: allocation.

use std::fmt;
use std::path::Path;

use plimsoll_contract::abilities::{Ability, PAGE_TOKENS};
use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::memory::{MemoryPlan, StepLimits, kv_bytes_per_token, plan};

/// The refusal: every summand, so that a person sees which one to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct DoesNotFit {
    pub plan: MemoryPlan,
    pub available: u64,
    pub remedy: String,
}

impl fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let MemoryPlan { weights, workspace, process, kv, kv_tokens } = self.plan;
        write!(
            f,
            "the model does not fit: weights {} + workspace {} + process {} + KV {} ({kv_tokens} tokens) = {}, but {} is available; {}",
            gib(weights),
            gib(workspace),
            gib(process),
            gib(kv),
            gib(self.plan.total()),
            gib(self.available),
            self.remedy
        )
    }
}

/// Two digits for large sizes, four where two would say 0.00.
pub fn gib(bytes: u64) -> String {
    let gib = bytes as f64 / (1u64 << 30) as f64;
    if gib >= 0.1 || bytes == 0 { format!("{gib:.2} GiB") } else { format!("{gib:.4} GiB") }
}

/// KV tokens that running sequences can fill: more would never be used.
fn kv_tokens_useful(limits: StepLimits, context_tokens: u64) -> u64 {
    u64::from(limits.running_max) * context_tokens
}

/// The plan for `kv_tokens` if they are given, or else for as many as fit: at least one page, at most what
/// `running_max` sequences of `context_tokens` fill, once over again for the prefix cache.
pub fn fit(
    facts: &ModelFacts,
    ability: Ability,
    limits: StepLimits,
    kv_tokens: Option<u64>,
    available: u64,
    context_tokens: u64,
) -> Result<MemoryPlan, DoesNotFit> {
    let page = u64::from(PAGE_TOKENS);
    let refuse = |plan, remedy| DoesNotFit { plan, available, remedy };
    if let Some(wanted) = kv_tokens {
        let plan = plan(facts, ability, limits, wanted.max(1));
        if plan.total() <= available {
            return Ok(plan);
        }
        return Err(refuse(
            plan,
            "lower --kv-tokens, choose --dtype f16 or give more memory".into(),
        ));
    }
    let smallest = plan(facts, ability, limits, page);
    if smallest.total() > available {
        return Err(refuse(
            smallest,
            "choose --dtype f16, a smaller model or give more memory".into(),
        ));
    }
    let spare = available - (smallest.total() - smallest.kv);
    let page_bytes = page * kv_bytes_per_token(facts, ability);
    let pages_fit = spare / page_bytes.max(1);
    let pages_useful = (2 * kv_tokens_useful(limits, context_tokens)).div_ceil(page).max(1);
    let pages = pages_fit.min(pages_useful).min(u64::from(u32::MAX));
    Ok(plan(facts, ability, limits, pages * page))
}

/// Bytes this process may use: the tightest cgroup limit less what the group already holds, or what the system says is
/// available. `root` is `/` but in tests.
pub fn available_bytes(root: &Path) -> Option<u64> {
    let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let system = told_bytes(&meminfo, "MemAvailable:")?;
    let group = cgroup_free(root);
    Some(group.map_or(system, |group| group.min(system)))
}

/// A size as the kernel tells it in a file of /proc: `VmRSS:  1234 kB`.
fn told_bytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Resident memory of this process.
pub fn rss_bytes() -> Option<u64> {
    told_bytes(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// The most that this process has had resident, less the files that are mapped now, which the kernel may drop at any
/// time: what a limit of memory is held against. `root` is `/` but in tests.
pub fn peak_bytes(root: &Path) -> Option<u64> {
    let status = std::fs::read_to_string(root.join("proc/self/status")).ok()?;
    Some(told_bytes(&status, "VmHWM:")?.saturating_sub(told_bytes(&status, "RssFile:")?))
}

/// The smallest free share from this process's group up to the root: a limit on any ancestor binds too.
fn cgroup_free(root: &Path) -> Option<u64> {
    let membership = std::fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    membership.lines().filter_map(|line| cgroup_line_free(root, line)).min()
}

fn cgroup_line_free(root: &Path, line: &str) -> Option<u64> {
    let mut parts = line.splitn(3, ':');
    let (_, controllers, group) = (parts.next()?, parts.next()?, parts.next()?);
    let (base, limit_file, used_file) = match controllers {
        "" => ("sys/fs/cgroup", "memory.max", "memory.current"),
        "memory" => ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        _ => return None,
    };
    let base = root.join(base);
    let own = base.join(group.trim_start_matches('/'));
    own.ancestors()
        .take_while(|dir| dir.starts_with(&base))
        .filter_map(|dir| {
            let number = |file: &str| -> Option<u64> {
                std::fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()
            };
            let limit = number(limit_file)?;
            let reclaimable = cached_bytes(dir);
            Some(limit.saturating_sub(number(used_file)?.saturating_sub(reclaimable)))
        })
        .min()
}

/// Page cache that the group gives back under pressure: it must not count as used.
fn cached_bytes(dir: &Path) -> u64 {
    let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let value = |name: &str| -> Option<u64> {
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    };
    let of = |name: &str| value(&format!("total_{name}")).or_else(|| value(name)).unwrap_or(0);
    of("inactive_file") + of("active_file")
}

#[cfg(test)]
mod tests;

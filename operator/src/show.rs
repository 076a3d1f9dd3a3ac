//! A plan for a person's eyes: facts, plan and refusals enter, lines of text leave. Pure.

use std::fmt::Write;

use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::memory::MemoryPlan;
use serde_json::json;

use crate::cli::Output;
use crate::plan::explain::{bytes, count, dtype};
use crate::plan::{self, Plan, PlanOutcome, Rejected};
use crate::spec::Spec;

/// Characters of the memory bar.
const BAR: u64 = 40;

pub fn rendered(output: Output, spec: &Spec, facts: &ModelFacts, outcome: &PlanOutcome) -> String {
    let data = || {
        let refusal = outcome.refusal().map(|(reason, message)| {
            json!({"reason": reason.name(), "message": message, "remedy": reason.remedy()})
        });
        json!({
            "model": facts,
            "plan": outcome.chosen.as_ref().map(|chosen| plan::status(outcome, chosen)),
            "flags": outcome.chosen.as_ref().map(|chosen| plan::flags(chosen, spec)),
            "refusal": refusal,
        })
    };
    match output {
        Output::Table => table(spec, facts, outcome),
        Output::Json => serde_json::to_string_pretty(&data()).expect("plain data") + "\n",
        Output::Yaml => serde_yaml_ng::to_string(&data()).expect("plain data"),
    }
}

/// About ten lines.
pub fn table(spec: &Spec, facts: &ModelFacts, outcome: &PlanOutcome) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        writeln!(text, "  {name:<10} {value}").expect("a String takes all");
    };
    line("model", &format!("{} ({})", spec.served_name, spec.source));
    line("", &model(facts));
    if let Some(plan) = &outcome.chosen {
        chosen(plan, &mut line);
    }
    if let Some((reason, message)) = outcome.refusal() {
        line("no plan", &format!("{}: {message}", reason.name()));
        line("remedy", reason.remedy());
    } else {
        for (index, Rejected { candidate, why, .. }) in outcome.rejected.iter().enumerate() {
            let name = if index == 0 { "not taken" } else { "" };
            line(name, &format!("{candidate}: {why}"));
        }
    }
    text
}

fn model(facts: &ModelFacts) -> String {
    let parameters = facts.parameters.total();
    let disk: u64 = facts.disk_bytes.values().sum();
    format!(
        "{}, {} parameters, {} layers, {} on disk, trained for {} tokens",
        facts.family.name(),
        in_words(parameters),
        facts.layers,
        bytes(disk),
        count(facts.context_tokens.into()),
    )
}

fn in_words(parameters: u64) -> String {
    match parameters {
        0..1_000_000 => count(parameters),
        1_000_000..1_000_000_000 => format!("{:.1} million", parameters as f64 / 1e6),
        _ => format!("{:.2} billion", parameters as f64 / 1e9),
    }
}

fn chosen(plan: &Plan, line: &mut impl FnMut(&str, &str)) {
    let MemoryPlan { weights, workspace, process, kv, kv_tokens: _ } = plan.memory;
    line(
        "plan",
        &format!(
            "{} · quantization {} · {} weights · TP {} · {}",
            plan.hash,
            plan.quantization,
            dtype(plan.dtype),
            plan.tensor_parallel,
            plan.accelerator,
        ),
    );
    line(
        "cache",
        &format!(
            "{} · {} · {} tokens · context {} · {} requests at once",
            plan.cache.strategy,
            dtype(plan.cache.dtype),
            count(plan.cache.tokens),
            count(plan.context_tokens.into()),
            plan.running_max,
        ),
    );
    line(
        "memory",
        &format!(
            "{} {} of {}",
            bar(&plan.memory, plan.capacity),
            bytes(plan.memory.total()),
            bytes(plan.capacity)
        ),
    );
    line(
        "",
        &format!(
            "█ weights {} · ▓ KV {} · ▒ workspace {} and process {}",
            bytes(weights),
            bytes(kv),
            bytes(workspace),
            bytes(process),
        ),
    );
    line("why", &plan.why);
}

/// Weights, KV, the rest, and what stays free, to scale; each part that exists shows at least once.
fn bar(memory: &MemoryPlan, capacity: u64) -> String {
    let cells = |part: u64| {
        let exact = u128::from(part) * u128::from(BAR) / u128::from(capacity.max(1));
        usize::try_from(exact).unwrap_or(usize::MAX).max(usize::from(part > 0))
    };
    let parts = [('█', memory.weights), ('▓', memory.kv), ('▒', memory.workspace + memory.process)];
    let mut bar = String::new();
    for (mark, part) in parts {
        bar.extend(std::iter::repeat_n(mark, cells(part)));
    }
    let width = usize::try_from(BAR).expect("forty");
    let used = bar.chars().count();
    bar.extend(std::iter::repeat_n('░', width.saturating_sub(used)));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_to_scale_and_hides_no_part() {
        let memory = MemoryPlan { weights: 50, workspace: 1, process: 0, kv: 25, kv_tokens: 64 };
        assert_eq!(bar(&memory, 100), "████████████████████▓▓▓▓▓▓▓▓▓▓▒░░░░░░░░░");
    }
}

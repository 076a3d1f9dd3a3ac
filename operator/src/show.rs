//! A plan for a person's eyes: facts, plan and refusals enter, lines of text leave. Pure.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io::IsTerminal;

use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::memory::MemoryPlan;
use plimsoll_crds::REJECTED_MAX;
use serde_json::{Value, json};

use crate::cli::Output;
use crate::plan::explain::{bytes, count, dollars, dtype, kv_dtype, time};
use crate::plan::{self, Plan, PlanOutcome, Predicted, Rejected, Unit};
use crate::spec::Spec;

/// Characters of the memory bar.
const BAR: u64 = 40;

/// Whether to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    Plain,
    Colour,
}

impl Paint {
    /// Colours are for terminals, and for people who did not ask for none (no-color.org).
    pub fn of(out: &impl IsTerminal) -> Paint {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|set| !set.is_empty());
        if out.is_terminal() && !unwanted { Paint::Colour } else { Paint::Plain }
    }
}

/// How many of the candidates that were not taken a table shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listed {
    Best,
    All,
}

pub fn rendered(
    output: Output,
    spec: &Spec,
    facts: &ModelFacts,
    outcome: &PlanOutcome,
    paint: Paint,
    listed: Listed,
) -> String {
    match output {
        Output::Table => table(spec, facts, outcome, paint, listed),
        Output::Json => {
            let data = data(spec, facts, outcome);
            serde_json::to_string_pretty(&data).expect("plain data") + "\n"
        }
        Output::Yaml => serde_yaml_ng::to_string(&data(spec, facts, outcome)).expect("plain data"),
    }
}

/// The plan as status has it, and every candidate.
fn data(spec: &Spec, facts: &ModelFacts, outcome: &PlanOutcome) -> Value {
    let refusal = outcome.refusal().map(|(reason, message)| {
        json!({"reason": reason.name(), "message": message, "remedy": reason.remedy()})
    });
    json!({
        "model": facts,
        "plan": outcome.chosen.as_ref().map(|chosen| plan::status(outcome, chosen)),
        "flags": outcome.chosen.as_ref().map(|chosen| plan::flags(chosen, spec)),
        "refusal": refusal,
        "candidates": candidates(outcome),
    })
}

fn candidates(outcome: &PlanOutcome) -> Vec<Value> {
    let chosen = outcome.chosen.iter().map(|plan| {
        json!({
            "candidate": plan.candidate, "runnable": true, "chosen": true, "why": plan.why,
            "memoryBytes": plan::outcome::memory(&plan.memory, plan.capacity),
            "predicted": plan.predicted.as_ref().map(plan::outcome::predicted),
        })
    });
    chosen.chain(outcome.rejected.iter().map(candidate)).collect()
}

fn candidate(rejected: &Rejected) -> Value {
    let Rejected { candidate, reason, why, runnable, miss, memory, capacity, predicted } = rejected;
    let mut data = json!({
        "candidate": candidate, "runnable": runnable, "chosen": false, "reason": reason.name(),
        "why": why,
    });
    if let Some(miss) = miss {
        let unit = match miss.unit {
            Unit::Bytes => "bytes",
            Unit::Gpus => "gpus",
            Unit::Microseconds => "microseconds",
        };
        data["shortBy"] = json!({unit: miss.short()});
    }
    if let Some(memory) = memory {
        data["memoryBytes"] = json!(plan::outcome::memory(memory, *capacity));
    }
    if let Some(predicted) = predicted {
        data["predicted"] = json!(plan::outcome::predicted(predicted));
    }
    data
}

/// About ten lines.
pub fn table(
    spec: &Spec,
    facts: &ModelFacts,
    outcome: &PlanOutcome,
    paint: Paint,
    listed: Listed,
) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        writeln!(text, "  {name:<10} {value}").expect("a String takes all");
    };
    line("model", &format!("{} ({})", spec.served_name, spec.source));
    line("", &model(facts));
    if let Some(plan) = &outcome.chosen {
        chosen(plan, paint, &mut line);
    }
    let heading = match outcome.refusal() {
        Some((reason, message)) => {
            let alike = outcome.rejected.iter().all(|rejected| rejected.why == message);
            let said = if alike { message.as_str() } else { "no candidate can be had" };
            line("no plan", &format!("{}: {said}", reason.name()));
            line("remedy", reason.remedy());
            if alike {
                return text;
            }
            "nearest"
        }
        None => "not taken",
    };
    let shown: Vec<_> = match listed {
        Listed::Best => best(&outcome.rejected),
        Listed::All => outcome.rejected.iter().collect(),
    };
    let more = outcome.rejected.len() - shown.len();
    for (index, rejected) in shown.into_iter().enumerate() {
        let name = if index == 0 { heading } else { "" };
        let Rejected { candidate, why, runnable, .. } = rejected;
        let mark = if *runnable { "" } else { " (runnable: false)" };
        line(name, &format!("{candidate}{mark}: {why}"));
    }
    if more > 0 {
        line("", &format!("and {} more: --all lists them", count(more as u64)));
    }
    text
}

/// The first few; of what does not run yet, only the best of each quantization on each class.
fn best(rejected: &[Rejected]) -> Vec<&Rejected> {
    let mut seen = BTreeSet::new();
    let of_a_kind = |candidate: &str| {
        let quantization = candidate.split(" · ").next().map(str::to_owned);
        (quantization, candidate.rsplit(" · ").next().map(str::to_owned))
    };
    let worth = |one: &&Rejected| one.runnable || seen.insert(of_a_kind(&one.candidate));
    rejected.iter().filter(worth).take(REJECTED_MAX).collect()
}

fn model(facts: &ModelFacts) -> String {
    let parameters = facts.parameters.total();
    let disk: u64 = facts.disk_bytes.values().sum();
    let disk = if disk > 0 { format!(", {} on disk", bytes(disk)) } else { String::new() };
    format!(
        "{}, {} parameters, {} layers{disk}, trained for {} tokens",
        facts.family.name(),
        in_words(parameters),
        facts.layers,
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

fn chosen(plan: &Plan, paint: Paint, line: &mut impl FnMut(&str, &str)) {
    let MemoryPlan { weights, workspace, process, kv, kv_tokens: _ } = plan.memory;
    line(
        "plan",
        &format!(
            "{} · quantization {} · {} weights · TP {} · {}",
            plan.hash,
            plan.quantization.name(),
            dtype(plan.dtype),
            plan.tensor_parallel,
            plan.accelerator,
        ),
    );
    line(
        "cache",
        &format!(
            "{} · {} · {} tokens · context {} · {} requests at once",
            plan.cache.strategy.name(),
            kv_dtype(plan.cache.dtype),
            count(plan.cache.tokens),
            count(plan.context_tokens.into()),
            plan.running_max,
        ),
    );
    line(
        "memory",
        &format!(
            "{} {} of {}",
            bar(&plan.memory, plan.capacity, paint),
            bytes(plan.memory.total()),
            bytes(plan.capacity)
        ),
    );
    line(
        "",
        &format!(
            "{} weights {} · {} KV {} · {} workspace {} and process {}",
            painted("█", WEIGHTS, paint),
            bytes(weights),
            painted("▓", KV, paint),
            bytes(kv),
            painted("▒", REST, paint),
            bytes(workspace),
            bytes(process),
        ),
    );
    if let Some(times) = &plan.predicted {
        line("predicted", &predicted(times));
    }
    line("why", &plan.why);
}

fn predicted(times: &Predicted) -> String {
    let Predicted { ttft, tpot, tokens_per_second, microdollars, basis } = *times;
    let price = microdollars.map(|micro| {
        let (price, date) = (dollars(micro), plan::PRICES_DATE);
        format!(" · {price} per million tokens at prices of {date}")
    });
    format!(
        "{} to the first token · {} between tokens · {} tokens/s{} · {}",
        time(ttft),
        time(tpot),
        count(tokens_per_second),
        price.unwrap_or_default(),
        basis.name().to_lowercase(),
    )
}

/// Colours of the bar's parts, as terminals number them.
const WEIGHTS: u8 = 34;
const KV: u8 = 32;
const REST: u8 = 33;
const FREE: u8 = 90;

fn painted(text: &str, colour: u8, paint: Paint) -> String {
    match paint {
        Paint::Plain => text.to_owned(),
        Paint::Colour if text.is_empty() => String::new(),
        Paint::Colour => format!("\x1b[{colour}m{text}\x1b[0m"),
    }
}

/// Weights, KV, the rest, and what stays free, to scale; each part that exists shows at least once.
fn bar(memory: &MemoryPlan, capacity: u64, paint: Paint) -> String {
    let cells = |part: u64| {
        let exact = u128::from(part) * u128::from(BAR) / u128::from(capacity.max(1));
        usize::try_from(exact).unwrap_or(usize::MAX).max(usize::from(part > 0))
    };
    let parts = [
        ("█", WEIGHTS, cells(memory.weights)),
        ("▓", KV, cells(memory.kv)),
        ("▒", REST, cells(memory.workspace + memory.process)),
    ];
    let width = usize::try_from(BAR).expect("forty");
    let used: usize = parts.iter().map(|(_, _, cells)| cells).sum();
    let free = ("░", FREE, width.saturating_sub(used));
    let part =
        |(mark, colour, cells): (&str, u8, usize)| painted(&mark.repeat(cells), colour, paint);
    parts.into_iter().chain([free]).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_to_scale_and_hides_no_part() {
        let memory = MemoryPlan { weights: 50, workspace: 1, process: 0, kv: 25, kv_tokens: 64 };
        let plain = bar(&memory, 100, Paint::Plain);
        assert_eq!(plain, "████████████████████▓▓▓▓▓▓▓▓▓▓▒░░░░░░░░░");
        let colour = bar(&memory, 100, Paint::Colour);
        assert!(colour.contains("\x1b[32m▓▓▓▓▓▓▓▓▓▓\x1b[0m\x1b[33m▒\x1b[0m"), "{colour:?}");
    }
}

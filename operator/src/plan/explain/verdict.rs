//! Why the best plan is the best, and why another that fits is not. Pure.

use plimsoll_contract::abilities::Backend;
use plimsoll_contract::memory::MemoryPlan;
use plimsoll_crds::Objective;

use super::super::candidates::Format;
use super::super::cost::{Load, Predicted};
use super::super::rank::{self, Criterion};
use super::super::{Feasible, Question, cards};
use super::{bytes, count, dollars, dtype, of_what, time};

/// Of the plan at `best` among all that can be had, the best first.
pub fn chosen(question: &Question<'_>, feasible: &[Feasible<'_>], best: usize) -> String {
    let Feasible { candidate, fitted, predicted } = &feasible[best];
    let spec = question.spec;
    let MemoryPlan { kv_tokens, .. } = fitted.memory;
    let load = if fitted.carries_workload() {
        String::new()
    } else {
        format!(", short of the {} that the workload asks for", count(fitted.demanded_tokens))
    };
    let what = match candidate.tensor_parallel {
        1 => dtype(candidate.ability.weights).to_owned(),
        degree => format!("{} on {degree} GPUs", Format(candidate.ability)),
    };
    let prediction = match predicted {
        Some(times) if spec.preferences.objective.is_some() || spec.preferences.slo.is_stated() => {
            format!("; {}", said(question, times))
        }
        _ => String::new(),
    };
    format!(
        "{what} is {}; {} of {} {}, with {} tokens of KV cache{load}{prediction}",
        merit(question, feasible, best),
        bytes(fitted.memory.total()),
        bytes(candidate.capacity),
        of_what(spec, candidate),
        count(kv_tokens),
    )
}

fn merit(question: &Question<'_>, feasible: &[Feasible<'_>], best: usize) -> String {
    let candidate = &feasible[best].candidate;
    let wishes = &question.spec.preferences;
    match (candidate.ability.backend, candidate.preference, wishes.objective) {
        (Backend::Cuda, _, Some(objective)) => {
            let runnable = feasible.iter().filter(|one| one.candidate.runnable).count();
            match (runnable, wishes.slo.is_stated()) {
                (1, false) => "the only one that runs and fits".to_owned(),
                (1, true) => "the only one that runs, fits and keeps spec.slo".to_owned(),
                (some, false) => format!("{} of {some} that run and fit", superlative(objective)),
                (some, true) => {
                    format!("{} of {some} that run, fit and keep spec.slo", superlative(objective))
                }
            }
        }
        (Backend::Cuda, ..) => "what runs on a GPU, which comes before CPUs".to_owned(),
        (Backend::Cpu, 0, _) => "the most exact type".to_owned(),
        (Backend::Cpu, ..) => "the most exact type that carries the load".to_owned(),
    }
}

fn superlative(objective: Objective) -> &'static str {
    match objective {
        Objective::Latency => "the fastest per token",
        Objective::Throughput => "the one with the most tokens per second of each GPU",
        Objective::Cost => "the cheapest per token",
    }
}

fn said(question: &Question<'_>, times: &Predicted) -> String {
    let Load { prompt, output, concurrency } =
        Load::of(&question.spec.workload, question.facts.context_tokens);
    let price = times.microdollars.map(|micro| format!(", {} per million", dollars(micro)));
    format!(
        "by prediction {} to the first token, {} between tokens and {} tokens/s{} at {concurrency} requests of {} + {} tokens",
        time(times.ttft),
        time(times.tpot),
        count(times.tokens_per_second),
        price.unwrap_or_default(),
        count(prompt.into()),
        count(output.into()),
    )
}

/// Why a plan that could be had was not taken; without a best one nothing that could be had runs.
pub fn passed_over(
    best: Option<&Feasible<'_>>,
    other: &Feasible<'_>,
    objective: Option<Objective>,
) -> String {
    let fits = format!(
        "fits with {} and {} tokens of KV cache",
        bytes(other.fitted.memory.total()),
        count(other.fitted.memory.kv_tokens),
    );
    if !other.candidate.runnable {
        let speed = match &other.predicted {
            Some(times) => format!(
                ", by prediction {} between tokens and {} tokens/s",
                time(times.tpot),
                count(times.tokens_per_second)
            ),
            None => String::new(),
        };
        return format!("{fits}{speed}, but the engine of this version does not run it");
    }
    let best = best.expect("what runs and can be had is chosen, if nothing better is");
    let criterion = rank::order(best, other, objective).map(|(_, criterion)| criterion);
    lost_by(criterion.unwrap_or(Criterion::Quality), best, other, &fits)
}

fn lost_by(criterion: Criterion, best: &Feasible<'_>, other: &Feasible<'_>, fits: &str) -> String {
    let class = best.candidate.machine.class.as_str();
    let on_gpu = best.candidate.machine.card.is_some();
    let best_name = if on_gpu { class } else { dtype(best.candidate.ability.weights) };
    match criterion {
        Criterion::Gpu => format!("{fits}, but {class} comes before CPUs"),
        Criterion::Load => format!(
            "holds {} of the {} tokens that the workload asks for, and {best_name} holds {}",
            count(other.fitted.memory.kv_tokens),
            count(other.fitted.demanded_tokens),
            count(best.fitted.memory.kv_tokens),
        ),
        Criterion::Free => {
            let machine = other.candidate.machine;
            let all: u64 = machine.gpus.iter().map(|(all, _)| u64::from(*all)).sum();
            let free: u64 = machine.gpus.iter().map(|(_, free)| u64::from(*free)).sum();
            format!(
                "{fits}, but {free} of {all} {} are free at the moment, and {best_name} is",
                machine.class
            )
        }
        Criterion::Objective(objective) => {
            let figure = |one: &Feasible<'_>| match (&one.predicted, objective) {
                (None, _) => "an unknown speed".to_owned(),
                (Some(times), Objective::Latency) => format!("TPOT {}", time(times.tpot)),
                (Some(times), Objective::Throughput) => {
                    let degree = u64::from(one.candidate.tensor_parallel);
                    format!("{} tokens/s of each GPU", count(times.tokens_per_second / degree))
                }
                (Some(times), Objective::Cost) => match times.microdollars {
                    Some(micro) => format!("{} per million tokens", dollars(micro)),
                    None => "no known price".to_owned(),
                },
            };
            format!("{} against {} of {}", figure(other), figure(best), best.candidate)
        }
        Criterion::CardMemory => {
            let memory = |one: &Feasible<'_>| {
                let card: Option<&cards::Card> = one.candidate.machine.card.as_ref();
                let degree = u64::from(one.candidate.tensor_parallel);
                bytes(card.map_or(0, |card| card.memory_bytes.saturating_mul(degree)))
            };
            let (least, more) = (memory(best), memory(other));
            format!(
                "{fits}, but {best_name} with {least} carries the load too and leaves the {more} to larger models"
            )
        }
        Criterion::Quality if on_gpu => {
            format!(
                "{fits}, but {} is more exact and carries the load too",
                Format(best.candidate.ability)
            )
        }
        Criterion::Quality => {
            format!("{fits}, but {best_name} is more exact and carries the load too")
        }
    }
}

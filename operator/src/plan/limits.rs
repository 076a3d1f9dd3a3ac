//! What refuses a candidate whatever its memory: wishes of the spec, the shape of the model, what is on disk, budgets of
//! GPUs. Pure.

use plimsoll_contract::abilities::{Backend, CUDA_HEAD_DIM_MAX, CacheStrategy, Quantization};
use plimsoll_contract::facts::ModelFacts;
use plimsoll_crds::Reason;

use super::candidates::Candidate;
use super::machines::GPU_HOST_BYTES;
use super::{Miss, Question, Refusal, Unit, explain, figures};
use crate::spec::{Preferences, Spec, Workload};

pub fn check(question: &Question<'_>, candidate: &Candidate<'_>) -> Result<(), Refusal> {
    let Question { spec, facts, .. } = *question;
    on_disk(facts, candidate)?;
    lengths(spec, facts)?;
    wishes(&spec.preferences, facts, candidate)?;
    let wanted_cpu = spec.budget.cpu_millis.unwrap_or(0);
    let cpu_millis = candidate.machine.best.free_cpu_millis();
    if wanted_cpu > cpu_millis {
        let why = explain::too_little_cpu(wanted_cpu, cpu_millis);
        return Err(Refusal::new(Reason::DoesNotFit, why));
    }
    if candidate.ability.backend == Backend::Cuda {
        shape(facts, candidate)?;
        gpus(question, candidate)?;
        host(spec, candidate)?;
    }
    Ok(())
}

/// A checkpoint that is quantized already is run as it is, or not at all.
fn on_disk(facts: &ModelFacts, candidate: &Candidate<'_>) -> Result<(), Refusal> {
    let Some(method) = &facts.quantization else { return Ok(()) };
    if Quantization::on_disk(method) == Some(candidate.ability.quantization) {
        return Ok(());
    }
    Err(Refusal::new(Reason::UnsupportedModel, explain::quantized_on_disk(method)))
}

fn lengths(spec: &Spec, facts: &ModelFacts) -> Result<(), Refusal> {
    let trained = facts.context_tokens;
    if let Some(context) = spec.context_tokens.filter(|context| *context > trained) {
        return Err(Refusal::new(Reason::InvalidSpec, explain::context_too_long(context, trained)));
    }
    let Workload { prompt_tokens, output_tokens, .. } = spec.workload;
    let request = u64::from(prompt_tokens.unwrap_or(0)) + u64::from(output_tokens.unwrap_or(0));
    if request > u64::from(trained) {
        return Err(Refusal::new(Reason::InvalidSpec, explain::request_too_long(request, trained)));
    }
    Ok(())
}

/// What the spec names is taken at its word; what the planner chooses by itself has to keep spec.quality.
fn wishes(
    wishes: &Preferences,
    facts: &ModelFacts,
    candidate: &Candidate<'_>,
) -> Result<(), Refusal> {
    let ability = candidate.ability;
    let refused = |why: String| Err(Refusal::new(Reason::InvalidSpec, why));
    if let Some(wanted) = wishes.cache_dtype.filter(|dtype| *dtype != ability.kv) {
        return refused(explain::other_cache_dtype(wanted, ability.kv));
    }
    if let Some(wanted) = wishes.cache_strategy.filter(|strategy| *strategy != ability.strategy) {
        let field = "spec.cache.strategy";
        return refused(explain::other_wish(field, wanted.name(), ability.strategy.name()));
    }
    if let Some(wanted) = wishes.quantization.filter(|wanted| *wanted != ability.quantization) {
        let field = "spec.quantization";
        return refused(explain::other_wish(field, wanted.name(), ability.quantization.name()));
    }
    let degree = candidate.tensor_parallel;
    if let Some(wanted) = wishes.tensor_parallel.filter(|wanted| *wanted != degree) {
        let (wanted, degree) = (wanted.to_string(), degree.to_string());
        return refused(explain::other_wish("spec.tensorParallel", &wanted, &degree));
    }
    let weight_bits = ability.quantization.weight_bits().unwrap_or(8 * ability.weights.bytes());
    let named = wishes.quantization.is_some() || facts.quantization.is_some();
    let floor = u64::from(wishes.quality.weight_bits);
    if weight_bits < floor && !named {
        let why = explain::below_quality(weight_bits, "weight", "minWeightBits", floor);
        return Err(Refusal::new(Reason::DoesNotFit, why));
    }
    let floor = u64::from(wishes.quality.kv_bits);
    if ability.kv.bits() < floor && wishes.cache_dtype.is_none() {
        let why = explain::below_quality(ability.kv.bits(), "key or value", "minKvBits", floor);
        return Err(Refusal::new(Reason::DoesNotFit, why));
    }
    Ok(())
}

/// What kernels and cards take, and what GPUs can divide among themselves.
fn shape(facts: &ModelFacts, candidate: &Candidate<'_>) -> Result<(), Refusal> {
    let unsupported = |why: String| Err(Refusal::new(Reason::UnsupportedModel, why));
    if facts.head_dim > CUDA_HEAD_DIM_MAX {
        return unsupported(explain::heads_too_wide(facts.head_dim, CUDA_HEAD_DIM_MAX));
    }
    let ability = candidate.ability;
    if ability.strategy == CacheStrategy::SlidingWindow && facts.sliding_window.is_none() {
        return unsupported(explain::no_window());
    }
    let degree = candidate.tensor_parallel;
    for (what, count) in [
        ("heads", facts.heads),
        ("KV heads", facts.kv_heads),
        ("columns of the intermediate layer", facts.intermediate),
    ] {
        if !count.is_multiple_of(degree) {
            return unsupported(explain::indivisible(degree, what, count));
        }
    }
    let card = candidate.machine.card.as_ref().and_then(|card| figures::of_product(&card.product));
    let lacks = |what| unsupported(explain::no_units(&candidate.machine.class, what));
    match (ability.quantization, card) {
        (Quantization::W8A8Fp8, Some(card)) if card.fp8_tflops.is_none() => lacks("FP8"),
        (Quantization::W8A8Int8 | Quantization::W4A8, Some(card)) if card.int8_tops.is_none() => {
            lacks("INT8")
        }
        _ => Ok(()),
    }
}

fn gpus(question: &Question<'_>, candidate: &Candidate<'_>) -> Result<(), Refusal> {
    let degree = candidate.tensor_parallel;
    let wanted = u64::from(degree) * u64::from(question.spec.replicas.max(1));
    let bounds = [
        ("maxGPUs", question.spec.preferences.gpus_max.map(u64::from)),
        ("quota", question.quota.gpus),
    ];
    let refused = |why: String, wanted: u64, bound: u64| {
        let miss = Some(Miss::new(Unit::Gpus, wanted, bound));
        Err(Refusal { miss, ..Refusal::new(Reason::DoesNotFit, why) })
    };
    for (name, bound) in bounds {
        if let Some(bound) = bound.filter(|bound| wanted > *bound) {
            return refused(explain::too_many_gpus(wanted, name, bound), wanted, bound);
        }
    }
    let of_a_node = candidate.machine.gpus_of_a_node();
    if degree > of_a_node {
        let why = explain::too_few_gpus_together(degree, of_a_node);
        return refused(why, degree.into(), of_a_node.into());
    }
    Ok(())
}

/// A card does not help where the host beside it is too small.
fn host(spec: &Spec, candidate: &Candidate<'_>) -> Result<(), Refusal> {
    let host = &candidate.machine.best;
    let left = spec.budget.memory_bytes.unwrap_or(u64::MAX).min(host.free_bytes());
    if left < GPU_HOST_BYTES {
        let why = explain::too_little_host(spec, host, GPU_HOST_BYTES);
        return Err(Refusal::new(Reason::DoesNotFit, why));
    }
    Ok(())
}

//! From a directory to a model that serves: memory is planned and refused before a weight is read, the tokenizer loads
//! while the weights do. Enters: the command line. Leaves: [`Served`], or the report of why not.

use std::sync::Arc;
use std::time::Instant;

use plimsoll_contract::abilities::{Ability, Backend as Kind, PAGE_TOKENS};
use plimsoll_contract::exit::{ExitReason, ExitReport, MemoryReport};
use plimsoll_contract::facts::{Gpu, ModelFacts};
use plimsoll_contract::memory::{MemoryPlan, StepLimits};

use crate::admission::ModelLimits;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::cuda::{CudaBackend, CudaOptions, Source};
use crate::backend::place::Place;
use crate::backend::{Backend, LoadProgress};
use crate::chat_template::ChatTemplate;
use crate::cli::ServeArgs;
use crate::exit::internal;
use crate::http::{App, Served};
use crate::metrics::{Metrics, Startup};
use crate::model::{Checkpoint, LoadError, Shard};
use crate::step::{self, Limits};
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::{inspect, memory};

/// `show` is for a person who waits; `app` for probes. `started` is when the process began.
pub fn load(
    args: &ServeArgs,
    app: &App,
    started: Instant,
    show: &mut dyn FnMut(&str),
) -> Result<Served, ExitReport> {
    let report = |error: LoadError| error.report();
    let mut progress = |text: String| {
        show(&text);
        app.set_progress(text);
    };
    progress(format!("reading {}", args.model.display()));
    let checkpoint = Checkpoint::open(&args.model).map_err(report)?;
    let facts = checkpoint.facts();
    let context_tokens = context_tokens(args, facts)?;
    let place = Place::choose(args.device)?;
    let ability = place.ability(args.dtype.map(Into::into))?;
    let step = step_limits(args, ability.backend);
    let left_at_start = left_bytes(&place);
    let available = args.memory_bytes.or(left_at_start).ok_or_else(|| {
        internal("the system does not say how much memory there is; give --memory-bytes")
    })?;
    let plan =
        memory::fit(facts, ability, step, args.kv_tokens, available, u64::from(context_tokens))
            .map_err(|error| LoadError::DoesNotFit(error).report())?;
    let kv_pages = vec![kv_pages(&plan)];
    tracing::info!(
        weights = memory::gib(plan.weights),
        workspace = memory::gib(plan.workspace),
        kv = memory::gib(plan.kv),
        kv_tokens = plan.kv_tokens,
        context_tokens,
        device = place.name(),
        "memory planned"
    );

    let loading = Instant::now();
    let (backend, tokenizer) = std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| Tokenizer::open(&args.model));
        let mut layers = |LoadProgress { layers_done, layers }: LoadProgress| {
            progress(format!("weights: {layers_done} of {layers} layers"));
        };
        let batch_invariant = args.batch_invariant;
        let cuda = CudaOptions {
            kv_pages: kv_pages[0],
            step,
            context_tokens,
            batch_invariant,
            ..CudaOptions::default()
        };
        let backend = backend(&place, &checkpoint, ability, cuda, &mut layers);
        (backend, tokenizer.join())
    });
    let backend = backend.map_err(|error| with_figures(&error, left_at_start, available))?;
    let tokenizer = tokenizer
        .map_err(|_| internal("the tokenizer's thread panicked"))?
        .map_err(|error| tokenizer_report(&error))?;
    check_vocabulary(&tokenizer, facts)?;
    let weights_load_seconds = loading.elapsed().as_secs_f64();
    progress("starting the step loop".into());

    let metrics = Metrics::new(&app.name, context_tokens);
    let gpu = gpu(&place);
    metrics.device_is(gpu.as_ref());
    if let (Place::Cuda(device), Some(at_start)) = (&place, left_at_start) {
        let device = device.clone();
        metrics.device_memory_is(move || {
            device.bind().ok()?;
            let (free, _) = device.memory().ok()?;
            Some(at_start.saturating_sub(free as u64))
        });
    }
    let limits = Limits {
        running_max: step.running_max as usize,
        waiting_max: args.waiting_max as usize,
        step_tokens_max: step.step_tokens_max,
        context_tokens,
        kv_pages,
        steps_in_flight: steps_in_flight(args, ability.backend),
        prefix_reuse: !args.no_prefix_reuse,
    };
    let engine = step::start(backend, limits, metrics.clone());
    metrics.started(Startup {
        seconds: started.elapsed().as_secs_f64(),
        weights_load_seconds,
        weights_bytes: plan.weights,
        kv_cache_bytes: plan.kv,
    });
    // An empty line where the progress was.
    show("");
    Ok(Served {
        name: app.name.clone(),
        tokenizer: Arc::new(tokenizer),
        template: template(args),
        limits: ModelLimits {
            context_tokens,
            kv_tokens: plan.kv_tokens,
            vocabulary: facts.vocabulary,
            eos: Arc::new(checkpoint.eos_token_ids.iter().copied().collect()),
        },
        engine,
        metrics,
    })
}

/// For the log and the metrics alone: a driver that does not answer is found out by the first step.
fn gpu(place: &Place) -> Option<Gpu> {
    let Place::Cuda(device) = place else { return None };
    let gpu = inspect::gpu(device).ok()?;
    tracing::info!(
        device = gpu.name,
        memory = memory::gib(gpu.memory_bytes),
        free = memory::gib(gpu.memory_free_bytes),
        driver = gpu.driver,
        "device loaded"
    );
    Some(gpu)
}

/// What was asked for, or what the model was trained for.
fn context_tokens(args: &ServeArgs, facts: &ModelFacts) -> Result<u32, ExitReport> {
    match args.context_tokens {
        Some(asked) if asked > facts.context_tokens => Err(ExitReport::new(
            ExitReason::UnsupportedModel,
            format!(
                "--context-tokens {asked} is more than the {} tokens this model was trained for; lower it",
                facts.context_tokens
            ),
        )),
        Some(asked) => Ok(asked),
        None => Ok(facts.context_tokens),
    }
}

/// What was asked for, or what suits the device: a GPU is filled by many rows, a CPU by few.
fn step_limits(args: &ServeArgs, kind: Kind) -> StepLimits {
    let (running_max, step_tokens_max) = match kind {
        Kind::Cpu => (32, 512),
        Kind::Cuda => (256, 2048),
    };
    StepLimits {
        step_tokens_max: args.step_tokens_max.unwrap_or(step_tokens_max),
        running_max: args.running_max.unwrap_or(running_max),
    }
}

/// A device computes while the next step is planned; a CPU would only plan late.
fn steps_in_flight(args: &ServeArgs, kind: Kind) -> usize {
    let usual = match kind {
        Kind::Cpu => 1,
        Kind::Cuda => 2,
    };
    args.steps_in_flight.map_or(usual, |steps| steps as usize)
}

fn backend(
    place: &Place,
    checkpoint: &Checkpoint,
    ability: Ability,
    cuda: CudaOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Box<dyn Backend>, LoadError> {
    match place {
        Place::Cpu => {
            let options = CpuOptions {
                dtype: ability.weights,
                kv_pages: vec![cuda.kv_pages],
                running_max: cuda.step.running_max,
                shard: Shard::WHOLE,
            };
            Ok(Box::new(CpuBackend::load(checkpoint, options, progress)?))
        }
        Place::Cuda(device) => {
            let source = Source::Checkpoint(checkpoint);
            Ok(Box::new(CudaBackend::load(device.clone(), source, cuda, progress)?))
        }
    }
}

/// What the card has left, or what the system says of the host.
fn left_bytes(place: &Place) -> Option<u64> {
    match place {
        Place::Cpu => memory::available_bytes("/".as_ref()),
        Place::Cuda(device) => device.memory().ok().map(|(free, _)| free as u64),
    }
}

/// The report of a load that failed, with what had been taken by then where memory was refused. On a card that is what
/// became less since the start; on a CPU the most that was resident.
fn with_figures(error: &LoadError, left_at_start: Option<u64>, available: u64) -> ExitReport {
    let mut report = error.report();
    if let LoadError::OutOfDeviceMemory { bytes, left, .. } = error {
        let held = match (left_at_start, left) {
            (Some(at_start), Some(left)) => at_start.saturating_sub(*left),
            _ => memory::peak_bytes("/".as_ref()).unwrap_or(0),
        };
        let needed_bytes = held.saturating_add(*bytes);
        report.message = format!(
            "{}; it held {} of the {} that there were",
            report.message,
            memory::gib(held),
            memory::gib(available)
        );
        report.memory = Some(MemoryReport { needed_bytes, available_bytes: available });
    }
    report
}

fn kv_pages(plan: &MemoryPlan) -> u32 {
    u32::try_from(plan.kv_tokens / u64::from(PAGE_TOKENS)).unwrap_or(u32::MAX)
}

/// A template that cannot be used costs the chat endpoint, not the others.
fn template(args: &ServeArgs) -> Option<ChatTemplate> {
    ChatTemplate::open(&args.model).unwrap_or_else(|error| {
        tracing::warn!(%error, "chat completions will be refused");
        None
    })
}

fn tokenizer_report(error: &TokenizerError) -> ExitReport {
    let reason = match error {
        TokenizerError::Missing(_) | TokenizerError::UnsupportedDecoder { .. } => {
            ExitReason::UnsupportedModel
        }
        TokenizerError::Malformed { .. } => ExitReason::CorruptWeights,
    };
    ExitReport::new(reason, error.to_string())
}

/// A token without an embedding row would be a read beyond the matrix.
fn check_vocabulary(tokenizer: &Tokenizer, facts: &ModelFacts) -> Result<(), ExitReport> {
    let ids = tokenizer.ids();
    if ids <= facts.vocabulary as usize {
        return Ok(());
    }
    Err(ExitReport::new(
        ExitReason::CorruptWeights,
        format!(
            "tokenizer.json has ids up to {}, but the model's vocabulary has {} rows; the files belong to different models",
            ids - 1,
            facts.vocabulary
        ),
    ))
}

#[cfg(test)]
mod tests {
    use plimsoll_kernels::device::DeviceError;

    use super::*;

    fn refused(left: Option<u64>) -> LoadError {
        let source = std::io::Error::other("the card's memory is full");
        LoadError::OutOfDeviceMemory { purpose: "KV pages", bytes: 5 << 30, left, source }
    }

    #[test]
    fn a_card_that_is_full_is_reported_with_what_was_held_and_wanted() {
        let report = with_figures(&refused(Some(3 << 30)), Some(20 << 30), 20 << 30);
        let memory = MemoryReport { needed_bytes: 22 << 30, available_bytes: 20 << 30 };
        assert_eq!(report.memory, Some(memory), "17 GiB were held by then");
        assert_eq!(report.reason, ExitReason::OutOfDeviceMemory);
        assert!(report.message.ends_with("it held 17.00 GiB of the 20.00 GiB that there were"));
        // What was said to be there does not hide what the card had.
        let report = with_figures(&refused(Some(3 << 30)), Some(20 << 30), 19 << 30);
        let memory = MemoryReport { needed_bytes: 22 << 30, available_bytes: 19 << 30 };
        assert_eq!(report.memory, Some(memory));
    }

    #[test]
    fn on_a_cpu_the_most_that_was_resident_counts() {
        let report = with_figures(&refused(None), Some(20 << 30), 20 << 30);
        let memory = report.memory.unwrap();
        assert!(memory.needed_bytes > 5 << 30 && memory.needed_bytes < 8 << 30, "{memory:?}");
        let other = with_figures(&LoadError::Device(DeviceError::NoResult), None, 1);
        assert_eq!((other.reason, other.memory), (ExitReason::DeviceLost, None));
    }
}

//! How fast a candidate is expected to be: a roofline with the efficiencies of `calibration`. Model facts, card and load
//! enter; times and money leave. Pure; the formulae are those of docs/planner.md, in its words.

use plimsoll_contract::abilities::{Ability, CacheStrategy, Quantization};
use plimsoll_contract::facts::ModelFacts;
use plimsoll_contract::memory;

use super::calibration::{self, Speeds};
use super::candidates::Candidate;
use super::memory::Fitted;
use super::prices::Prices;
use super::{CONCURRENCY_DEFAULT, REQUEST_TOKENS_DEFAULT, figures};
use crate::spec::Workload;

/// What one pod is expected to do at the stated workload. Times in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Predicted {
    pub ttft: u64,
    pub tpot: u64,
    /// Output tokens of all requests together.
    pub tokens_per_second: u64,
    /// Millionths of a US dollar for a million output tokens, where the class has a price.
    pub microdollars: Option<u64>,
    pub basis: Basis,
}

/// What the speeds rest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// The engine's bench on this card, in this format.
    Measured,
    /// Data sheets, and how near to its own another card comes.
    Estimated,
}

impl Basis {
    pub fn name(self) -> &'static str {
        match self {
            Basis::Measured => "Measured",
            Basis::Estimated => "Estimated",
        }
    }
}

/// The load that predictions are made for: what the spec states, and the usual for what it leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    pub prompt: u32,
    pub output: u32,
    pub concurrency: u32,
}

impl Load {
    pub fn of(workload: &Workload, context_tokens: u32) -> Load {
        let usual = REQUEST_TOKENS_DEFAULT.min(context_tokens).max(2);
        let (prompt, output) = workload.request(usual).unwrap_or((usual / 2, usual / 2));
        Load { prompt, output, concurrency: workload.concurrency.unwrap_or(CONCURRENCY_DEFAULT) }
    }
}

/// None where nothing is known of the machine: CPUs, and cards that are not in the table.
pub fn predict(
    facts: &ModelFacts,
    candidate: &Candidate<'_>,
    fitted: &Fitted,
    workload: &Workload,
    prices: &Prices,
) -> Option<Predicted> {
    let card = candidate.machine.card.as_ref()?;
    let speeds = calibration::speeds(&figures::of_product(&card.product)?);
    let ranks = candidate.tensor_parallel;
    let roofline = Roofline::of(facts, candidate.ability, speeds, ranks);
    let load = Load::of(workload, facts.context_tokens);
    let step = fitted.limits.step_tokens_max;
    let (prompt, output) = (f64::from(load.prompt), f64::from(load.output));
    let context = prompt + output / 2.0;

    let rows = f64::from(load.concurrency);
    let hosted = fitted.hosted_share(u64::from(load.concurrency), load);
    let decode = roofline.decode(rows, context, hosted);
    let prefill = roofline.prefill(load.prompt, step);
    let beside = roofline.attended(rows - 1.0, context, hosted);
    let steps = f64::from(load.prompt.div_ceil(step.max(1)));
    // While one sequence decodes, each of the others brings its prompt once; the weights are read for both together.
    let shared = steps * roofline.weights_read();
    let tpot = decode + (rows - 1.0) / output * (prefill - shared).max(0.0);
    let waiting = if load.concurrency > 1 { STEPS_AHEAD * tpot } else { 0.0 };
    let ttft = waiting + prefill + steps * beside;

    // As many requests run as have room for their KV.
    let request = u64::from(load.prompt) + u64::from(load.output);
    let room = (fitted.memory.kv_tokens + fitted.host_tokens) / request.max(1);
    let running =
        u64::from(load.concurrency.min(fitted.limits.running_max)).min(room).max(1) as f64;
    let decode = roofline.decode(running, context, hosted);
    let busy = output * decode + running * (prefill - shared).max(0.0) + shared;
    let tokens_per_second = running * output / busy;

    let hour = prices.of(&candidate.machine.class).map(|price| price * u64::from(ranks));
    let microdollars = hour.map(|hour| (hour as f64 / 3600.0 / tokens_per_second * 1e6) as u64);
    let plain =
        candidate.ability == Ability::plain(candidate.ability.backend, candidate.ability.weights);
    Some(Predicted {
        ttft: microseconds(ttft),
        tpot: microseconds(tpot),
        tokens_per_second: tokens_per_second as u64,
        microdollars,
        basis: if speeds.measured && plain && ranks == 1 {
            Basis::Measured
        } else {
            Basis::Estimated
        },
    })
}

/// Steps before the first of a request that comes while others run: half of the one under way, and the one behind it, for
/// two are in flight.
const STEPS_AHEAD: f64 = 1.5;

fn microseconds(seconds: f64) -> u64 {
    (seconds * 1e6).round().max(1.0) as u64
}

impl Fitted {
    /// Part of the running sequences' KV that lies in the host's memory.
    fn hosted_share(&self, concurrency: u64, load: Load) -> f64 {
        let running = concurrency * (u64::from(load.prompt) + u64::from(load.output));
        let hosted = running.saturating_sub(self.memory.kv_tokens).min(self.host_tokens);
        hosted as f64 / running.max(1) as f64
    }
}

/// One model on one kind of card: what a step reads, multiplies and waits for.
pub struct Roofline {
    speeds: Speeds,
    ranks: f64,
    layers: f64,
    hidden: f64,
    vocabulary: f64,
    /// Width of all query heads of one card.
    heads: f64,
    /// Parameters of one card's layers and head.
    matrices: f64,
    head: f64,
    /// Bytes of one card that each step reads.
    weights: f64,
    kv_token: f64,
    /// FLOP per second of the layers' products, and of attention to a prompt.
    products: f64,
    attention: f64,
}

impl Roofline {
    pub fn of(facts: &ModelFacts, ability: Ability, speeds: Speeds, ranks: u32) -> Roofline {
        let shard = memory::shard(facts, ranks);
        let head = f64::from(shard.vocabulary) * f64::from(shard.hidden);
        // Of an embedding that is no head too, a step reads a few rows.
        let unread = if facts.tied_head { 0.0 } else { head * ability.weights.bytes() as f64 };
        let products = match ability.quantization {
            Quantization::W8A8Fp8 => speeds.fp8,
            Quantization::W8A8Int8 | Quantization::W4A8 => speeds.int8,
            _ => None,
        };
        let layers = f64::from(shard.layers);
        let mut kv_token = memory::kv_bytes_per_token(&shard, ability) as f64;
        if let (CacheStrategy::SlidingWindow, Some(window)) =
            (ability.strategy, facts.sliding_window)
        {
            kv_token *= (layers - f64::from(window.layers)) / layers;
        }
        Roofline {
            ranks: f64::from(ranks),
            layers,
            hidden: f64::from(shard.hidden),
            vocabulary: f64::from(shard.vocabulary),
            heads: f64::from(shard.heads) * f64::from(shard.head_dim),
            matrices: (shard.parameters.attention + shard.parameters.mlp) as f64,
            head,
            weights: memory::weights_bytes(&shard, ability) as f64 - unread,
            kv_token,
            products: products.unwrap_or(speeds.bf16),
            attention: speeds.bf16
                * speeds.calibration.attention_flop_shares[usize::from(facts.head_dim > 64)],
            speeds,
        }
    }

    /// Seconds of one step in which `rows` sequences of `context` tokens decode, a share of whose KV the host holds.
    pub fn decode(&self, rows: f64, context: f64, hosted: f64) -> f64 {
        self.products(rows, rows) + self.attended(rows, context, hosted)
    }

    /// Seconds until a prompt of `tokens` is computed in steps of at most `step` rows.
    pub fn prefill(&self, tokens: u32, step: u32) -> f64 {
        let mut seconds = 0.0;
        let mut past = 0;
        while past < tokens {
            let rows = (tokens - past).min(step.max(1));
            let (rows_f, past_f) = (f64::from(rows), f64::from(past));
            let attended = rows_f * (past_f + rows_f / 2.0);
            let flop = 4.0 * self.heads * attended * self.layers;
            seconds += self.products(rows_f, 1.0) + flop / self.attention;
            past += rows;
        }
        seconds
    }

    pub fn weights_read(&self) -> f64 {
        self.weights / (self.speeds.read * self.speeds.calibration.stream_share)
    }

    /// Products of a step: the family that streams weights, or the one that works in tiles, whichever takes longer.
    fn products(&self, rows: f64, head_rows: f64) -> f64 {
        let known = self.speeds.calibration;
        let beside = rows * self.layers * self.hidden * known.row_bytes
            + head_rows * self.vocabulary * known.logit_bytes;
        let stream =
            self.weights_read() + beside / self.speeds.read + self.layers * known.stream_gap;
        let flop = 2.0 * rows * self.matrices / self.products
            + 2.0 * head_rows * self.head / self.speeds.bf16;
        let tile = flop / known.tile_share + self.layers * known.tile_gap;
        stream.max(tile) + self.exchange(rows)
    }

    /// Two sums over all cards in each layer.
    fn exchange(&self, rows: f64) -> f64 {
        if self.ranks < 2.0 {
            return 0.0;
        }
        let bytes = 2.0 * rows * self.hidden * 2.0 * (self.ranks - 1.0) / self.ranks;
        2.0 * self.layers * (EXCHANGE_SECONDS + bytes / self.speeds.link)
    }

    /// KV that a step reads, from the card and from the host.
    fn attended(&self, rows: f64, context: f64, hosted: f64) -> f64 {
        let bytes = rows.max(0.0) * context * self.kv_token;
        let share = self.speeds.calibration.attention_read_share;
        bytes * (1.0 - hosted) / (self.speeds.read * share) + bytes * hosted / self.speeds.host
    }
}

/// What a sum over cards takes before its first byte: published for 2 to 8 cards at 4.5 to 8 µs.
const EXCHANGE_SECONDS: f64 = 6e-6;

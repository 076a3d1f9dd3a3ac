//! What the loop itself costs per step, beside a backend that is done at once. A measurement, run by name:
//! `cargo test --release -p plimsoll-engine --lib step::cost -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use super::*;
use crate::backend::{KvLayout, LayerGroup};
use crate::batch::{AdapterIndex, SampledToken, SpanOutput};
use crate::request::{PrefixSalt, Request, StopRules};

const RUNNING: u32 = 256;
const PROMPT_TOKENS: u32 = 500;
const STEPS: u32 = 1000;

/// Samples the same token everywhere, at once.
struct Instantly {
    layout: KvLayout,
    outputs: VecDeque<StepOutput>,
}

impl Backend for Instantly {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn submit(&mut self, step: Step) -> Result<Ticket, BackendError> {
        let span = |span: &Span| SpanOutput {
            sampled: span.sample.then_some(SampledToken { token: 5, logprob: None }),
            prompt_logprobs: Vec::new(),
        };
        let spans = step.spans.iter().map(span).collect();
        self.outputs.push_back(StepOutput { number: step.number, spans });
        Ok(Ticket(step.number))
    }

    fn collect(&mut self, _ticket: Ticket) -> Result<StepOutput, BackendError> {
        Ok(self.outputs.pop_front().expect("submitted before"))
    }
}

fn request(index: u32) -> Request {
    Request {
        prompt: (index..index + PROMPT_TOKENS).collect(),
        choices: 1,
        sampling: Arc::default(),
        stop: StopRules { stop_tokens: Arc::new([2].into()), output_tokens_max: 2 * STEPS },
        salt: PrefixSalt { adapter: AdapterIndex::BASE, tenant: None },
    }
}

fn step_costs(steps_in_flight: usize) -> Vec<Duration> {
    let limits = Limits {
        running_max: RUNNING as usize,
        waiting_max: RUNNING as usize,
        step_tokens_max: 8192,
        context_tokens: 8192,
        kv_pages: vec![16384],
        steps_in_flight,
        prefix_reuse: true,
    };
    let layout = KvLayout {
        groups: vec![LayerGroup { layers: vec![0] }],
        kv_heads: 1,
        head_dim: 1,
        dtype: plimsoll_contract::abilities::Dtype::F16,
    };
    let metrics = Metrics::new("instant", limits.context_tokens);
    let backend = Instantly { layout, outputs: VecDeque::new() };
    let (mut step_loop, handle) = StepLoop::new(Box::new(backend), limits, metrics);
    let streams: Vec<_> = (0..RUNNING).map(|i| handle.submit(request(i)).expect("fits")).collect();
    let mut turn = || {
        let start = Instant::now();
        assert!(step_loop.take_commands());
        step_loop.advance().expect("never lost");
        step_loop.report();
        start.elapsed()
    };
    // All prompts are computed, and decoding has begun.
    let mut costs: Vec<Duration> = (0..40 + STEPS).map(|_| turn()).skip(40).collect();
    assert_eq!(handle.state().running, streams.len());
    costs.sort();
    costs
}

#[test]
#[ignore = "a measurement, not a check"]
fn a_step_of_256_sequences_costs_the_host_so_many_microseconds() {
    for steps_in_flight in [1, 2] {
        let costs = step_costs(steps_in_flight);
        let at =
            |share: f64| costs[(share * (costs.len() - 1) as f64) as usize].as_secs_f64() * 1e6;
        println!(
            "{RUNNING} running, {steps_in_flight} in flight: p50 {:.0} µs, p90 {:.0} µs, p99 {:.0} µs",
            at(0.5),
            at(0.9),
            at(0.99)
        );
    }
}

//! The workloads by which engines are compared: the shapes, lengths and arithmetic of docs/perf.md, run through the
//! scheduler and step loop that serve. Enters: a started engine. Leaves: one figure per workload, under the names that
//! the peers' files have. Never here: a device, a clock of its own idea: time runs from the first submission to the last
//! token id on the host.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::task::JoinSet;

use super::{Numbers, listen, request};
use crate::batch::TokenId;
use crate::step::EngineHandle;

/// Prompt and output lengths of 600 requests: log-normal, as in a well-known log of conversations (prompt mean 4.9, sigma
/// 1.0, cut at 8 and 2,048; output mean 5.0, sigma 0.8, cut at 8 and 768).
const MIXED: &str = include_str!("mixed600.csv");

/// Ids that prompts are made of; no special token is among them.
const PROMPT_TOKENS: std::ops::Range<u32> = 1_000..120_000;

/// Longest sequence that any workload needs, and requests at once.
pub const CONTEXT_TOKENS: u32 = 8192 + 129 + 64;
pub const RUNNING_MAX: usize = 256;

/// (prompt, output) of each request; all are submitted at once.
type Requests = Vec<(u32, u32)>;

/// Figures by name.
pub type Figures = BTreeMap<String, f64>;

pub struct Suite<'a> {
    pub engine: &'a EngineHandle,
    pub runtime: &'a tokio::runtime::Runtime,
    pub vocabulary: u32,
    pub numbers: Numbers,
    /// Called with each figure as it comes: a long run shows that it lives.
    pub show: &'a mut dyn FnMut(&str, f64),
}

impl Suite<'_> {
    /// Everything, or the workloads whose name begins with one of `only`.
    pub fn run(&mut self, only: &[String]) -> Figures {
        let mut figures = Figures::new();
        let wanted = |name: &str| only.is_empty() || only.iter().any(|o| name.starts_with(o));
        self.time(&[(128, 32); 4]);
        if wanted("decode_bs1_ms_per_token") {
            let (short, long) = (self.median(&[(128, 1)], 3), self.median(&[(128, 257)], 3));
            self.note(&mut figures, "decode_bs1_ms_per_token", (long - short) / 256.0 * 1e3);
        }
        for batch in [8, 32, 64, 128, 256] {
            let name = format!("decode_bs{batch}_tok_s");
            if wanted(&name) {
                let short = self.median(&vec![(128, 1); batch], 3);
                let long = self.median(&vec![(128, 129); batch], 3);
                self.note(&mut figures, &name, batch as f64 * 128.0 / (long - short));
            }
        }
        for tokens in [512, 2048, 8192] {
            let name = format!("prefill_{tokens}_ms");
            if wanted(&name) {
                let seconds = self.median(&[(tokens, 1)], 3);
                self.note(&mut figures, &name, seconds * 1e3);
            }
        }
        if wanted("decode_bs1_ctx8k_ms_per_token") {
            let (short, long) = (self.median(&[(8192, 1)], 3), self.median(&[(8192, 129)], 3));
            self.note(&mut figures, "decode_bs1_ctx8k_ms_per_token", (long - short) / 128.0 * 1e3);
        }
        if wanted("mixed600") {
            let requests = mixed();
            // Of two runs the slower one, as the peers' script takes it.
            let seconds = self.median(&requests, 2);
            let sum = |part: fn(&(u32, u32)) -> u32| requests.iter().map(part).sum::<u32>() as f64;
            let (prompt, output) = (sum(|r| r.0), sum(|r| r.1));
            self.note(&mut figures, "mixed600_out_tok_s", output / seconds);
            self.note(&mut figures, "mixed600_total_tok_s", (prompt + output) / seconds);
            self.note(&mut figures, "mixed600_s", seconds);
        }
        figures
    }

    fn note(&mut self, figures: &mut Figures, name: &str, value: f64) {
        (self.show)(name, value);
        figures.insert(name.to_owned(), value);
    }

    fn median(&mut self, requests: &[(u32, u32)], runs: usize) -> f64 {
        let mut seconds: Vec<f64> = (0..runs).map(|_| self.time(requests)).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[runs / 2]
    }

    /// Seconds for all of them, with fresh prompts.
    fn time(&mut self, requests: &[(u32, u32)]) -> f64 {
        let top = PROMPT_TOKENS.end.min(self.vocabulary);
        let first = PROMPT_TOKENS.start.min(self.vocabulary / 2);
        let prompts: Vec<(Arc<[TokenId]>, u32)> = requests
            .iter()
            .map(|&(prompt, output)| {
                let token = |_| first + self.numbers.below(top - first);
                ((0..prompt).map(token).collect(), output)
            })
            .collect();
        self.runtime.block_on(async {
            let begun = Instant::now();
            let mut running = JoinSet::new();
            for (prompt, output) in prompts {
                let stream = self.engine.submit(request(prompt, output));
                running.spawn(listen(stream.expect("the limits fit the load"), begun, output));
            }
            let ends = running.join_all().await;
            ends.iter().map(|end| end.last).max().unwrap_or_default().as_secs_f64()
        })
    }
}

fn mixed() -> Requests {
    let number = |text: &str| text.parse().expect("the list holds numbers");
    let pair = |line: &str| {
        let (prompt, output) = line.split_once(',').expect("two columns");
        (number(prompt), number(output))
    };
    MIXED.lines().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mixed_requests_are_those_of_the_peers() {
        let requests = mixed();
        assert_eq!(requests.len(), 600);
        // Sums of the peers' script with its seed.
        assert_eq!(requests.iter().map(|r| r.0).sum::<u32>(), MIXED_PROMPT_TOKENS);
        assert_eq!(requests.iter().map(|r| r.1).sum::<u32>(), MIXED_OUTPUT_TOKENS);
        assert!(requests.iter().all(|r| r.0 + r.1 <= CONTEXT_TOKENS));
    }

    const MIXED_PROMPT_TOKENS: u32 = 132_146;
    const MIXED_OUTPUT_TOKENS: u32 = 112_355;
}

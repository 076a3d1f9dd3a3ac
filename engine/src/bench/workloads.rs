//! The workloads by which engines are compared: the shapes, lengths and arithmetic of docs/perf.md, run through the
//! scheduler and step loop that serve. Enters: a started engine. Leaves: one figure per workload, under the names that
//! the peers' files have. `bench serve` takes the same lists of requests to a server. Never here: a device, a clock of
//! its own idea: time runs from the first submission to the last token id on the host.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::task::JoinSet;

use super::{Numbers, listen, request};
use crate::batch::{SamplingParams, TokenId};
use crate::step::EngineHandle;

/// Prompt and output lengths of 600 requests: log-normal, as in a well-known log of conversations (prompt mean 4.9, sigma
/// 1.0, cut at 8 and 2,048; output mean 5.0, sigma 0.8, cut at 8 and 768).
const MIXED: &str = include_str!("mixed600.csv");

/// Ids that prompts are made of; no special token is among them.
const PROMPT_TOKENS: std::ops::Range<u32> = 1_000..120_000;

/// Longest sequence that any workload needs, and requests at once.
pub const CONTEXT_TOKENS: u32 = 8192 + 129 + 64;
pub const RUNNING_MAX: usize = 256;

/// (prompt, output) of each request.
pub type Requests = Vec<(u32, u32)>;

/// Prompt lengths of the method by which quantized models were first compared here: a first token and 5 to 9 more, as the
/// peer's script draws them; ten tokens of output each, one request after the other.
const SEED_PROMPTS: [u32; 49] = [
    9, 8, 10, 8, 7, 10, 9, 7, 8, 6, 10, 8, 9, 10, 10, 6, 8, 7, 7, 10, 9, 6, 6, 6, 9, 9, 7, 8, 9, 7,
    8, 8, 7, 6, 7, 10, 7, 10, 6, 7, 7, 10, 7, 8, 8, 8, 10, 7, 7,
];
pub const SEED_OUTPUT_TOKENS: u32 = 10;
/// Requests of it that run before any is timed.
const SEED_WARM_UP: usize = 3;

/// Workloads whose requests can be sent to a server.
pub const NAMES: [&str; 12] = [
    "mixed600",
    "seed",
    "decode_bs1",
    "decode_bs1_ctx8k",
    "decode_bs8",
    "decode_bs32",
    "decode_bs64",
    "decode_bs128",
    "decode_bs256",
    "prefill_512",
    "prefill_2048",
    "prefill_8192",
];

/// The requests of one of [`NAMES`]: of a decode workload those with the long outputs.
pub fn requests(name: &str) -> Option<Requests> {
    let number = |prefix| name.strip_prefix(prefix).and_then(|rest: &str| rest.parse().ok());
    match name {
        "mixed600" => Some(mixed()),
        "seed" => Some(SEED_PROMPTS.map(|tokens| (tokens, SEED_OUTPUT_TOKENS)).to_vec()),
        "decode_bs1" => Some(vec![(128, 257)]),
        "decode_bs1_ctx8k" => Some(vec![(8192, 129)]),
        _ => match (number("decode_bs"), number("prefill_")) {
            (Some(batch), _) => Some(vec![(128, 129); batch]),
            (_, Some(tokens)) => Some(vec![(u32::try_from(tokens).ok()?, 1)]),
            _ => None,
        },
    }
}

/// How a workload's requests sample: greedy but for the one that is known by its sampling.
pub fn sampling(name: &str, seed: u64) -> SamplingParams {
    match name {
        "seed" => SamplingParams {
            temperature: 0.7,
            top_p: 0.9,
            top_k: 50,
            seed,
            ..SamplingParams::default()
        },
        _ => SamplingParams { temperature: 0.0, ..SamplingParams::default() },
    }
}

/// A prompt of random ids below `vocabulary`.
pub fn prompt(numbers: &mut Numbers, vocabulary: u32, tokens: u32) -> Arc<[TokenId]> {
    let top = PROMPT_TOKENS.end.min(vocabulary);
    let first = PROMPT_TOKENS.start.min(vocabulary / 2);
    (0..tokens).map(|_| first + numbers.below(top - first)).collect()
}

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
        if wanted("seed") {
            let (average, median) = self.seed();
            self.note(&mut figures, "seed_average_ms", average);
            self.note(&mut figures, "seed_median_ms", median);
        }
        figures
    }

    /// Mean and median latency of the seed method's requests, in milliseconds.
    pub fn seed(&mut self) -> (f64, f64) {
        let requests = requests("seed").expect("one of the names");
        let all = [&requests[..SEED_WARM_UP], &requests[..]].concat();
        let times = all.iter().enumerate().map(|(number, &request)| {
            self.time_with(&[request], &sampling("seed", number as u64)) * 1e3
        });
        let mut times: Vec<f64> = times.skip(SEED_WARM_UP).collect();
        times.sort_by(f64::total_cmp);
        (times.iter().sum::<f64>() / times.len() as f64, times[times.len() / 2])
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

    fn time(&mut self, requests: &[(u32, u32)]) -> f64 {
        self.time_with(requests, &sampling("mixed600", 0))
    }

    /// Seconds for all of them, submitted at once, with fresh prompts.
    fn time_with(&mut self, requests: &[(u32, u32)], sampling: &SamplingParams) -> f64 {
        let sampling = Arc::new(sampling.clone());
        let prompts: Vec<(Arc<[TokenId]>, u32)> = requests
            .iter()
            .map(|&(tokens, output)| (prompt(&mut self.numbers, self.vocabulary, tokens), output))
            .collect();
        self.runtime.block_on(async {
            let begun = Instant::now();
            let mut running = JoinSet::new();
            for (prompt, output) in prompts {
                let stream = self.engine.submit(request(prompt, output, &sampling));
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

    #[test]
    fn every_name_has_requests_and_they_fit_the_suite() {
        for name in NAMES {
            let requests = requests(name).unwrap();
            assert!(!requests.is_empty(), "{name}");
            assert!(requests.iter().all(|r| r.0 > 0 && r.1 > 0 && r.0 + r.1 <= CONTEXT_TOKENS));
        }
        assert_eq!(requests("decode_bs32").unwrap(), [(128, 129); 32]);
        assert_eq!(requests("prefill_2048").unwrap(), [(2048, 1)]);
        assert_eq!(requests("decode"), None);
    }

    #[test]
    fn the_seed_method_is_that_of_the_peer() {
        let requests = requests("seed").unwrap();
        assert_eq!(requests.len(), 49);
        assert!(
            requests.iter().all(|&(prompt, output)| (6..=10).contains(&prompt) && output == 10)
        );
        // As its script draws them.
        assert_eq!(requests.iter().map(|r| r.0).sum::<u32>(), 391);
        let sampling = sampling("seed", 3);
        assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.7, 0.9, 50));
    }

    #[test]
    fn prompts_stay_within_small_vocabularies_too() {
        for vocabulary in [2, 320, 4096, 128_256] {
            let prompt = prompt(&mut Numbers(1), vocabulary, 200);
            assert!(prompt.iter().all(|&token| token < vocabulary), "{vocabulary}");
        }
    }

    const MIXED_PROMPT_TOKENS: u32 = 132_146;
    const MIXED_OUTPUT_TOKENS: u32 = 112_355;
}

//! From answers to a report. Enters: what became of each request, and how long all of them took. Leaves: percentiles,
//! throughput and failures by kind, as JSON and as a table. Pure.
//!
//! The definitions are those of vLLM's `benchmark_serving`, so that figures compare; all times are of requests that
//! succeeded:
//!
//! - **TTFT**, time to first token: from sending a request, connecting included, to the first event with text.
//! - **TPOT**, time per output token: for each request of more than one token, (last − first) ÷ (tokens − 1), where last
//!   is the time of the last event and tokens is what the server counts.
//! - **ITL**, inter-token latency: each gap between two events with text, of all requests together. A server that gathers
//!   tokens into one event has fewer and longer gaps; events and tokens are both reported.
//! - **end to end**: from sending to the last event.
//! - **throughput**: output tokens, and prompt and output tokens, over the time from the first request's sending to the
//!   last one's end.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::client::Failure;
use super::events::Answer;

/// What became of one request.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub answer: Result<Answer, Failure>,
    /// How long after its time it was sent; none where requests follow each other.
    pub late: Option<Duration>,
}

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrivals {
    /// So many are in flight at any time; the next is sent when one ends.
    Closed { concurrency: usize },
    /// So many come each second on average, at the times of a Poisson process, whatever the server does.
    Open { rate: f64 },
}

#[derive(Clone, Debug, Serialize)]
pub struct ServeReport {
    pub url: String,
    pub model: String,
    pub workload: String,
    pub arrivals: Arrivals,
    pub seed: u64,
    pub requests: usize,
    pub completed: usize,
    pub failed: usize,
    /// By kind: how many, and what the first of them said.
    pub failures: BTreeMap<String, Failures>,
    /// From the first request's sending to the last one's end.
    pub duration_s: f64,
    pub requests_per_s: f64,
    /// Of the completed requests, as the server counts.
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    /// Events with text.
    pub events: u64,
    pub output_tok_s: f64,
    pub total_tok_s: f64,
    pub ttft_ms: Option<Spread>,
    pub tpot_ms: Option<Spread>,
    pub itl_ms: Option<Spread>,
    pub end_to_end_ms: Option<Spread>,
    /// How long after its time a request was sent: what the client itself could not keep up with.
    pub late_ms: Option<Spread>,
    /// CPU time of the client: near `duration_s` times its threads, it measured itself.
    pub client_cpu_s: f64,
    pub client_threads: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failures {
    pub requests: usize,
    pub first: String,
}

/// Mean and percentiles, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
}

impl Spread {
    /// None of nothing.
    fn of(times: impl Iterator<Item = Duration>) -> Option<Spread> {
        let mut times: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
        times.sort_by(f64::total_cmp);
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let at = |percent| percentile(&times, percent);
        (!times.is_empty()).then(|| Spread {
            mean,
            p50: at(50.0),
            p90: at(90.0),
            p95: at(95.0),
            p99: at(99.0),
        })
    }
}

/// Of sorted numbers, at least one; between two of them the straight line counts, as in numpy.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let place = percent / 100.0 * (sorted.len() - 1) as f64;
    let below = sorted[place.floor() as usize];
    let above = sorted[place.ceil() as usize];
    below + (above - below) * place.fract()
}

/// What was run, and on what.
#[derive(Clone, Debug)]
pub struct Run {
    pub url: String,
    pub model: String,
    pub workload: String,
    pub arrivals: Arrivals,
    pub seed: u64,
    pub duration: Duration,
    pub client_cpu: Duration,
    pub client_threads: usize,
}

pub fn report(run: Run, outcomes: &[Outcome]) -> ServeReport {
    let answers: Vec<&Answer> = outcomes.iter().filter_map(|o| o.answer.as_ref().ok()).collect();
    let sum = |part: fn(&Answer) -> u64| answers.iter().map(|&answer| part(answer)).sum::<u64>();
    let (prompt, output) = (sum(|a| a.prompt_tokens), sum(|a| a.output_tokens));
    let seconds = run.duration.as_secs_f64();
    let each = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
    ServeReport {
        url: run.url,
        model: run.model,
        workload: run.workload,
        arrivals: run.arrivals,
        seed: run.seed,
        requests: outcomes.len(),
        completed: answers.len(),
        failed: outcomes.len() - answers.len(),
        failures: failures(outcomes),
        duration_s: seconds,
        requests_per_s: each(answers.len() as f64),
        prompt_tokens: prompt,
        output_tokens: output,
        events: sum(Answer::events),
        output_tok_s: each(output as f64),
        total_tok_s: each((prompt + output) as f64),
        ttft_ms: Spread::of(answers.iter().map(|answer| answer.first)),
        tpot_ms: Spread::of(answers.iter().filter_map(|answer| answer.per_token())),
        itl_ms: Spread::of(answers.iter().flat_map(|answer| answer.gaps.iter().copied())),
        end_to_end_ms: Spread::of(answers.iter().map(|answer| answer.last)),
        late_ms: Spread::of(outcomes.iter().filter_map(|outcome| outcome.late)),
        client_cpu_s: run.client_cpu.as_secs_f64(),
        client_threads: run.client_threads,
    }
}

fn failures(outcomes: &[Outcome]) -> BTreeMap<String, Failures> {
    let mut kinds = BTreeMap::new();
    for failure in outcomes.iter().filter_map(|outcome| outcome.answer.as_ref().err()) {
        let first = || Failures { requests: 0, first: failure.to_string() };
        kinds.entry(failure.kind()).or_insert_with(first).requests += 1;
    }
    kinds
}

impl ServeReport {
    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a report holds only names and numbers")
    }

    /// Markdown.
    pub fn table(&self) -> String {
        let how = match self.arrivals {
            Arrivals::Closed { concurrency } => format!("{concurrency} in flight"),
            Arrivals::Open { rate } => format!("{rate} a second (Poisson, seed {})", self.seed),
        };
        let mut text = format!(
            "{} at {}: {} of {}, {how}\n\
             {} completed, {} failed in {:.2} s: {:.2} requests/s, {:.0} output and {:.0} total tokens/s\n\
             {} prompt and {} output tokens in {} events; the client took {:.2} s of CPU on {} threads\n\n\
             | milliseconds | mean | p50 | p90 | p95 | p99 |\n|---|---|---|---|---|---|\n",
            self.model,
            self.url,
            self.requests,
            self.workload,
            self.completed,
            self.failed,
            self.duration_s,
            self.requests_per_s,
            self.output_tok_s,
            self.total_tok_s,
            self.prompt_tokens,
            self.output_tokens,
            self.events,
            self.client_cpu_s,
            self.client_threads,
        );
        let rows = [
            ("time to first token (TTFT)", self.ttft_ms),
            ("time per output token (TPOT)", self.tpot_ms),
            ("inter-token latency (ITL)", self.itl_ms),
            ("end to end", self.end_to_end_ms),
            ("sent late", self.late_ms),
        ];
        for (name, spread) in rows {
            let Some(Spread { mean, p50, p90, p95, p99 }) = spread else { continue };
            text +=
                &format!("| {name} | {mean:.2} | {p50:.2} | {p90:.2} | {p95:.2} | {p99:.2} |\n");
        }
        if self.failed > 0 {
            text += "\n| failed | requests | the first of them |\n|---|---|---|\n";
        }
        for (kind, Failures { requests, first }) in &self.failures {
            text += &format!("| {kind} | {requests} | {} |\n", first.replace(['|', '\n'], " "));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milliseconds(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    fn answered(first: u64, gaps: &[u64], output_tokens: u64) -> Outcome {
        let gaps: Vec<Duration> = gaps.iter().map(|&gap| milliseconds(gap)).collect();
        let answer = Answer {
            first: milliseconds(first),
            last: milliseconds(first) + gaps.iter().sum::<Duration>(),
            gaps,
            prompt_tokens: 10,
            output_tokens,
        };
        Outcome { answer: Ok(answer), late: None }
    }

    fn failed(failure: Failure) -> Outcome {
        Outcome { answer: Err(failure), late: None }
    }

    fn run() -> Run {
        Run {
            url: "http://h".into(),
            model: "m".into(),
            workload: "mixed600".into(),
            arrivals: Arrivals::Closed { concurrency: 2 },
            seed: 1,
            duration: Duration::from_secs(2),
            client_cpu: Duration::from_millis(30),
            client_threads: 1,
        }
    }

    #[test]
    fn percentiles_lie_on_the_line_between_their_neighbours() {
        // numpy.percentile(range(10, 60, 10), …)
        let five = [10.0, 20.0, 30.0, 40.0, 50.0];
        for (percent, expected) in [(0.0, 10.0), (50.0, 30.0), (90.0, 46.0), (99.0, 49.6)] {
            assert!((percentile(&five, percent) - expected).abs() < 1e-9, "{percent}");
        }
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
    }

    #[test]
    fn each_figure_has_its_documented_definition() {
        // Times per token: (10 + 30) ÷ 2 and (20 + 20 + 40 + 40) ÷ 4; the third has one token, and so none.
        let outcomes = [
            answered(100, &[10, 30], 3),
            answered(200, &[20, 20, 40, 40], 5),
            answered(600, &[], 1),
        ];
        let report = report(run(), &outcomes);
        let ttft = report.ttft_ms.unwrap();
        assert_eq!((ttft.mean, ttft.p50), (300.0, 200.0));
        assert!((ttft.p90 - 520.0).abs() < 1e-9 && (ttft.p99 - 592.0).abs() < 1e-9, "{ttft:?}");
        let tpot = report.tpot_ms.unwrap();
        assert_eq!((tpot.mean, tpot.p50), (25.0, 25.0));
        let itl = report.itl_ms.unwrap();
        assert!((itl.mean - 160.0 / 6.0).abs() < 1e-9 && itl.p50 == 25.0, "{itl:?}");
        assert_eq!(report.end_to_end_ms.unwrap().p50, 320.0);
        assert_eq!((report.prompt_tokens, report.output_tokens, report.events), (30, 9, 9));
        assert_eq!((report.output_tok_s, report.total_tok_s), (4.5, 19.5));
        assert_eq!(report.requests_per_s, 1.5);
        assert_eq!(report.late_ms, None);
    }

    #[test]
    fn failures_are_counted_by_kind_and_touch_no_time() {
        let full = Failure::Status { status: 429, message: "full".into(), retry_after: None };
        let outcomes = [
            answered(100, &[], 1),
            failed(full.clone()),
            failed(full),
            failed(Failure::Cut { events: 2, how: "reset".into() }),
        ];
        let report = report(run(), &outcomes);
        assert_eq!((report.requests, report.completed, report.failed), (4, 1, 3));
        assert_eq!(report.failures["status 429"].requests, 2);
        assert_eq!(report.failures["cut stream"].requests, 1);
        assert_eq!(report.ttft_ms.unwrap().p99, 100.0);
        let table = report.table();
        assert!(table.contains("1 completed, 3 failed"), "{table}");
        assert!(table.contains("| status 429 | 2 | status 429: full |"), "{table}");
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["failures"]["cut stream"]["requests"], 1);
        assert_eq!(json["arrivals"]["closed"]["concurrency"], 2);
    }

    #[test]
    fn a_run_of_failures_alone_still_has_a_report() {
        let outcomes = [failed(Failure::Told("gone".into()))];
        let report = report(Run { duration: Duration::ZERO, ..run() }, &outcomes);
        assert_eq!((report.completed, report.ttft_ms, report.output_tok_s), (0, None, 0.0));
        assert!(report.table().contains("error event"));
    }
}

//! `bench serve`: a running server under the requests of a workload, over HTTP, as its clients meet it. Enters: an
//! address and a load. Leaves: latencies, throughput, and every request that failed, by what went wrong. Never here: a
//! model or a device; what is measured is another process, this engine's or a peer's.

mod client;
mod events;
mod figures;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::body::Bytes;
use plimsoll_contract::exit::ExitReport;
use plimsoll_kernels::reference::random::uniform;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::client::{Client, Failure, Server};
use self::figures::{Outcome, Run, report};
use super::workloads::{prompt, requests, sampling};
use super::{Numbers, cpu_time};
use crate::batch::{SamplingParams, TokenId};
use crate::exit::internal;
use crate::http::auth::first_key;

pub use self::figures::{Arrivals, Failures, ServeReport, Spread};

/// Threads of the client: few, for it shares the machine with what it measures.
const THREADS_MAX: usize = 4;
/// The longest that a refused client waits before its next request, whatever the server proposes.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub struct ServeOptions {
    pub url: String,
    /// Its first key is sent.
    pub api_key_file: Option<PathBuf>,
    /// The first that the server lists, where none is given.
    pub model: Option<String>,
    /// One of [`NAMES`](super::NAMES).
    pub workload: String,
    /// As many as the workload has, where none is given; its list begins anew where these are more.
    pub requests: Option<usize>,
    pub arrivals: Arrivals,
    /// Of the prompts' ids and of the times at which requests come.
    pub seed: u64,
    /// Ids of prompts are below.
    pub vocabulary: u32,
    /// Requests that run before those that count, all at once.
    pub warm_up: usize,
    /// A server that says nothing for so long has failed a request.
    pub silence_max: Duration,
}

/// A request, ready to be sent.
#[derive(Clone)]
struct Ready {
    body: Bytes,
    output_tokens: u32,
}

/// Sends everything and waits for the last answer. A request that fails is part of the report; only what keeps all of
/// them from being sent is an error.
pub fn run_serve(options: &ServeOptions) -> Result<ServeReport, ExitReport> {
    let key = options.api_key_file.as_deref().map(first_key).transpose();
    let key = key.map_err(|error| error.report())?;
    let server = Server::parse(&options.url, key.as_deref()).map_err(internal)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / 2).clamp(1, THREADS_MAX);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .map_err(|e| internal(format!("failed to start the runtime: {e}")))?;
    let client = Arc::new(Client::new(server, options.silence_max));
    runtime.block_on(async {
        let model = match &options.model {
            Some(name) => name.clone(),
            None => client.model().await.map_err(|failure| {
                internal(format!("failed to ask {} for its model: {failure}", options.url))
            })?,
        };
        let (warm_up, all) = prepare(options, &model)?;
        // What goes wrong here goes wrong below, where it is counted.
        together(&client, warm_up).await;
        let cpu_before = cpu_time();
        let begun = Instant::now();
        let outcomes = match options.arrivals {
            Arrivals::Closed { concurrency } => closed(&client, all, concurrency).await,
            Arrivals::Open { rate } => open(&client, all, rate, options.seed).await,
        };
        let run = Run {
            url: options.url.clone(),
            model,
            workload: options.workload.clone(),
            arrivals: options.arrivals,
            seed: options.seed,
            duration: begun.elapsed(),
            client_cpu: cpu_time().saturating_sub(cpu_before),
            client_threads: threads,
        };
        Ok(report(run, &outcomes))
    })
}

/// Requests of the warm-up, and those that count, each with a prompt of its own.
fn prepare(options: &ServeOptions, model: &str) -> Result<(Vec<Ready>, Vec<Ready>), ExitReport> {
    let list = requests(&options.workload)
        .ok_or_else(|| internal(format!("no workload is called {}", options.workload)))?;
    let count = options.requests.unwrap_or(list.len());
    let mut numbers = Numbers(options.seed);
    let lengths = list.iter().cycle().take(options.warm_up + count);
    let mut ready: Vec<Ready> = lengths
        .enumerate()
        .map(|(number, &(tokens, output_tokens))| {
            let prompt = prompt(&mut numbers, options.vocabulary, tokens);
            let sampling = sampling(&options.workload, number as u64);
            let body = body(model, &prompt, output_tokens, &sampling);
            Ready { body: body.to_string().into(), output_tokens }
        })
        .collect();
    let counted = ready.split_off(options.warm_up);
    Ok((ready, counted))
}

fn body(model: &str, prompt: &[TokenId], tokens: u32, sampling: &SamplingParams) -> Value {
    let mut body = json!({
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        // Exactly as many as are asked for, whatever random weights find.
        "ignore_eos": true,
        "temperature": sampling.temperature,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    if sampling.temperature > 0.0 {
        body["top_p"] = sampling.top_p.into();
        body["top_k"] = sampling.top_k.into();
        body["seed"] = sampling.seed.into();
    }
    body
}

async fn together(client: &Arc<Client>, requests: Vec<Ready>) {
    let mut running = JoinSet::new();
    for request in requests {
        let client = client.clone();
        running.spawn(async move { client.complete(request.body, request.output_tokens).await });
    }
    running.join_all().await;
}

/// `concurrency` clients, each of which sends its next request when its last one has ended.
async fn closed(client: &Arc<Client>, requests: Vec<Ready>, concurrency: usize) -> Vec<Outcome> {
    let next = Arc::new(AtomicUsize::new(0));
    let requests: Arc<[Ready]> = requests.into();
    let mut clients = JoinSet::new();
    for _ in 0..concurrency.min(requests.len()) {
        let (client, next, requests) = (client.clone(), next.clone(), requests.clone());
        clients.spawn(async move {
            let mut outcomes = Vec::new();
            let mut pause = None;
            while let Some(request) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Some(pause) = pause.take() {
                    // As was asked: else a full server would be asked for everything within a blink.
                    tokio::time::sleep(RETRY_AFTER_MAX.min(pause)).await;
                }
                let answer = client.complete(request.body.clone(), request.output_tokens).await;
                if let Err(Failure::Status { retry_after, .. }) = &answer {
                    pause = *retry_after;
                }
                outcomes.push(Outcome { answer, late: None });
            }
            outcomes
        });
    }
    clients.join_all().await.into_iter().flatten().collect()
}

/// Each request at its time, whatever became of those before.
async fn open(client: &Arc<Client>, requests: Vec<Ready>, rate: f64, seed: u64) -> Vec<Outcome> {
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for (request, due) in requests.into_iter().zip(poisson(rate, seed)) {
        let due = begun + due;
        tokio::time::sleep_until(due).await;
        let client = client.clone();
        running.spawn(async move {
            let late = Some(due.elapsed());
            let answer = client.complete(request.body, request.output_tokens).await;
            Outcome { answer, late }
        });
    }
    running.join_all().await
}

/// Times of a Poisson process with `rate` events a second; the first event is at once.
fn poisson(rate: f64, seed: u64) -> impl Iterator<Item = Duration> {
    let gaps = (0..).map(move |number| -(1.0 - uniform(seed, number)).ln() / rate);
    gaps.scan(0.0, |at, gap| {
        let now = *at;
        *at += gap;
        Some(Duration::from_secs_f64(now))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_at_their_rate_with_gaps_as_long_as_their_spread() {
        let times: Vec<f64> = poisson(50.0, 7).take(20_001).map(|at| at.as_secs_f64()).collect();
        assert_eq!(times[0], 0.0);
        assert!((times[20_000] - 400.0).abs() < 10.0, "{}", times[20_000]);
        // A Poisson process' gaps have a standard deviation as long as their mean, and e⁻¹ of them are longer than it.
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let square = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((square.sqrt() / mean - 1.0).abs() < 0.03, "{} of {mean}", square.sqrt());
        let longer = gaps.iter().filter(|&&gap| gap > 0.02).count() as f64 / gaps.len() as f64;
        assert!((longer - (-1f64).exp()).abs() < 0.01, "{longer}");
        let again: Vec<f64> = poisson(50.0, 7).take(3).map(|at| at.as_secs_f64()).collect();
        assert_eq!(again, times[..3]);
        assert_ne!(poisson(50.0, 8).nth(1), poisson(50.0, 7).nth(1));
    }

    fn options() -> ServeOptions {
        ServeOptions {
            url: "http://127.0.0.1:1".into(),
            api_key_file: None,
            model: Some("m".into()),
            workload: "seed".into(),
            requests: None,
            arrivals: Arrivals::Closed { concurrency: 1 },
            seed: 1,
            vocabulary: 4096,
            warm_up: 3,
            silence_max: Duration::from_secs(1),
        }
    }

    #[test]
    fn a_body_asks_for_exactly_the_workloads_tokens_and_no_prompt_comes_twice() {
        let (warm_up, counted) = prepare(&options(), "m").unwrap();
        assert_eq!((warm_up.len(), counted.len()), (3, 49));
        let bodies: Vec<Value> =
            counted.iter().map(|ready| serde_json::from_slice(&ready.body).unwrap()).collect();
        let expected = requests("seed").unwrap();
        // The list goes on where the warm-up left it.
        let expected = expected.iter().cycle().skip(3);
        for (body, (prompt, output)) in bodies.iter().zip(expected) {
            assert_eq!(body["prompt"].as_array().unwrap().len(), *prompt as usize);
            assert_eq!(body["max_tokens"], *output);
            assert_eq!((&body["ignore_eos"], &body["stream"]), (&json!(true), &json!(true)));
            assert_eq!(body["top_k"], 50);
        }
        let prompts: std::collections::BTreeSet<String> =
            bodies.iter().map(|body| body["prompt"].to_string()).collect();
        assert_eq!(prompts.len(), 49);
        let (_, greedy) =
            prepare(&ServeOptions { workload: "mixed600".into(), ..options() }, "m").unwrap();
        let body: Value = serde_json::from_slice(&greedy[0].body).unwrap();
        assert_eq!((&body["temperature"], body.get("top_k")), (&json!(0.0), None));
    }

    #[test]
    fn nobody_at_the_address_is_an_error_only_where_the_model_is_asked_for() {
        let error = run_serve(&ServeOptions { model: None, ..options() }).unwrap_err();
        assert!(error.message.contains("http://127.0.0.1:1"), "{}", error.message);
        let report = run_serve(&ServeOptions { requests: Some(2), ..options() }).unwrap();
        assert_eq!((report.requests, report.failures["connection"].requests), (2, 2));
    }
}

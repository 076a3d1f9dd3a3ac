//! In: the pods of all scaled objects. Out: two PromQL queries for all of them together; and from Prometheus' answers what it
//! holds of each pod. Pure. Series are told apart by `namespace` and `pod`, as every usual way of scraping pods labels
//! them; a pod that is scraped twice counts once.

use std::collections::HashMap;
use std::fmt::Write as _;

use plimsoll_contract::metrics;
use serde::Deserialize;
use thiserror::Error;

use super::decide::Tempo;
use super::signals::{Sample, Told};

/// Namespace and name.
pub type PodName = (String, String);

/// Everything Prometheus told of the pods, by its own clock.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answers {
    pub pods: HashMap<PodName, Told>,
}

/// Marks the branches of the second query.
const SIGNAL: &str = "signal";
const FINISHED: &str = "finished";
const REFUSED: &str = "refused";
const TTFT: &str = "ttft";
const TPOT: &str = "tpot";
const CLOCK: &str = "clock";

/// Raw samples of the gauges, with the time of each.
pub fn gauges(pods: &[PodName], tempo: Tempo) -> String {
    let names = [metrics::REQUESTS_WAITING, metrics::REQUESTS_RUNNING, metrics::KV_CACHE_USAGE];
    let names = names.map(|name| name.ours).join("|");
    format!("{{__name__=~\"{names}\",{}}}[{}s]", selector(pods), tempo.memory())
}

/// Increases over the window, and the time on Prometheus' clock.
pub fn increases(pods: &[PodName], tempo: Tempo) -> String {
    let selector = selector(pods);
    let window = tempo.window();
    let counter = |name: &str, by: &str, more: &str| {
        format!(
            "sum by (namespace,pod)(max by (namespace,pod,{by})(increase({name}{{{more}{selector}}}[{window}s])))"
        )
    };
    let histogram = |name: metrics::Names| {
        let name = name.ours;
        format!("max by (namespace,pod,le)(increase({name}_bucket{{{selector}}}[{window}s]))")
    };
    let finished = counter(metrics::REQUESTS_FINISHED.ours, "finished_reason", "");
    let refused = counter(metrics::ADMISSION_REJECTIONS.ours, "reason", "reason=\"queue_full\",");
    let branches = [
        (FINISHED, finished),
        (REFUSED, refused),
        (TTFT, histogram(metrics::TIME_TO_FIRST_TOKEN)),
        (TPOT, histogram(metrics::TIME_PER_OUTPUT_TOKEN)),
        (CLOCK, "vector(time())".to_owned()),
    ];
    let marked = branches.map(|(signal, expression)| {
        format!("label_replace({expression},\"{SIGNAL}\",\"{signal}\",\"\",\"\")")
    });
    marked.join(" or ")
}

/// Names hold letters, digits, `-` and `.`, of which a regular expression reads only the dot.
fn selector(pods: &[PodName]) -> String {
    let alternatives = |mut names: Vec<&str>| {
        names.sort_unstable();
        names.dedup();
        names.join("|").replace('.', "\\\\.")
    };
    let namespaces = alternatives(pods.iter().map(|(namespace, _)| namespace.as_str()).collect());
    let names = alternatives(pods.iter().map(|(_, name)| name.as_str()).collect());
    format!("namespace=~\"{namespaces}\",pod=~\"{names}\"")
}

/// As a form's field.
pub fn form(query: &str) -> String {
    let mut body = String::from("query=");
    for byte in query.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => body.push(byte.into()),
            _ => write!(body, "%{byte:02X}").expect("writing to memory does not fail"),
        }
    }
    body
}

/// Why an answer is none.
#[derive(Debug, Error)]
pub enum AnswerError {
    #[error("it is not what Prometheus answers")]
    NotPrometheus { source: serde_json::Error },
    #[error("Prometheus refuses the query: {message}")]
    Refused { message: String },
    #[error("the answer holds no time")]
    NoClock,
}

#[derive(Deserialize)]
struct Answer {
    status: String,
    #[serde(default)]
    error: String,
    #[serde(default)]
    data: Data,
}

#[derive(Default, Deserialize)]
struct Data {
    #[serde(default)]
    result: Vec<Series>,
}

#[derive(Deserialize)]
struct Series {
    #[serde(default)]
    metric: HashMap<String, String>,
    /// Of an instant vector.
    value: Option<(f64, String)>,
    /// Of a range vector.
    #[serde(default)]
    values: Vec<(f64, String)>,
}

impl Series {
    fn pod(&self) -> Option<PodName> {
        let label = |name: &str| self.metric.get(name).cloned();
        Some((label("namespace")?, label("pod")?))
    }
}

/// What both answers say together. Pods whose newest sample of a gauge is stale keep none of it.
pub fn read(gauges: &[u8], increases: &[u8], tempo: Tempo) -> Result<Answers, AnswerError> {
    let increases = series(increases)?;
    let clock = increases.iter().find(|it| it.metric.get(SIGNAL).is_some_and(|it| it == CLOCK));
    let clock = clock.and_then(|it| it.value.as_ref()).and_then(|(_, text)| text.parse().ok());
    let clock: f64 = clock.ok_or(AnswerError::NoClock)?;
    let mut answers = Answers::default();
    for series in series(gauges)? {
        note_gauge(&mut answers, &series, clock - tempo.fresh() as f64);
    }
    for series in increases {
        note_increase(&mut answers, &series);
    }
    Ok(answers)
}

fn series(body: &[u8]) -> Result<Vec<Series>, AnswerError> {
    let answer: Answer =
        serde_json::from_slice(body).map_err(|source| AnswerError::NotPrometheus { source })?;
    if answer.status != "success" {
        return Err(AnswerError::Refused { message: answer.error });
    }
    Ok(answer.data.result)
}

fn note_gauge(answers: &mut Answers, series: &Series, fresh_from: f64) {
    let Some(pod) = series.pod() else { return };
    let values = series.values.iter().filter_map(|(at, text)| {
        let value: f64 = text.parse().ok()?;
        value.is_finite().then_some(Sample { at: *at, value })
    });
    let samples: Vec<Sample> = values.collect();
    if samples.last().is_none_or(|newest| newest.at < fresh_from) {
        return;
    }
    let told = answers.pods.entry(pod).or_default();
    let name = series.metric.get("__name__").map(String::as_str).unwrap_or_default();
    let held = if name == metrics::REQUESTS_WAITING.ours {
        &mut told.waiting
    } else if name == metrics::REQUESTS_RUNNING.ours {
        &mut told.running
    } else {
        &mut told.cache_usage
    };
    // Of a pod that is scraped twice, the job that saw it last.
    if held.last().is_none_or(|held| samples.last().is_some_and(|newest| newest.at > held.at)) {
        *held = samples;
    }
}

fn note_increase(answers: &mut Answers, series: &Series) {
    let Some(pod) = series.pod() else { return };
    let Some(value) = series.value.as_ref().and_then(|(_, text)| text.parse::<f64>().ok()) else {
        return;
    };
    let told = answers.pods.entry(pod).or_default();
    let bound = series.metric.get("le").and_then(|le| match le.as_str() {
        "+Inf" => Some(f64::INFINITY),
        le => le.parse().ok(),
    });
    match (series.metric.get(SIGNAL).map(String::as_str), bound) {
        (Some(FINISHED), _) => told.finished = value,
        (Some(REFUSED), _) => told.refused = value,
        (Some(TTFT), Some(bound)) => told.ttft.set(bound, value),
        (Some(TPOT), Some(bound)) => told.tpot.set(bound, value),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const TEMPO: Tempo = Tempo { interval_seconds: 15 };

    fn pod(name: &str) -> PodName {
        ("team".to_owned(), name.to_owned())
    }

    fn answer(result: Value) -> Vec<u8> {
        json!({"status": "success", "data": {"resultType": "x", "result": result}})
            .to_string()
            .into()
    }

    fn gauge(name: &str, pod: &str, job: &str, values: Value) -> Value {
        json!({"metric": {"__name__": name, "namespace": "team", "pod": pod, "job": job}, "values": values})
    }

    fn clock(at: f64) -> Value {
        json!({"metric": {"signal": "clock"}, "value": [at, at.to_string()]})
    }

    #[test]
    fn all_pods_are_asked_for_in_two_queries() {
        let pods = [pod("a-1"), pod("b.x-2"), ("other".to_owned(), "a-1".to_owned())];
        let query = gauges(&pods, TEMPO);
        assert_eq!(
            query,
            "{__name__=~\"plimsoll_requests_waiting|plimsoll_requests_running|plimsoll_kv_cache_usage_ratio\",\
             namespace=~\"other|team\",pod=~\"a-1|b\\\\.x-2\"}[180s]"
        );
        let query = increases(&pods, TEMPO);
        assert_eq!(query.matches("label_replace(").count(), 5);
        assert!(query.contains("reason=\"queue_full\",namespace=~"), "{query}");
        assert_eq!(form("a b=\"c\""), "query=a%20b%3D%22c%22");
    }

    #[test]
    fn samples_and_increases_come_to_their_pods() {
        let gauges = answer(json!([
            gauge("plimsoll_requests_waiting", "a", "x", json!([[85.0, "1"], [100.0, "3"]])),
            gauge("plimsoll_requests_running", "a", "x", json!([[100.0, "4"]])),
            gauge("plimsoll_kv_cache_usage_ratio", "a", "x", json!([[100.0, "0.5"]])),
        ]));
        let labels = |signal: &str, le: &str| json!({"namespace": "team", "pod": "a", "signal": signal, "le": le});
        let increases = answer(json!([
            clock(104.0),
            {"metric": {"namespace": "team", "pod": "a", "signal": "finished"}, "value": [104, "30"]},
            {"metric": {"namespace": "team", "pod": "a", "signal": "refused"}, "value": [104, "2"]},
            {"metric": labels("ttft", "0.5"), "value": [104, "10"]},
            {"metric": labels("ttft", "+Inf"), "value": [104, "12"]},
            {"metric": labels("tpot", "0.1"), "value": [104, "9"]},
        ]));
        let told = read(&gauges, &increases, TEMPO).unwrap().pods.remove(&pod("a")).unwrap();
        assert_eq!(
            told.waiting,
            [Sample { at: 85.0, value: 1.0 }, Sample { at: 100.0, value: 3.0 }]
        );
        assert_eq!((told.running[0].value, told.cache_usage[0].value), (4.0, 0.5));
        assert_eq!((told.finished, told.refused), (30.0, 2.0));
        let mut ttft = crate::scale::signals::Buckets::default();
        ttft.set(f64::INFINITY, 12.0);
        ttft.set(0.5, 10.0);
        assert_eq!(told.ttft, ttft);
    }

    #[test]
    fn llm_d_385_samples_that_prometheus_stopped_renewing_are_not_used() {
        let at = |newest: f64| {
            let values = json!([[newest, "0"]]);
            answer(json!([gauge("plimsoll_requests_waiting", "a", "x", values)]))
        };
        let increases = answer(json!([clock(1000.0)]));
        let fresh = read(&at(911.0), &increases, TEMPO).unwrap();
        assert_eq!(fresh.pods[&pod("a")].waiting.len(), 1);
        let stale = read(&at(909.0), &increases, TEMPO).unwrap();
        assert!(stale.pods.is_empty(), "90 s are the bound");
    }

    #[test]
    fn aibrix_1913_a_pod_that_two_jobs_scrape_counts_once() {
        let gauges = answer(json!([
            gauge("plimsoll_requests_waiting", "a", "x", json!([[95.0, "5"]])),
            gauge("plimsoll_requests_waiting", "a", "y", json!([[99.0, "7"]])),
        ]));
        let answers = read(&gauges, &answer(json!([clock(100.0)])), TEMPO).unwrap();
        assert_eq!(answers.pods[&pod("a")].waiting, [Sample { at: 99.0, value: 7.0 }]);
    }

    #[test]
    fn what_is_no_answer_says_what_came() {
        let clock = answer(json!([clock(1.0)]));
        let refused = json!({"status": "error", "error": "query timed out"}).to_string();
        let error = read(refused.as_bytes(), &clock, TEMPO).unwrap_err().to_string();
        assert!(error.contains("query timed out"), "{error}");
        assert!(matches!(read(b"<html>", &clock, TEMPO), Err(AnswerError::NotPrometheus { .. })));
        assert!(matches!(read(&clock, &answer(json!([])), TEMPO), Err(AnswerError::NoClock)));
    }
}

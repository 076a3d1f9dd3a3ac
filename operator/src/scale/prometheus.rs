//! In: the address of Prometheus, and pods. Out: what it holds of them, or why it cannot be asked. Two queries for all pods
//! together; nothing is retried before the next look. Never here: what the answers mean.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use axum::http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Limited};
use kube::{Client, Config};
use thiserror::Error;

use super::decide::Tempo;
use super::query::{self, AnswerError, Answers, PodName};
use crate::cli::CHART_VALUES;

/// Longest wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Some 500 bytes for each sample of some tens of thousands of pods.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// What a person needs of an answer that is none.
const WORDS_MAX: usize = 200;

/// Flags about Prometheus; the chart's values under `prometheus`.
#[derive(Clone, Debug, clap::Args)]
pub struct PrometheusArgs {
    /// Where Prometheus answers, for spec.scaling: http:// or https://, with a path before /api/v1 if it has one (value
    /// prometheus.address) [default: none, and spec.scaling changes nothing]
    #[arg(long, help_heading = CHART_VALUES, value_name = "URL")]
    pub prometheus_address: Option<Uri>,
    /// Certificate authority of Prometheus, PEM; read again when it changes (value prometheus.caConfigMap) [default: those of the system]
    #[arg(long, help_heading = CHART_VALUES, value_name = "FILE")]
    pub prometheus_ca_file: Option<PathBuf>,
    /// Bearer token for Prometheus; read again when it changes (value prometheus.tokenSecret) [default: none]
    #[arg(long, help_heading = CHART_VALUES, value_name = "FILE")]
    pub prometheus_token_file: Option<PathBuf>,
    /// Seconds between two looks; rates and percentiles cover four of them, so Prometheus has to scrape as often (value
    /// prometheus.intervalSeconds)
    #[arg(long, help_heading = CHART_VALUES, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..=60))]
    pub scaling_interval: u16,
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum AskError {
    #[error("cannot read the token for Prometheus, {}", file.display())]
    Token { file: PathBuf, source: std::io::Error },
    #[error("cannot reach Prometheus")]
    Unreachable { source: kube::Error },
    #[error("Prometheus did not answer within {} s", ANSWER_MAX.as_secs())]
    Silent,
    #[error("Prometheus answered {status}: {words}")]
    Refused { status: StatusCode, words: String },
    #[error("the answer of Prometheus broke off or is too long")]
    Broken,
    #[error("what answers at the address")]
    Answer { source: AnswerError },
}

/// One Prometheus.
pub struct Prometheus {
    client: Client,
    token_file: Option<PathBuf>,
}

impl Prometheus {
    /// None where no address was given.
    pub fn of(args: &PrometheusArgs) -> anyhow::Result<Option<Prometheus>> {
        let Some(address) = &args.prometheus_address else { return Ok(None) };
        anyhow::ensure!(
            matches!(address.scheme_str(), Some("http" | "https")),
            "--prometheus-address: {address} starts with neither http:// nor https://"
        );
        // The client of the cluster knows TLS and rotating authorities; it serves for Prometheus as well.
        let mut config = Config::new(address.clone());
        config.root_cert_file = args.prometheus_ca_file.clone();
        config.default_retry = false;
        let client =
            Client::try_from(config).context("--prometheus-address, --prometheus-ca-file")?;
        Ok(Some(Prometheus { client, token_file: args.prometheus_token_file.clone() }))
    }

    pub async fn ask(&self, pods: &[PodName], tempo: Tempo) -> Result<Answers, AskError> {
        let gauges = self.query(query::gauges(pods, tempo));
        let increases = self.query(query::increases(pods, tempo));
        let both = async { tokio::try_join!(gauges, increases) };
        let answered = tokio::time::timeout(ANSWER_MAX, both).await;
        let (gauges, increases) = answered.map_err(|_| AskError::Silent)??;
        query::read(&gauges, &increases, tempo).map_err(|source| AskError::Answer { source })
    }

    async fn query(&self, query: String) -> Result<Vec<u8>, AskError> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri("/api/v1/query")
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        if let Some(file) = &self.token_file {
            request = request.header(header::AUTHORIZATION, bearer(file)?);
        }
        let request = request.body(query::form(&query).into_bytes().into());
        let answer = self.client.send(request.expect("every part is valid")).await;
        let answer = answer.map_err(|source| AskError::Unreachable { source })?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|_| AskError::Broken)?.to_bytes();
        // A query that Prometheus refuses comes with words of its own.
        let told = status.is_success() || matches!(status.as_u16(), 400 | 422 | 503);
        if !told || !body.starts_with(b"{") && !status.is_success() {
            let words = String::from_utf8_lossy(&body).chars().take(WORDS_MAX).collect();
            return Err(AskError::Refused { status, words });
        }
        Ok(body.to_vec())
    }
}

/// The token as it stands now: mounted ones change.
fn bearer(file: &Path) -> Result<HeaderValue, AskError> {
    let failed = |source| AskError::Token { file: file.to_owned(), source };
    let token = std::fs::read_to_string(file).map_err(failed)?;
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
        .map_err(|_| failed(std::io::ErrorKind::InvalidData.into()))?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(address: &str) -> PrometheusArgs {
        PrometheusArgs {
            prometheus_address: Some(address.parse().expect("a URI")),
            prometheus_ca_file: None,
            prometheus_token_file: None,
            scaling_interval: 15,
        }
    }

    #[tokio::test]
    async fn an_address_without_a_scheme_is_refused_and_none_is_nothing() {
        assert!(Prometheus::of(&args("prometheus:9090")).is_err());
        let none = PrometheusArgs { prometheus_address: None, ..args("http://a") };
        assert!(Prometheus::of(&none).expect("nothing to refuse").is_none());
    }
}

//! One question to a running engine over its own HTTP interface: readiness, its metrics, a streamed answer. Nothing is
//! retried and nothing is kept.

use std::net::SocketAddr;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// A line of a stream longer than this is no answer.
const LINE_BYTES_MAX: usize = 1 << 20;
/// An exposition longer than this is none of an engine.
const METRICS_BYTES_MAX: usize = 4 << 20;

/// True once the engine answers /ready with 200.
pub async fn is_ready(address: SocketAddr) -> bool {
    let request = Request::get("/ready").header(header::HOST, address.to_string());
    let Ok(request) = request.body(Full::default()) else { return false };
    send(address, request).await.is_ok_and(|answer| answer.status() == StatusCode::OK)
}

/// What the engine tells Prometheus.
pub async fn metrics(address: SocketAddr) -> anyhow::Result<String> {
    let request = Request::get("/metrics").header(header::HOST, address.to_string());
    let answer = send(address, request.body(Full::default())?).await?;
    if answer.status() != StatusCode::OK {
        bail!("the engine answered {}", answer.status());
    }
    let body = Limited::new(answer.into_body(), METRICS_BYTES_MAX).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("the metrics broke off: {error}"))?;
    Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
}

/// Which interface a model speaks: chat where it has a template, plain completion else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    Chat,
    Completion,
}

impl Interface {
    pub fn path(self) -> &'static str {
        match self {
            Interface::Chat => "/v1/chat/completions",
            Interface::Completion => "/v1/completions",
        }
    }

    pub fn body(self, model: &str, question: &str) -> Value {
        match self {
            Interface::Chat => json!({
                "model": model, "stream": true,
                "messages": [{"role": "user", "content": question}],
            }),
            Interface::Completion => {
                json!({"model": model, "stream": true, "prompt": question, "max_tokens": 64})
            }
        }
    }

    fn piece(self, event: &Value) -> Option<&str> {
        let choice = &event["choices"][0];
        match self {
            Interface::Chat => choice["delta"]["content"].as_str(),
            Interface::Completion => choice["text"].as_str(),
        }
    }
}

/// Streams the answer, piece by piece, into `each`.
pub async fn ask(
    address: SocketAddr,
    key: Option<&str>,
    interface: Interface,
    body: &Value,
    mut each: impl FnMut(&str) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    let mut request = Request::post(interface.path())
        .header(header::HOST, address.to_string())
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(key) = key {
        request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    }
    let mut answer = send(address, request.body(Full::from(body.to_string()))?).await?;
    if answer.status() != StatusCode::OK {
        let status = answer.status();
        let said = answer.into_body().collect().await?.to_bytes();
        bail!("the engine answered {status}: {}", String::from_utf8_lossy(&said));
    }
    let mut lines = Lines::default();
    while let Some(frame) = answer.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        for event in lines.take(&data)? {
            if let Some(piece) = interface.piece(&event) {
                each(piece)?;
            }
        }
    }
    Ok(())
}

async fn send(
    address: SocketAddr,
    request: Request<Full<Bytes>>,
) -> anyhow::Result<Response<Incoming>> {
    let stream = TcpStream::connect(address).await.context("cannot reach the engine")?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

/// Server-sent events out of chunks that break anywhere.
#[derive(Default)]
struct Lines {
    pending: Vec<u8>,
}

impl Lines {
    fn take(&mut self, chunk: &[u8]) -> anyhow::Result<Vec<Value>> {
        self.pending.extend_from_slice(chunk);
        let mut events = Vec::new();
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data: ") else { continue };
            if data.trim_ascii() != b"[DONE]" {
                let event: Value = serde_json::from_slice(data).context("an event is no JSON")?;
                if let Some(error) = event.get("error") {
                    bail!("the engine broke off: {error}");
                }
                events.push(event);
            }
        }
        if self.pending.len() > LINE_BYTES_MAX {
            bail!("a line of the answer is longer than {LINE_BYTES_MAX} bytes");
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_wherever_chunks_break() {
        let stream =
            "data: {\"choices\":[{\"delta\":{\"content\":\"Grüße\"}}]}\n\ndata: [DONE]\n\n";
        for cut in 0..stream.len() {
            let (head, tail) = stream.as_bytes().split_at(cut);
            let mut lines = Lines::default();
            let mut events = lines.take(head).unwrap();
            events.extend(lines.take(tail).unwrap());
            assert_eq!(events.len(), 1, "cut at {cut}");
            assert_eq!(Interface::Chat.piece(&events[0]), Some("Grüße"));
        }
    }

    #[test]
    fn an_error_in_the_stream_is_an_error() {
        assert!(Lines::default().take(b"data: {\"error\":{\"message\":\"x\"}}\n").is_err());
    }
}

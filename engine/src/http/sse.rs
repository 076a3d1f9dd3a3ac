//! Server-sent events. Enters: a running generation and the shape of its chunks. Leaves: bytes, `data: {…}` after
//! `data: {…}`, at the end `data: [DONE]`. Dropped when the client goes away, which cancels the generation.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tokio_stream::Stream;

use crate::http::errors::ApiError;
use crate::http::generation::{Generation, Piece};
use crate::http::openai::Usage;

/// Bytes gathered into one write when tokens are ready faster than they are sent.
const WRITE_BYTES_MAX: usize = 16 << 10;

/// The shape of a stream: chat chunks or completion chunks.
pub trait Chunks: Send + Unpin + 'static {
    /// Sent before anything is generated.
    fn open(&mut self, choices: usize, out: &mut Events);
    fn piece(&mut self, piece: Piece, out: &mut Events);
    /// After the last piece.
    fn close(&mut self, usage: Usage, out: &mut Events);
}

/// Events to be written.
#[derive(Default)]
pub struct Events(Vec<u8>);

impl Events {
    pub fn push(&mut self, data: &impl Serialize) {
        self.0.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut self.0, data).expect("our own types serialize");
        self.0.extend_from_slice(b"\n\n");
    }

    /// The last word of a failed stream.
    pub fn fail(&mut self, message: String) {
        self.push(&ApiError::internal(message).body());
    }
}

/// A response that streams while the generation runs.
pub fn respond<C: Chunks>(generation: Generation, mut chunks: C) -> Response {
    let mut opening = Events::default();
    chunks.open(generation.choices(), &mut opening);
    let stream = EventStream { generation, chunks, opening, done: false };
    let mut response = Body::from_stream(stream).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer would turn the stream into one answer.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct EventStream<C> {
    generation: Generation,
    chunks: C,
    opening: Events,
    done: bool,
}

impl<C: Chunks> Stream for EventStream<C> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.done {
            return Poll::Ready(None);
        }
        let mut out = std::mem::take(&mut this.opening);
        while out.0.len() < WRITE_BYTES_MAX {
            match this.generation.poll_next(cx) {
                Poll::Pending if out.0.is_empty() => return Poll::Pending,
                Poll::Pending => break,
                Poll::Ready(Some(Piece::Failed { message })) => {
                    out.fail(message);
                    this.done = true;
                    break;
                }
                Poll::Ready(Some(piece)) => this.chunks.piece(piece, &mut out),
                Poll::Ready(None) => {
                    this.chunks.close(this.generation.usage(), &mut out);
                    out.0.extend_from_slice(b"data: [DONE]\n\n");
                    this.done = true;
                    break;
                }
            }
        }
        Poll::Ready(Some(Ok(out.0.into())))
    }
}

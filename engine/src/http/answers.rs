//! Answers that leave as a whole, from their last byte's making to its taking. Enters: a response. Leaves: the same, its
//! bytes counted until the socket has them, however slowly they are taken; or a refusal, when those that wait for their
//! readers hold all there is. What a device has computed is not refused any more: there must be room before it begins.
//! Streams are made as they are read and need no share.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use hyper::body::Body as HttpBody;
use plimsoll_contract::memory::ANSWERS_BYTES_MAX;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::http::errors::ApiError;
use crate::http::state::App;
use crate::request::Request as EngineRequest;

/// Bytes that every answer may hold whatever the others do.
const FREE_BYTES: u64 = 4 << 10;
/// What has to be left for an answer that may be as large or larger, before it is generated.
const ROOM_BYTES: u64 = 64 << 10;
/// Bytes of a token's text in an answer, more than the average of any language.
const TOKEN_TEXT_BYTES: u64 = 8;
const RETRY_SECONDS: u64 = 1;

/// What all such answers may hold beyond their first bytes.
pub struct AnswerBudget(Arc<Semaphore>);

impl Default for AnswerBudget {
    fn default() -> AnswerBudget {
        AnswerBudget(Arc::new(Semaphore::new(ANSWERS_BYTES_MAX as usize)))
    }
}

impl AnswerBudget {
    /// A share for an answer of so many bytes. One that is larger than the budget takes all of it.
    pub fn take(&self, bytes: u64) -> Result<OwnedSemaphorePermit, ApiError> {
        let bytes = bytes.saturating_sub(FREE_BYTES).min(ANSWERS_BYTES_MAX);
        let bytes = u32::try_from(bytes).expect("the budget is some MiB");
        self.0.clone().try_acquire_many_owned(bytes).map_err(|_| {
            let full = "too many answers wait for their readers; retry shortly, or stream";
            ApiError::busy(full, RETRY_SECONDS).code("answers_full")
        })
    }

    /// Whether what these requests generate may begin. Nothing is held for it: most answers end long before their bound.
    pub fn has_room(&self, requests: &[EngineRequest]) -> Result<(), ApiError> {
        let tokens = |request: &EngineRequest| {
            u64::from(request.choices) * u64::from(request.stop.output_tokens_max)
        };
        let bytes = TOKEN_TEXT_BYTES * requests.iter().map(tokens).sum::<u64>();
        self.take(bytes.min(FREE_BYTES + ROOM_BYTES)).map(drop)
    }

    /// A share for an answer that leaves in any case: as much of it as is left.
    fn take_what_is_left(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let bytes = bytes.saturating_sub(FREE_BYTES).min(self.0.available_permits() as u64);
        let bytes = u32::try_from(bytes).expect("the budget is some MiB");
        self.0.clone().try_acquire_many_owned(bytes).ok()
    }
}

/// Bytes of a generated response that hold a share already.
#[derive(Clone, Copy)]
struct Counted(u64);

/// Bytes and what they hold until they are taken. (A body ends before: hyper keeps bytes that wait for the socket.)
struct Held<B, S> {
    bytes: B,
    _share: S,
}

impl<B: AsRef<[u8]>, S> AsRef<[u8]> for Held<B, S> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

fn held(bytes: impl AsRef<[u8]> + Send + 'static, share: impl Send + 'static) -> Body {
    Body::from(Bytes::from_owner(Held { bytes, _share: share }))
}

/// A generated answer of JSON that holds `share`, in which `counted` of its bytes are counted.
pub fn json(json: Vec<u8>, share: impl Send + 'static, counted: u64) -> Response {
    let mut response =
        ([(header::CONTENT_TYPE, "application/json")], held(json, share)).into_response();
    response.extensions_mut().insert(Counted(counted));
    response
}

/// Counts every whole answer of the API.
pub async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (parts, body) = next.run(request).await.into_parts();
    let generated = parts.extensions.get().map(|Counted(bytes)| *bytes);
    let counted = generated.unwrap_or(0);
    let bytes = HttpBody::size_hint(&body).exact().unwrap_or(0).saturating_sub(counted);
    if bytes <= FREE_BYTES {
        return Response::from_parts(parts, body);
    }
    // An error says what is wrong, and is short.
    let share = if generated.is_some() || !parts.status.is_success() {
        app.answers.take_what_is_left(bytes)
    } else {
        match app.answers.take(bytes) {
            Ok(share) => Some(share),
            Err(refusal) => return refusal.into_response(),
        }
    };
    match body.collect().await {
        Ok(collected) => Response::from_parts(parts, held(collected.to_bytes(), share)),
        Err(error) => ApiError::internal(error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_share_one_budget_until_their_last_byte_is_taken_and_small_ones_need_none_of_it() {
        let budget = AnswerBudget::default();
        let whole = ANSWERS_BYTES_MAX + FREE_BYTES;
        let largest = json(vec![b' '; 100], budget.take(2 * whole).unwrap(), 2 * whole);
        let refused = budget.take(FREE_BYTES + 1).map(drop).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.code), (429, Some("answers_full")));
        drop(budget.take(FREE_BYTES).unwrap());
        drop(largest);
        drop(budget.take(whole).unwrap());
        // What leaves in any case takes what it finds.
        let other = budget.take(ANSWERS_BYTES_MAX).unwrap();
        let rest = budget.take_what_is_left(whole).unwrap();
        assert_eq!(rest.num_permits() as u64, FREE_BYTES);
        drop((other, rest));
        drop(budget.take(whole).unwrap());
    }
}

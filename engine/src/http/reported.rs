//! In: how many log-probabilities an answer carries that leaves as a whole. Out: a share in what all such answers may hold
//! together, kept until the last byte is taken, however slowly. Streams hold little and need no share.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::admission::REPORTED_LOGPROBS_MAX;
use crate::http::body::give_memory_back;
use crate::http::errors::ApiError;

const RETRY_SECONDS: u64 = 1;

/// Log-probabilities of all unfinished answers; one of the largest that are admitted.
pub struct ReportBudget(Arc<Semaphore>);

impl Default for ReportBudget {
    fn default() -> ReportBudget {
        ReportBudget(Arc::new(Semaphore::new(REPORTED_LOGPROBS_MAX as usize)))
    }
}

/// Answers from this size on leave holes in the allocator's memory that are worth giving back.
const LARGE: usize = 16 << 10;

/// Holds its part of the budget until it is dropped.
pub struct Share(OwnedSemaphorePermit);

impl Drop for Share {
    fn drop(&mut self) {
        if self.0.num_permits() >= LARGE {
            give_memory_back();
        }
    }
}

impl ReportBudget {
    pub fn take(&self, reported: u64) -> Result<Share, ApiError> {
        let wanted = u32::try_from(reported).expect("admission bounds an answer");
        self.0.clone().try_acquire_many_owned(wanted).map(Share).map_err(|_| {
            let message = format!(
                "answers with log-probabilities are being put together that leave no room for {reported} more \
                 ({REPORTED_LOGPROBS_MAX} together); retry, lower n, max_tokens or the number of alternatives, or stream"
            );
            ApiError::busy(message, RETRY_SECONDS).code("logprobs_full")
        })
    }
}

#[cfg(test)]
mod tests {
    use axum::http::{StatusCode, header};
    use http_body_util::BodyExt;

    use super::*;
    use crate::http::answers;

    #[tokio::test]
    async fn a_share_lasts_as_long_as_the_answers_bytes() {
        let budget = ReportBudget::default();
        let share = budget.take(REPORTED_LOGPROBS_MAX - 1).unwrap();
        let answer = answers::json(b"{}".to_vec(), share, u64::MAX);
        assert_eq!(answer.headers()[header::CONTENT_TYPE], "application/json");
        drop(budget.take(1).expect("one is left"));
        drop(budget.take(0).expect("an answer without any needs none"));
        let refused = budget.take(2).map(drop).unwrap_err();
        assert_eq!(
            (refused.status, refused.retry_after_seconds),
            (StatusCode::TOO_MANY_REQUESTS, Some(1))
        );
        // A server is done with the body before the socket has taken its bytes.
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        budget.take(2).map(drop).unwrap_err();
        drop(bytes);
        drop(budget.take(REPORTED_LOGPROBS_MAX).expect("all of it"));
    }
}

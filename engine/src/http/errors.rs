//! Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}`. Enters: what went wrong, in our
//! terms. Leaves: a status and a body. No request is ever answered with an empty or foreign error body.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::admission::AnswerTooLarge;
use crate::request::Refusal;

/// Characters of a message, and of a parameter's path.
const TOLD_CHARS_MAX: usize = 1000;

#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    pub code: Option<&'static str>,
    pub param: Option<String>,
    pub message: String,
    pub retry_after_seconds: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            kind,
            code: None,
            param: None,
            message: message.into(),
            retry_after_seconds: None,
        }
    }

    /// The request as a whole is wrong.
    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// One parameter is wrong; `param` is its path in the body.
    pub fn parameter(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), ..ApiError::invalid(message) }
    }

    pub fn code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    pub fn model_not_found(asked: &str, served: &str) -> ApiError {
        ApiError {
            status: StatusCode::NOT_FOUND,
            ..ApiError::parameter(
                "model",
                format!("the model `{asked}` does not exist here; this engine serves `{served}`"),
            )
            .code("model_not_found")
        }
    }

    pub fn unauthorized() -> ApiError {
        ApiError::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            "no valid API key: send `Authorization: Bearer KEY` with a key this engine knows",
        )
        .code("invalid_api_key")
    }

    pub fn not_found(method: &str, path: &str) -> ApiError {
        ApiError::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("unknown request URL: {method} {path}"),
        )
        .code("unknown_url")
    }

    pub fn method_not_allowed(method: &str, path: &str) -> ApiError {
        ApiError::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            format!("{path} does not take {method}"),
        )
        .code("method_not_allowed")
    }

    pub fn body_too_large(limit: usize) -> ApiError {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!("the body is larger than {limit} bytes"),
        )
        .code("body_too_large")
    }

    pub fn body_too_slow(limit: Duration) -> ApiError {
        ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            format!("the body did not arrive within {limit:?}"),
        )
        .code("body_timeout")
    }

    /// Not now, but a retry (here or at another replica) can succeed.
    pub fn unavailable(message: impl Into<String>, retry_after_seconds: u64) -> ApiError {
        ApiError {
            retry_after_seconds: Some(retry_after_seconds),
            ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
        }
    }

    /// This process has its hands full; a retry can succeed.
    pub fn busy(message: impl Into<String>, retry_after_seconds: u64) -> ApiError {
        ApiError {
            retry_after_seconds: Some(retry_after_seconds),
            ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    /// A fault of ours.
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The body, also sent as an event when a stream fails midway.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": shortened(&self.message),
            "type": self.kind,
            "param": self.param.as_deref().map(shortened),
            "code": self.code,
        }})
    }
}

/// What a client sent may stand in what it is told, but not megabytes of it.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(TOLD_CHARS_MAX) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        let message = refusal.to_string();
        match refusal {
            Refusal::NeverFits { .. } => ApiError::invalid(message).code("context_length_exceeded"),
            Refusal::QueueFull { retry_after_seconds, .. } => {
                ApiError::busy(message, retry_after_seconds).code("queue_full")
            }
            Refusal::ShuttingDown => ApiError::unavailable(message, 1).code("shutting_down"),
        }
    }
}

impl From<AnswerTooLarge> for ApiError {
    fn from(refusal: AnswerTooLarge) -> ApiError {
        ApiError::invalid(refusal.to_string()).code("answer_too_large")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_repeats_no_megabytes_of_what_was_sent() {
        let long = "ü".repeat(1 << 20);
        let body = ApiError::parameter(&*long, format!("`{long}` is not known")).body();
        let chars = |name: &str| body["error"][name].as_str().unwrap().chars().count();
        assert_eq!((chars("message"), chars("param")), (TOLD_CHARS_MAX + 1, TOLD_CHARS_MAX + 1));
        let short = ApiError::parameter("n", "`n` is wrong").body();
        assert_eq!(
            (&short["error"]["param"], &short["error"]["message"]),
            (&json!("n"), &json!("`n` is wrong"))
        );
    }
}

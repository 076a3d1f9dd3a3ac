//! What all handlers share: the model once it is loaded, and where the process is in its life. Clock and chance enter
//! the HTTP side here and nowhere else.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::admission::ModelLimits;
use crate::batch::TokenId;
use crate::chat_template::ChatTemplate;
use crate::http::Identity;
use crate::http::answers::AnswerBudget;
use crate::http::auth::ApiKeys;
use crate::http::body::{BODY_BYTES_MAX, BodyBudget};
use crate::http::errors::ApiError;
use crate::http::openai::Model;
use crate::http::reported::ReportBudget;
use crate::metrics::Metrics;
use crate::step::{EngineHandle, PulseLimits};
use crate::tokenizer::{EncodeError, Tokenizer};

const BODY_TIME_MAX: Duration = Duration::from_secs(30);
/// A body that is half here when nothing more is accepted comes within this or not at all: the time that is left belongs
/// to requests that run.
const LATE_BODY_TIME_MAX: Duration = Duration::from_secs(5);
/// Texts have 3 to 6 bytes a token; more than this, on average, is no text of a person or a program.
const TOKEN_BYTES_MAX: u64 = 16;
/// A text of this size is tokenized in any case.
const TEXT_BYTES_MIN: u64 = 64 << 10;
/// Bodies that are made ready at once where there are as many cores: more than any device takes in.
const PREPARING_MAX: usize = 8;
/// Bytes of them together: parsed, written by a template and tokenized, each holds some times its size.
const PREPARING_BYTES_MAX: usize = BODY_BYTES_MAX;
/// Bodies of up to this size, as many again at once, wait for no larger ones: most are, and are ready in milliseconds.
const SMALL_BODY_BYTES: usize = 64 << 10;

/// A loaded model and the engine that runs it.
pub struct Served {
    pub name: String,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<ChatTemplate>,
    pub limits: ModelLimits,
    pub engine: EngineHandle,
    pub metrics: Arc<Metrics>,
}

impl Served {
    pub fn check_model(&self, asked: &str) -> Result<(), ApiError> {
        if asked == self.name {
            return Ok(());
        }
        Err(ApiError::model_not_found(asked, &self.name))
    }

    /// Refuses a text that is too long for the model by far: tokenizing megabytes takes seconds. `param` is where the text
    /// came from.
    pub fn check_text(&self, text: &str, param: &str) -> Result<(), ApiError> {
        let (limit, limit_name) = self.limits.sequence_tokens_max();
        let (bytes, bytes_max) =
            (text.len(), TEXT_BYTES_MIN.max(limit.saturating_mul(TOKEN_BYTES_MAX)));
        if bytes as u64 <= bytes_max {
            return Ok(());
        }
        let message = format!(
            "`{param}` has {bytes} bytes, but {limit_name} is {limit} tokens, and texts of up to {bytes_max} bytes are \
             looked at; shorten it"
        );
        Err(ApiError::parameter(param, message).code("context_length_exceeded"))
    }

    /// `param` is where the text came from.
    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        param: &str,
    ) -> Result<Vec<TokenId>, ApiError> {
        let tokens = self.tokens(text, add_special_tokens, param)?;
        if tokens.is_empty() {
            let empty = format!("`{param}` is empty: the model needs at least one token");
            return Err(ApiError::parameter(param, empty).code("invalid_value"));
        }
        Ok(tokens)
    }

    /// Like [`Served::encode`], but a text may be empty.
    pub fn tokens(
        &self,
        text: &str,
        add_special_tokens: bool,
        param: &str,
    ) -> Result<Vec<TokenId>, ApiError> {
        self.check_text(text, param)?;
        let tokens_max = TEXT_BYTES_MIN.max(self.limits.sequence_tokens_max().0);
        let tokens_max = usize::try_from(tokens_max).unwrap_or(usize::MAX);
        self.tokenizer.encode(text, add_special_tokens, tokens_max).map_err(|error| {
            let code = match error {
                EncodeError::TooManyTokens(_) => "context_length_exceeded",
                EncodeError::Failed(_) => "tokenizer_error",
            };
            ApiError::parameter(param, error.to_string()).code(code)
        })
    }
}

/// What a request takes from the world.
#[derive(Clone, Copy, Debug)]
pub struct Chance {
    /// For requests without a seed.
    pub seed: u64,
    pub now_unix_seconds: i64,
}

impl Chance {
    pub fn now() -> Chance {
        Chance { seed: random_u64(), now_unix_seconds: unix_seconds().cast_signed() }
    }
}

/// Where a process is between its start and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Life {
    Serving,
    /// Requests are still taken, and their clients told to go elsewhere.
    Draining,
    /// No more is accepted.
    Closing,
}

pub struct App {
    pub name: String,
    pub keys: Option<ApiKeys>,
    /// Time for a request's body to arrive.
    pub body_time_max: Duration,
    /// Time for it once no more is accepted.
    pub late_body_time_max: Duration,
    /// What all bodies may hold together.
    pub bodies: BodyBudget,
    /// What all answers with log-probabilities may hold together.
    pub reports: ReportBudget,
    /// What all other answers may that leave as a whole.
    pub answers: AnswerBudget,
    /// When a step has taken too long.
    pub pulse_limits: PulseLimits,
    created: u64,
    served: OnceLock<Arc<Served>>,
    progress: Mutex<String>,
    life: watch::Sender<Life>,
    preparing: Arc<Semaphore>,
    /// What each takes of it at least.
    preparing_bytes_min: usize,
    /// Small ones.
    preparing_small: Arc<Semaphore>,
}

impl App {
    pub fn new(name: String, keys: Option<ApiKeys>) -> App {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let at_once = cores.min(PREPARING_MAX);
        App {
            name,
            keys,
            body_time_max: BODY_TIME_MAX,
            late_body_time_max: LATE_BODY_TIME_MAX,
            bodies: BodyBudget::default(),
            reports: ReportBudget::default(),
            answers: AnswerBudget::default(),
            pulse_limits: PulseLimits::default(),
            created: unix_seconds(),
            served: OnceLock::new(),
            progress: Mutex::new("starting".to_owned()),
            life: watch::Sender::new(Life::Serving),
            preparing: Arc::new(Semaphore::new(PREPARING_BYTES_MAX)),
            preparing_bytes_min: PREPARING_BYTES_MAX / at_once,
            preparing_small: Arc::new(Semaphore::new(at_once)),
        }
    }

    /// None until the model is loaded.
    pub fn served(&self) -> Option<Arc<Served>> {
        self.served.get().cloned()
    }

    /// Called once, when the model is loaded.
    pub fn serve(&self, served: Served) {
        let first = self.served.set(Arc::new(served)).is_ok();
        assert!(first, "a process loads one model");
    }

    /// Loading, in words.
    pub fn progress(&self) -> String {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_progress(&self, progress: String) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }

    pub fn draining(&self) -> bool {
        *self.life.borrow() >= Life::Draining
    }

    pub fn drain(&self) {
        self.life.send_replace(Life::Draining);
    }

    /// Nothing more is accepted from now on.
    pub fn close(&self) {
        self.life.send_replace(Life::Closing);
    }

    /// Returns once nothing more is accepted.
    pub async fn closing(&self) {
        let mut life = self.life.subscribe();
        life.wait_for(|life| *life == Life::Closing).await.expect("its sender is our own");
    }

    /// The right to make a body of so many bytes ready; first come, first served among small ones and among others.
    pub async fn preparing(&self, body_bytes: usize) -> OwnedSemaphorePermit {
        let (of, permits) = if body_bytes <= SMALL_BODY_BYTES {
            (&self.preparing_small, 1)
        } else {
            (&self.preparing, body_bytes.clamp(self.preparing_bytes_min, PREPARING_BYTES_MAX))
        };
        let permits = u32::try_from(permits).expect("some MiB");
        let permit = of.clone().acquire_many_owned(permits).await;
        permit.expect("the semaphore is never closed")
    }

    pub fn identity(&self, prefix: &str) -> Identity {
        Identity {
            id: format!("{prefix}-{:016x}{:016x}", random_u64(), random_u64()),
            created: unix_seconds(),
            model: self.name.clone(),
        }
    }

    pub fn model(&self) -> Model {
        Model {
            id: self.name.clone(),
            object: "model",
            created: self.created,
            owned_by: "plimsoll",
        }
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Not for secrets: every hasher of the standard library starts from keys of its own.
fn random_u64() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn small_bodies_wait_for_each_other_and_for_no_large_one() {
        let app = App::new("model".into(), None);
        let soon = Duration::from_secs(1);
        let waits = async |bytes| tokio::time::timeout(soon, app.preparing(bytes)).await.ok();
        let large = waits(BODY_BYTES_MAX).await.expect("it is the first");
        assert!(waits(SMALL_BODY_BYTES + 1).await.is_none(), "the bytes are taken");
        let mut small = Vec::new();
        while let Some(permit) = waits(SMALL_BODY_BYTES).await {
            small.push(permit);
        }
        assert!((1..=PREPARING_MAX).contains(&small.len()), "{}", small.len());
        small.pop();
        assert!(waits(100).await.is_some());
        drop(large);
        assert!(waits(BODY_BYTES_MAX).await.is_some());
    }
}

//! A request's body, from its first byte until it has been made ready. Enters: frames. Leaves: bytes, or the refusal.
//! Bounds what all bodies hold together: each may hold its first bytes, the rest comes out of one budget. Who finds it
//! spent is refused. Memory goes back to the system afterwards.

use std::ops::Deref;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::Request;
use http_body_util::BodyExt;
use hyper::body::Body as HttpBody;
use plimsoll_contract::memory::BODIES_BYTES_MAX;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::http::errors::ApiError;
use crate::http::state::App;

/// Bytes of a request's body.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// Bytes that every body may hold whatever the others do; no more than a socket's own buffer.
const FREE_BYTES: usize = 8 << 10;
/// Bytes of a body that is refused which are still read.
const DISCARDED_BYTES_MAX: usize = 2 * BODY_BYTES_MAX;
/// What a value takes once it is parsed, beside its text: 78 were measured for arrays of numbers.
const VALUE_BYTES: usize = 80;
/// What a client is told to wait while the others' bodies arrive.
const RETRY_SECONDS: u64 = 1;
/// From this size on, what a body became is worth a walk through the allocator's free lists.
const LARGE_BYTES: usize = 1 << 20;
/// Blocks of this size are mapped, so that they are given back when freed.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES: i32 = 128 << 10;

/// What all unfinished bodies may hold beyond their first bytes.
pub struct BodyBudget(Arc<Semaphore>);

impl Default for BodyBudget {
    fn default() -> BodyBudget {
        BodyBudget::new(BODIES_BYTES_MAX as usize)
    }
}

impl BodyBudget {
    pub fn new(bytes: usize) -> BodyBudget {
        BodyBudget(Arc::new(Semaphore::new(bytes)))
    }
}

/// Holds its share of the budget until it is dropped.
#[derive(Default)]
pub struct Body {
    bytes: Vec<u8>,
    share: Option<OwnedSemaphorePermit>,
    /// Nothing is made of a body that did not come to its end.
    complete: bool,
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        let large = self.complete && self.bytes.len() >= LARGE_BYTES;
        self.bytes = Vec::new();
        if large {
            give_memory_back();
        }
    }
}

impl Body {
    /// Room for `more` bytes: twice as much as now, so that few copies are made, but never beyond `expected`.
    fn reserve(
        &mut self,
        more: usize,
        expected: usize,
        budget: &BodyBudget,
    ) -> Result<(), ApiError> {
        let needed = self.bytes.len() + more;
        if needed > BODY_BYTES_MAX {
            return Err(ApiError::body_too_large(BODY_BYTES_MAX));
        }
        let held = self.bytes.capacity().max(FREE_BYTES);
        if needed > held {
            let wanted = needed.max((2 * held).min(expected));
            self.take(wanted - held, budget)?;
            self.bytes.reserve_exact(wanted - self.bytes.len());
        }
        Ok(())
    }

    fn take(&mut self, bytes: usize, budget: &BodyBudget) -> Result<(), ApiError> {
        let bytes = u32::try_from(bytes).expect("a body has a bound");
        let share = budget.0.clone().try_acquire_many_owned(bytes).map_err(|_| {
            let full = "too many large bodies are on their way; retry shortly";
            ApiError::unavailable(full, RETRY_SECONDS).code("too_many_bodies")
        })?;
        match &mut self.share {
            Some(held) => held.merge(share),
            None => self.share = Some(share),
        }
        Ok(())
    }

    /// Room for what it will be once it is parsed.
    fn reserve_values(&mut self, values: usize, budget: &BodyBudget) -> Result<(), ApiError> {
        let held = self.bytes.capacity();
        let bytes = values * VALUE_BYTES;
        if held + bytes > BODIES_BYTES_MAX as usize {
            let most = (BODIES_BYTES_MAX as usize - held) / VALUE_BYTES;
            let many =
                format!("the body holds {values} values, more than the {most} there is room for");
            let refusal = ApiError::body_too_large(BODY_BYTES_MAX);
            return Err(ApiError { message: many, ..refusal });
        }
        if self.bytes.len() > FREE_BYTES { self.take(bytes, budget) } else { Ok(()) }
    }
}

/// Counts the values of a JSON text as it arrives.
#[derive(Default)]
struct Values {
    count: usize,
    in_string: bool,
    escaped: bool,
}

impl Values {
    fn count(&mut self, text: &[u8]) {
        for byte in text {
            match (self.in_string, byte) {
                (true, _) if self.escaped => self.escaped = false,
                (true, b'\\') => self.escaped = true,
                (_, b'"') => self.in_string = !self.in_string,
                // A member of an object is two: its name is a value too.
                (false, b',' | b':' | b'[' | b'{') => self.count += 1,
                _ => {}
            }
        }
    }
}

pub async fn read(app: &App, request: Request) -> Result<Body, ApiError> {
    let late = async {
        app.closing().await;
        tokio::time::sleep(app.late_body_time_max).await;
    };
    tokio::select! {
        biased;
        read = collect(request, &app.bodies) => read,
        () = tokio::time::sleep(app.body_time_max) => Err(ApiError::body_too_slow(app.body_time_max)),
        // The client had more time than this, had the process stayed.
        () = late => {
            let late = "the body was not here when this process stopped accepting; send it again";
            Err(ApiError::unavailable(late, RETRY_SECONDS).code("shutting_down"))
        }
    }
}

/// Who is refused is read to the end all the same, as far as that is bearable: most clients look for an answer only then.
async fn collect(request: Request, budget: &BodyBudget) -> Result<Body, ApiError> {
    let mut incoming = request.into_body();
    let announced = HttpBody::size_hint(&incoming).upper();
    let expected =
        announced.map_or(BODY_BYTES_MAX, |bytes| bytes.min(BODY_BYTES_MAX as u64) as usize);
    let too_large = announced.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64);
    let mut refusal = too_large.then(|| ApiError::body_too_large(BODY_BYTES_MAX));
    let (mut body, mut values) = (Body::default(), Values::default());
    let mut seen = 0;
    while let Some(frame) = incoming.frame().await {
        let data: Bytes = match frame {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(error) => {
                let broken = || ApiError::invalid(format!("the body could not be read: {error}"));
                return Err(refusal.unwrap_or_else(broken));
            }
        };
        seen += data.len();
        if refusal.is_none() {
            match body.reserve(data.len(), expected, budget) {
                Ok(()) => {
                    body.bytes.extend_from_slice(&data);
                    values.count(&data);
                }
                Err(refused) => {
                    body = Body::default();
                    refusal = Some(refused);
                }
            }
        }
        if seen > DISCARDED_BYTES_MAX {
            break;
        }
    }
    if let Some(refusal) = refusal {
        return Err(refusal);
    }
    body.complete = true;
    body.reserve_values(values.count, budget)?;
    Ok(body)
}

/// Large blocks go back to the system when they are freed; glibc would otherwise keep more and more of them. Called
/// once, before there are threads.
pub fn map_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number in the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
    }
}

/// What was freed in small pieces, a parsed body for instance.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches free memory only, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body as AxumBody;

    use super::*;

    fn request(bytes: usize) -> Request {
        Request::new(AxumBody::from(vec![b' '; bytes]))
    }

    #[tokio::test]
    async fn all_bodies_share_one_budget_and_small_ones_need_none_of_it() {
        let budget = BodyBudget::new(100_000);
        let first = collect(request(FREE_BYTES + 60_000), &budget).await.unwrap();
        assert_eq!(first.len(), FREE_BYTES + 60_000);
        let refused = collect(request(FREE_BYTES + 60_000), &budget).await.map(drop).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.code), (503, Some("too_many_bodies")));
        assert_eq!(refused.retry_after_seconds, Some(RETRY_SECONDS));
        let small: Vec<_> = [FREE_BYTES; 50].map(request).into();
        for small in small {
            assert_eq!(collect(small, &budget).await.unwrap().len(), FREE_BYTES);
        }
        drop(first);
        assert_eq!(budget.0.available_permits(), 100_000);
        collect(request(FREE_BYTES + 60_000), &budget).await.unwrap();
    }

    #[tokio::test]
    async fn a_body_takes_its_share_for_what_it_becomes_once_parsed() {
        let budget = BodyBudget::default();
        let all = BODIES_BYTES_MAX as usize;
        let numbers = |count: usize| format!("[{}1]", "1,".repeat(count - 1));
        let text = |body: String| Request::new(AxumBody::from(body));
        let body = collect(text(numbers(100_000)), &budget).await.unwrap();
        let held = all - budget.0.available_permits();
        assert!((100_000 * VALUE_BYTES..110_000 * VALUE_BYTES).contains(&held), "{held}");
        drop(body);
        let refused = collect(text(numbers(4_000_000)), &budget).await.map(drop).unwrap_err();
        assert_eq!(refused.status.as_u16(), 413);
        assert!(refused.message.contains("4000000 values"), "{}", refused.message);
        // A text may hold as many commas as it likes.
        let prose = format!(r#"{{"prompt": "\"{}\\"}}"#, ", [".repeat(2_000_000));
        collect(text(prose), &budget).await.unwrap();
        assert_eq!(budget.0.available_permits(), all);
    }

    #[tokio::test]
    async fn a_body_of_unknown_length_grows_by_doubling_up_to_its_bound() {
        let budget = BodyBudget::default();
        let pieces = (0..).map(|_| Ok::<_, std::io::Error>(vec![b'x'; 100_000]));
        let chunked = |count| AxumBody::from_stream(tokio_stream::iter(pieces.clone().take(count)));
        let body = collect(Request::new(chunked(7)), &budget).await.unwrap();
        assert_eq!(body.len(), 700_000);
        assert!(body.bytes.capacity() <= 2 * 700_000);
        drop(body);
        let refused = collect(Request::new(chunked(84)), &budget).await.map(drop).unwrap_err();
        assert_eq!(refused.status.as_u16(), 413);
        assert_eq!(budget.0.available_permits(), BODIES_BYTES_MAX as usize);
    }
}

//! Open-loop traffic: requests come when chance says so, whatever became of those before them, each on a connection of its
//! own, so that every ready pod gets its share.
//!
//! In: how to connect, a request that streams, a mean rate that may change at any time. Out: for every
//! request when it came and how long its first piece took. Never retries.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

use crate::http::Connection;
use crate::over::Over;

/// Requests in flight beyond which a machine of two cores would measure its own threads.
const IN_FLIGHT_MAX: usize = 400;
/// The dispatcher looks at the rate at least this often.
const GAP_MAX: Duration = Duration::from_millis(200);

/// Requests per second that are to come, and what became of those that came.
pub struct Traffic {
    /// Thousandths of a request per second.
    rate: AtomicU64,
    began: Instant,
    told: Mutex<Vec<Arrival>>,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Since the traffic began.
    pub at: Duration,
    /// To the first piece of the answer; why there is none.
    pub first_piece: Result<Duration, String>,
}

impl Traffic {
    /// Requests per second from now on.
    pub fn set(&self, requests_per_second: f64) {
        self.rate.store((requests_per_second * 1000.0) as u64, Ordering::Relaxed);
    }

    /// Requests per second as set last.
    pub fn rate(&self) -> f64 {
        self.rate.load(Ordering::Relaxed) as f64 / 1000.0
    }

    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Requests that were answered or lost so far.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.told.lock().expect("no one panics here").clone()
    }

    /// Why requests were lost.
    pub fn lost(&self) -> Vec<String> {
        self.arrivals().into_iter().filter_map(|arrival| arrival.first_piece.err()).collect()
    }
}

/// Sends `body` to `path` at the rate that `story` sets, from none at first, until it returns and every answer has come.
pub fn with_traffic<T>(
    connect: &(dyn Fn() -> Result<Connection> + Sync),
    path: &str,
    body: &Value,
    story: impl FnOnce(&Traffic) -> T,
) -> T {
    let traffic =
        Traffic { rate: AtomicU64::new(0), began: Instant::now(), told: Mutex::default() };
    let over = AtomicBool::new(false);
    let in_flight = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut chance = 0x5EED_u64;
            let mut due = Instant::now();
            while !over.load(Ordering::Relaxed) {
                let rate = traffic.rate();
                let now = Instant::now();
                if rate <= 0.0 || due > now + GAP_MAX {
                    std::thread::sleep(
                        GAP_MAX.min(due.saturating_duration_since(now).max(GAP_MAX / 20)),
                    );
                    due = if rate <= 0.0 { Instant::now() } else { due };
                    continue;
                }
                std::thread::sleep(due.saturating_duration_since(now));
                due += gap(&mut chance, rate);
                if in_flight.load(Ordering::Relaxed) >= IN_FLIGHT_MAX {
                    continue;
                }
                in_flight.fetch_add(1, Ordering::Relaxed);
                scope.spawn(|| {
                    let (at, began) = (traffic.began.elapsed(), Instant::now());
                    let first_piece =
                        once(connect, path, body, began).map_err(|error| format!("{error:#}"));
                    let arrival = Arrival { at, first_piece };
                    traffic.told.lock().expect("no one panics here").push(arrival);
                    in_flight.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        let _over = Over(&over);
        story(&traffic)
    })
}

/// Time to the next request: exponential, from a generator that repeats (SplitMix64).
fn gap(chance: &mut u64, rate: f64) -> Duration {
    *chance = chance.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *chance;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^= mixed >> 31;
    let share = (mixed >> 11) as f64 / (1u64 << 53) as f64;
    Duration::from_secs_f64(-(1.0 - share).ln() / rate)
}

fn once(
    connect: &(dyn Fn() -> Result<Connection> + Sync),
    path: &str,
    body: &Value,
    began: Instant,
) -> Result<Duration> {
    let mut first = None;
    let answer = connect()?.request("POST", path, Some(body), &mut |_| {
        first.get_or_insert_with(|| began.elapsed());
    })?;
    if answer.status != 200 {
        bail!("status {}: {}", answer.status, answer.text());
    }
    answer.events()?;
    match first {
        Some(first) => Ok(first),
        None => bail!("an answer without a piece"),
    }
}

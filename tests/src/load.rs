//! Constant load from pooled keep-alive clients, counting every request that is lost.
//!
//! In: how to connect, and a request. Out: how many were answered, and each failure in words. Never
//! retries: a client that was told `Connection: close` opens another connection, as pools do.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::http::Connection;
use crate::over::Over;

/// A client that lost a request waits, so that an outage is not counted by how fast refusals come.
const AFTER_LOSS: Duration = Duration::from_millis(100);

/// What became of the requests.
#[derive(Debug, Default)]
pub struct Outcome {
    pub answered: u64,
    /// Connections that the server asked to leave.
    pub closed: u64,
    /// Every request that brought no whole answer, or none of status 200.
    pub lost: Vec<String>,
}

/// Runs `clients` clients that post `body` to `path` one after the other, until `story` returns.
pub fn under_load<T>(
    clients: usize,
    connect: &(dyn Fn() -> Result<Connection> + Sync),
    path: &str,
    body: &Value,
    story: impl FnOnce() -> T,
) -> (Outcome, T) {
    let (answered, closed) = (AtomicU64::new(0), AtomicU64::new(0));
    let lost = Mutex::new(Vec::new());
    let over = AtomicBool::new(false);
    let told = std::thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let mut pooled = None;
                while !over.load(Ordering::Relaxed) {
                    match once(&mut pooled, connect, path, body) {
                        Ok(true) => answered.fetch_add(1, Ordering::Relaxed),
                        Ok(false) => {
                            closed.fetch_add(1, Ordering::Relaxed);
                            answered.fetch_add(1, Ordering::Relaxed)
                        }
                        Err(error) => {
                            lost.lock().expect("no one panics here").push(format!("{error:#}"));
                            pooled = None;
                            std::thread::sleep(AFTER_LOSS);
                            0
                        }
                    };
                }
            });
        }
        let _over = Over(&over);
        story()
    });
    let lost = lost.into_inner().expect("no one panics here");
    let outcome = Outcome { answered: answered.into_inner(), closed: closed.into_inner(), lost };
    (outcome, told)
}

/// One request over the pooled connection; whether it stays in the pool.
fn once(
    pooled: &mut Option<Connection>,
    connect: &(dyn Fn() -> Result<Connection> + Sync),
    path: &str,
    body: &Value,
) -> Result<bool> {
    let mut connection = match pooled.take() {
        Some(connection) => connection,
        None => connect()?,
    };
    let answer = connection.post(path, body)?;
    if answer.status != 200 {
        bail!("status {}: {}", answer.status, answer.text());
    }
    let stays = connection.is_open();
    if stays {
        *pooled = Some(connection);
    }
    Ok(stays)
}

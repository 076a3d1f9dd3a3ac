//! Places for connections. Enters: newcomers, and what each connection is doing. Leaves: a seat, if need be that of the
//! one who has asked for nothing for the longest. Never here: sockets, HTTP.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

/// Time for one who was asked to leave to do so; only a request that arrives in this very moment lets it stay.
const LEAVING_TIME_MAX: Duration = Duration::from_millis(50);

/// What a connection is doing, and since when.
#[derive(Clone, Copy, Debug)]
pub enum Phase {
    Idle(Instant),
    Head(Instant),
    /// A request is in its handler or its answer is being sent.
    Busy,
    /// It was idle, and its seat is wanted.
    Leaving(Instant),
}

#[derive(Clone, Copy, Debug)]
pub struct Activity {
    pub phase: Phase,
    /// Since when the client takes nothing of what waits to be written, if so.
    pub unread_since: Option<Instant>,
    /// By when an answer that left as a whole is taken.
    pub taken_by: Option<Instant>,
}

pub type Activities = Arc<watch::Sender<Activity>>;

#[derive(Default)]
struct Taken {
    next: u64,
    seats: BTreeMap<u64, Activities>,
}

/// A fixed number of seats.
pub struct Seats {
    count: usize,
    free: Arc<Semaphore>,
    taken: Arc<Mutex<Taken>>,
}

/// Free again when dropped.
pub struct Seat {
    pub activities: Activities,
    number: u64,
    taken: Arc<Mutex<Taken>>,
    _permit: OwnedSemaphorePermit,
}

impl Seats {
    pub fn new(count: usize) -> Seats {
        Seats { count, free: Arc::new(Semaphore::new(count)), taken: Arc::default() }
    }

    pub fn take(&self) -> Option<Seat> {
        Some(self.sit(self.free.clone().try_acquire_owned().ok()?))
    }

    /// A free seat, or that of the connection that has been idle for the longest, and for `idle_time_min` at least.
    pub async fn take_or_vacate(&self, idle_time_min: Duration) -> Option<Seat> {
        if let Some(seat) = self.take() {
            return Some(seat);
        }
        if !self.vacate(idle_time_min) {
            return None;
        }
        let permit = self.free.clone().acquire_owned();
        let permit = tokio::time::timeout(LEAVING_TIME_MAX, permit).await.ok()?;
        Some(self.sit(permit.expect("the semaphore is never closed")))
    }

    /// Returns when all are free.
    pub async fn all_free(&self) {
        let count = u32::try_from(self.count).expect("limits are small");
        drop(self.free.acquire_many(count).await);
    }

    fn sit(&self, permit: OwnedSemaphorePermit) -> Seat {
        let begin =
            Activity { phase: Phase::Idle(Instant::now()), unread_since: None, taken_by: None };
        let activities: Activities = Arc::new(watch::channel(begin).0);
        let mut taken = lock(&self.taken);
        let number = taken.next;
        taken.next += 1;
        taken.seats.insert(number, activities.clone());
        Seat { activities, number, taken: self.taken.clone(), _permit: permit }
    }

    /// Asks the one who idles longest to leave; false where nobody idles that long.
    fn vacate(&self, idle_time_min: Duration) -> bool {
        let now = Instant::now();
        let taken = lock(&self.taken);
        let idle = taken.seats.values().filter_map(|activities| {
            let activity = *activities.borrow();
            match activity {
                Activity { phase: Phase::Idle(since), unread_since: None, .. } => {
                    Some((since, activities))
                }
                _ => None,
            }
        });
        let longest = idle.min_by_key(|(since, _)| *since);
        let longest = longest.filter(|(since, _)| now.duration_since(*since) >= idle_time_min);
        longest.is_some_and(|(_, activities)| {
            activities.send_if_modified(|activity| {
                let still_idle = matches!(activity.phase, Phase::Idle(_));
                if still_idle {
                    activity.phase = Phase::Leaving(now);
                }
                still_idle
            })
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.taken).seats.remove(&self.number);
    }
}

fn lock(taken: &Mutex<Taken>) -> MutexGuard<'_, Taken> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_one_who_idles_longest_leaves_and_nobody_who_is_busy_or_came_just_now() {
        let seats = Seats::new(3);
        let busy = seats.take().unwrap();
        busy.activities.send_modify(|activity| activity.phase = Phase::Busy);
        let oldest = seats.take().unwrap();
        let younger = seats.take().unwrap();
        let minute = Duration::from_secs(60);
        assert!(seats.take_or_vacate(minute).await.is_none(), "nobody idles for a minute yet");
        let mut told = oldest.activities.subscribe();
        let leave = tokio::spawn(async move {
            told.changed().await.unwrap();
            drop(oldest);
        });
        let newcomer = seats.take_or_vacate(Duration::ZERO).await;
        leave.await.unwrap();
        assert!(newcomer.is_some());
        assert!(matches!(younger.activities.borrow().phase, Phase::Idle(_)));
        assert!(matches!(busy.activities.borrow().phase, Phase::Busy));
        drop((newcomer, younger, busy));
        seats.all_free().await;
        assert!(lock(&seats.taken).seats.is_empty());
    }
}

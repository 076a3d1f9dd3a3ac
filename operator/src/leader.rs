//! In: a Lease. Out: the right to write, until it is lost. Of several operators one holds the Lease; the others wait.
//! Never here: anything about models. Losing the Lease ends the process, because another may already be writing.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tokio::time::{sleep, timeout};

/// A holder that was silent for this long has lost it.
const LEASE_SECONDS: i32 = 15;
/// A holder that could not renew for this long stops before others may start.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RENEW_EVERY: Duration = Duration::from_secs(5);
const RETRY_EVERY: Duration = Duration::from_secs(2);

/// The Lease in our hands.
pub struct Leader {
    api: Api<Lease>,
    name: String,
    identity: String,
    /// As the API server answered last; its resource version makes every write conditional.
    lease: Lease,
}

/// Waits until the Lease is ours. Every operator of one installation asks for the same `name`.
pub async fn acquire(api: Api<Lease>, name: &str, identity: &str) -> Leader {
    let mut watched = Watched::default();
    let mut told = false;
    loop {
        match try_acquire(&api, name, identity, &mut watched).await {
            Ok(Some(lease)) => {
                tracing::info!(identity, lease = name, "leading");
                return Leader { api, name: name.to_owned(), identity: identity.to_owned(), lease };
            }
            Ok(None) if !std::mem::replace(&mut told, true) => {
                tracing::info!(identity, lease = name, "waiting: another operator holds the Lease");
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "cannot ask for the Lease"),
        }
        sleep(RETRY_EVERY).await;
    }
}

impl Leader {
    /// Renews until that fails; returns why.
    pub async fn hold(&mut self) -> String {
        let mut renewed_at = Instant::now();
        loop {
            let pause = if renewed_at.elapsed() < RENEW_EVERY { RENEW_EVERY } else { RETRY_EVERY };
            sleep(pause).await;
            // An API server that does not answer must not keep us believing.
            let left = RENEW_DEADLINE.saturating_sub(renewed_at.elapsed());
            match timeout(left, self.renew()).await {
                Ok(Ok(true)) => renewed_at = Instant::now(),
                Ok(Ok(false)) => return "another holds the Lease".to_owned(),
                Ok(Err(error)) => tracing::warn!(%error, "cannot renew the Lease"),
                Err(_) => tracing::warn!("the API server does not answer"),
            }
            if renewed_at.elapsed() >= RENEW_DEADLINE {
                return format!("the Lease was not renewed for {} s", RENEW_DEADLINE.as_secs());
            }
        }
    }

    /// False where another holds it. A conflict over a Lease that is still ours costs one more round.
    async fn renew(&mut self) -> Result<bool, kube::Error> {
        for _ in 0..2 {
            let wanted = held(self.lease.clone(), &self.identity, false);
            match self.api.replace(&self.name, &PostParams::default(), &wanted).await {
                Ok(lease) => {
                    self.lease = lease;
                    return Ok(true);
                }
                Err(error) if is_conflict(&error) => self.lease = self.api.get(&self.name).await?,
                Err(error) => return Err(error),
            }
            if holder(&self.lease) != Some(self.identity.as_str()) {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Gives the Lease back, so that the next operator need not wait for it to run out.
    pub async fn release(self) {
        let mut free = self.lease;
        if let Some(spec) = &mut free.spec {
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
        }
        match self.api.replace(&self.name, &PostParams::default(), &free).await {
            Ok(_) => tracing::info!("released the Lease"),
            Err(error) => tracing::warn!(%error, "cannot release the Lease"),
        }
    }
}

/// What a waiting operator saw, with its own clock: clocks of different machines are never compared.
#[derive(Default)]
struct Watched {
    version: Option<String>,
    since: Option<Instant>,
}

async fn try_acquire(
    api: &Api<Lease>,
    name: &str,
    identity: &str,
    watched: &mut Watched,
) -> Result<Option<Lease>, kube::Error> {
    let Some(lease) = api.get_opt(name).await? else {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..Default::default() };
        let wanted = held(Lease { metadata, spec: None }, identity, true);
        return won(api.create(&PostParams::default(), &wanted).await);
    };
    if watched.version != lease.metadata.resource_version {
        watched.version.clone_from(&lease.metadata.resource_version);
        watched.since = Some(Instant::now());
    }
    let silent = watched.since.map_or(Duration::ZERO, |since| since.elapsed());
    if !may_take(lease.spec.as_ref(), identity, silent) {
        return Ok(None);
    }
    let wanted = held(lease, identity, true);
    won(api.replace(name, &PostParams::default(), &wanted).await)
}

/// A Lease is free when nobody holds it, when we already do, or when its holder was silent for its whole duration.
fn may_take(spec: Option<&LeaseSpec>, identity: &str, silent: Duration) -> bool {
    let Some(spec) = spec else { return true };
    let duration = spec.lease_duration_seconds.unwrap_or(LEASE_SECONDS).max(1);
    match spec.holder_identity.as_deref() {
        None | Some("") => true,
        Some(holder) => holder == identity || silent.as_secs() >= duration.unsigned_abs().into(),
    }
}

/// The Lease as we want it to stand.
fn held(mut lease: Lease, identity: &str, taking: bool) -> Lease {
    let now = MicroTime(Timestamp::now());
    let spec = lease.spec.get_or_insert_default();
    if taking && spec.holder_identity.as_deref() != Some(identity) {
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
        spec.acquire_time = Some(now.clone());
    }
    spec.holder_identity = Some(identity.to_owned());
    spec.lease_duration_seconds = Some(LEASE_SECONDS);
    spec.renew_time = Some(now);
    lease
}

/// Losing a race is no error.
fn won(written: Result<Lease, kube::Error>) -> Result<Option<Lease>, kube::Error> {
    match written {
        Ok(lease) => Ok(Some(lease)),
        Err(error) if is_conflict(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref()
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(holder: Option<&str>) -> LeaseSpec {
        LeaseSpec {
            holder_identity: holder.map(str::to_owned),
            lease_duration_seconds: Some(15),
            ..Default::default()
        }
    }

    #[test]
    fn a_lease_is_taken_only_when_free_ours_or_silent_too_long() {
        let just = Duration::from_secs(14);
        let long = Duration::from_secs(15);
        assert!(may_take(None, "a", Duration::ZERO));
        assert!(may_take(Some(&spec(None)), "a", Duration::ZERO));
        assert!(may_take(Some(&spec(Some("a"))), "a", Duration::ZERO));
        assert!(!may_take(Some(&spec(Some("b"))), "a", just));
        assert!(may_take(Some(&spec(Some("b"))), "a", long));
    }

    #[test]
    fn taking_counts_a_transition_and_renewing_does_not() {
        let taken = held(Lease::default(), "a", true);
        let renewed = held(taken.clone(), "a", false);
        let stolen = held(renewed.clone(), "b", true);
        let transitions =
            |lease: &Lease| lease.spec.as_ref().and_then(|spec| spec.lease_transitions);
        assert_eq!([&taken, &renewed, &stolen].map(transitions), [Some(1), Some(1), Some(2)]);
    }
}

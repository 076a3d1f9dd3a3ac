//! API keys. Enters: a file with one key per line and a request's header. Leaves: the request, or a 401. A changed file
//! counts from the next request on, so that keys are withdrawn without a restart. Keys are kept as digests only.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use plimsoll_contract::exit::{ExitReason, ExitReport};
use sha2::{Digest, Sha256};

use crate::http::errors::ApiError;
use crate::http::state::App;

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("failed to read the API keys in {}: {source}; write one per line", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// Every request would be refused, or, read differently, none.
    #[error("{} holds no API key; write one per line", .0.display())]
    Empty(PathBuf),
}

impl KeysError {
    /// Whoever wrote the file, or forgot to, must act.
    pub fn report(&self) -> ExitReport {
        ExitReport::new(ExitReason::ApiKeysUnusable, self.to_string())
    }
}

pub struct ApiKeys {
    path: PathBuf,
    known: Mutex<Known>,
}

struct Known {
    /// When the file was written and how long it is; a change means to read again.
    version: (SystemTime, u64),
    digests: HashSet<[u8; 32]>,
}

impl ApiKeys {
    pub fn open(path: &Path) -> Result<ApiKeys, KeysError> {
        let known = read(path)?;
        Ok(ApiKeys { path: path.to_owned(), known: Mutex::new(known) })
    }

    /// Whether the value of an Authorization header carries a key.
    pub fn admit(&self, authorization: Option<&str>) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if version(&self.path).is_ok_and(|version| version != known.version) {
            match read(&self.path) {
                Ok(fresh) => *known = fresh,
                Err(error) => tracing::warn!(%error, "the API keys changed; the old ones stay"),
            }
        }
        let key = authorization.and_then(|value| value.split_once(' '));
        key.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .is_some_and(|(_, key)| known.digests.contains(&digest(key.trim())))
    }
}

fn read(path: &Path) -> Result<Known, KeysError> {
    let unreadable = |source| KeysError::Unreadable { path: path.to_owned(), source };
    let version = version(path).map_err(unreadable)?;
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let digests: HashSet<_> = keys(&text).map(digest).collect();
    if digests.is_empty() {
        return Err(KeysError::Empty(path.to_owned()));
    }
    Ok(Known { version, digests })
}

fn keys(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|key| !key.is_empty())
}

/// The first key of such a file, for a client of ours.
pub fn first_key(path: &Path) -> Result<String, KeysError> {
    let unreadable = |source| KeysError::Unreadable { path: path.to_owned(), source };
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    keys(&text).next().map(str::to_owned).ok_or_else(|| KeysError::Empty(path.to_owned()))
}

fn version(path: &Path) -> std::io::Result<(SystemTime, u64)> {
    let metadata = std::fs::metadata(path)?;
    Ok((metadata.modified()?, metadata.len()))
}

/// Compared instead of keys, so that the time of a comparison says nothing about them.
fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

pub async fn require_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION);
    let admitted = app
        .keys
        .as_ref()
        .is_none_or(|keys| keys.admit(authorization.and_then(|value| value.to_str().ok())));
    if admitted { next.run(request).await } else { ApiError::unauthorized().into_response() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_withdrawn_key_is_refused_without_a_restart() {
        let path = std::env::temp_dir().join(format!("plimsoll-keys-{}", std::process::id()));
        std::fs::write(&path, "first\n\n  second \n").unwrap();
        let keys = ApiKeys::open(&path).unwrap();
        assert!(keys.admit(Some("Bearer first")));
        assert!(keys.admit(Some("bearer second")));
        assert!(!keys.admit(Some("Basic first")));
        assert!(!keys.admit(Some("Bearer ")));
        assert!(!keys.admit(None));
        std::fs::write(&path, "third\n").unwrap();
        assert!(!keys.admit(Some("Bearer first")));
        assert!(keys.admit(Some("Bearer third")));
        // An emptied file withdraws nothing by accident.
        std::fs::write(&path, "\n").unwrap();
        assert!(keys.admit(Some("Bearer third")));
        assert!(matches!(ApiKeys::open(&path), Err(KeysError::Empty(_))));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_without_keys_ends_the_process_with_a_reason_that_a_person_can_mend() {
        let dir = std::env::temp_dir().join(format!("plimsoll-no-keys-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (empty, binary) = (dir.join("empty"), dir.join("binary"));
        std::fs::write(&empty, " \n\n").unwrap();
        std::fs::write(&binary, [0xff, 0xfe, 0x00]).unwrap();
        // A directory is what a forgotten mount leaves behind.
        for path in [&empty, &binary, &dir, &dir.join("missing")] {
            let report = ApiKeys::open(path).map(drop).unwrap_err().report();
            assert_eq!(report.reason, ExitReason::ApiKeysUnusable);
            assert!(report.reason.needs_a_person());
            assert!(report.message.contains(path.to_str().unwrap()), "{}", report.message);
            assert!(report.message.contains("one per line"), "{}", report.message);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

//! A model hub on the node's network, with the HTTP interface that hub clients speak.
//!
//! In: repositories, each a name, a commit and a folder of files. Out: revision lookups and files with
//! lengths, ranges, tags and commit headers. Never anything outside the folders.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};

use anyhow::{Context, Result};
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::json;
use sha2::{Digest, Sha256};

/// One repository.
pub struct Repository {
    /// `ORG/NAME`.
    pub name: String,
    /// The commit that `main` stands for.
    pub commit: String,
    /// If set, every request must carry it as a bearer token.
    pub token: Option<String>,
    files: BTreeMap<String, Vec<u8>>,
}

/// All repositories, and what was asked of them.
pub struct Hub {
    repositories: Vec<Repository>,
    requests: Mutex<Vec<String>>,
    /// By `ORG/NAME/FILE`.
    sent: Mutex<BTreeMap<String, u64>>,
}

impl Repository {
    /// Holds the files of a folder, not of its subfolders.
    pub fn of_folder(name: &str, commit: &str, folder: &Path) -> Result<Repository> {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(folder).with_context(|| format!("{}", folder.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let name = entry.file_name().to_string_lossy().into_owned();
                files.insert(name, std::fs::read(entry.path())?);
            }
        }
        let (name, commit) = (name.into(), commit.into());
        Ok(Repository { name, commit, token: None, files })
    }
}

impl Hub {
    pub fn of(repositories: Vec<Repository>) -> Hub {
        Hub { repositories, requests: Mutex::default(), sent: Mutex::default() }
    }

    /// `METHOD path` of every request so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no one panics while noting").clone()
    }

    /// Bytes of a file in all answers so far.
    pub fn bytes_sent(&self, repository: &str, file: &str) -> u64 {
        let sent = self.sent.lock().expect("no one panics while noting");
        sent.get(&format!("{repository}/{file}")).copied().unwrap_or(0)
    }

    fn note_sent(&self, repository: &str, path: &str, answer: &Response) {
        let length = answer.headers().get(header::CONTENT_LENGTH);
        let bytes: u64 = length.and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0);
        let file = path.rsplit('/').next().unwrap_or_default();
        let mut sent = self.sent.lock().expect("no one panics while noting");
        *sent.entry(format!("{repository}/{file}")).or_default() += bytes;
    }
}

/// Serves the repositories at `address`, in the network of the calling thread, for as long as the
/// process lives.
pub fn serve(hub: Arc<Hub>, address: SocketAddr) -> Result<()> {
    // The listener is made here, because threads of a runtime would make it in another network.
    let listener = std::net::TcpListener::bind(address).context("the hub's address")?;
    listener.set_nonblocking(true)?;
    let (started, is_started) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime of one thread can be built");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)
                .expect("the listener is bound and does not block");
            started.send(()).ok();
            let router = Router::new().fallback(answer).with_state(hub);
            axum::serve(listener, router).await
        })
    });
    is_started.recv().context("the hub did not start")
}

async fn answer(
    State(hub): State<Arc<Hub>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let path = uri.path();
    hub.requests.lock().expect("no one panics while noting").push(format!("{method} {path}"));
    for repository in &hub.repositories {
        let Repository { name, token, .. } = repository;
        let about = path.strip_prefix(&format!("/api/models/{name}"));
        let file = path.strip_prefix(&format!("/{name}/resolve/"));
        if about.is_none() && file.is_none() {
            continue;
        }
        if token.as_ref().is_some_and(|token| !carries(&headers, token)) {
            let body = Json(json!({"error": "Access to this model is restricted"}));
            return (StatusCode::UNAUTHORIZED, [("x-error-code", "GatedRepo")], body)
                .into_response();
        }
        return match (about, file) {
            (Some(rest), _) => {
                listing(repository, rest.strip_prefix("/revision/").unwrap_or("main"))
            }
            (None, rest) => {
                let answer = resolve(repository, rest.unwrap_or_default(), &headers);
                if method != Method::HEAD {
                    hub.note_sent(name, path, &answer);
                }
                answer
            }
        };
    }
    missing("RepoNotFound")
}

fn carries(headers: &HeaderMap, token: &str) -> bool {
    let sent = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    sent == Some(&format!("Bearer {token}"))
}

fn missing(code: &str) -> Response {
    (StatusCode::NOT_FOUND, [("x-error-code", code)], Json(json!({"error": code}))).into_response()
}

fn listing(repository: &Repository, revision: &str) -> Response {
    let Repository { name, commit, files, .. } = repository;
    if revision != "main" && revision != commit {
        return missing("RevisionNotFound");
    }
    let siblings: Vec<_> = files.keys().map(|file| json!({"rfilename": file})).collect();
    Json(json!({"id": name, "modelId": name, "sha": commit, "siblings": siblings})).into_response()
}

/// `REVISION/FILE`.
fn resolve(repository: &Repository, rest: &str, headers: &HeaderMap) -> Response {
    let Repository { commit, files, .. } = repository;
    match rest.split_once('/') {
        Some((revision, file)) if revision == "main" || revision == commit => match files.get(file)
        {
            Some(bytes) => send(commit, bytes, headers),
            None => missing("EntryNotFound"),
        },
        _ => missing("RevisionNotFound"),
    }
}

/// A file or the asked range of it; hyper leaves the body out where the method is HEAD.
fn send(commit: &str, bytes: &[u8], headers: &HeaderMap) -> Response {
    let digest = Sha256::digest(bytes);
    let tag: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    let response = Response::builder()
        .header("x-repo-commit", commit)
        .header(header::ETAG, format!("\"{tag}\""))
        .header(header::ACCEPT_RANGES, "bytes");
    let built = match range.and_then(|range| wanted(range, bytes.len())) {
        Some((first, last)) => response
            .status(StatusCode::PARTIAL_CONTENT)
            .header(header::CONTENT_RANGE, format!("bytes {first}-{last}/{}", bytes.len()))
            .header(header::CONTENT_LENGTH, last - first + 1)
            .body(Body::from(bytes[first..=last].to_vec())),
        None => {
            response.header(header::CONTENT_LENGTH, bytes.len()).body(Body::from(bytes.to_vec()))
        }
    };
    built.expect("every header is valid")
}

/// First and last byte of `bytes=A-B` or `bytes=A-`; `None` means the whole file.
fn wanted(range: &str, length: usize) -> Option<(usize, usize)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let first: usize = first.parse().ok()?;
    let last = if last.is_empty() { length } else { last.parse::<usize>().ok()? + 1 };
    let last = last.min(length);
    (first < last).then(|| (first, last - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_inclusive_and_end_with_the_file() {
        assert_eq!(wanted("bytes=0-0", 10), Some((0, 0)));
        assert_eq!(wanted("bytes=4-", 10), Some((4, 9)));
        assert_eq!(wanted("bytes=4-99", 10), Some((4, 9)));
        assert_eq!(wanted("bytes=10-", 10), None);
        assert_eq!(wanted("lines=1-2", 10), None);
    }
}

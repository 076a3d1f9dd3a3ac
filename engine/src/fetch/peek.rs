//! What a checkpoint on a hub is, without its tensors. Enters: a hub and an address. Leaves: facts. Between them lies a
//! directory with every file that serving needs, but of weights the header alone, in a file of the right length with holes
//! in place of the tensors. Never here: a tensor, or such a directory in anybody's reach.

use std::fs::{self, File};
use std::io::{Error, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use hf_hub::api::sync::ApiError;
use plimsoll_contract::facts::ModelFacts;
use ureq::{Agent, RedirectAuthHeaders, Response};

use super::{Failed, Hub, HubSource, PARTS, Pinned, download, is_weights, unwritable, write_whole};
use crate::model::{Checkpoint, LoadError, REVISION_FILE};

/// What is asked for first. The headers of most files are shorter: a tensor takes some 100 bytes.
const FIRST_BYTES: u64 = 256 << 10;
/// The format allows no longer header.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// In front of the header stands its length.
const LENGTH_BYTES: usize = 8;

/// Facts of the model, its commit among them. `progress` hears each file's name before it is asked for.
pub fn facts(
    source: &HubSource,
    hub: &Hub,
    progress: &mut dyn FnMut(&str),
) -> Result<ModelFacts, LoadError> {
    let scratch = Scratch::new()?;
    peek(source, &scratch.0, hub, progress)?;
    Ok(Checkpoint::open(&scratch.0)?.facts().clone())
}

/// A directory of this process, gone with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Scratch, LoadError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("plimsoll-peek-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).map_err(|e| unwritable(&path, e))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is small, and the system clears such directories.
        fs::remove_dir_all(&self.0).ok();
    }
}

/// Fills an empty directory.
pub(super) fn peek(
    source: &HubSource,
    into: &Path,
    hub: &Hub,
    progress: &mut dyn FnMut(&str),
) -> Result<(), LoadError> {
    let parts = into.join(PARTS);
    let pinned = Pinned::find(source, hub, &parts)?;
    // A hub may send us elsewhere for large files; the token stays with the hub.
    let agent = ureq::builder()
        .try_proxy_from_env(true)
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .build();
    for file in &pinned.files {
        progress(file);
        let done = if is_weights(file) {
            let url = pinned.repository.url(file);
            header(&agent, &url, hub).and_then(|start| start.write(&into.join(file)))
        } else {
            download(&pinned.repository, file, into)
        };
        done.map_err(|e| e.of(source, file, into))?;
    }
    write_whole(&into.join(REVISION_FILE), &pinned.commit)?;
    fs::remove_dir_all(&parts).map_err(|e| unwritable(&parts, e))
}

/// The first bytes of a file, and how many there are.
struct Start {
    bytes: Vec<u8>,
    file_bytes: u64,
}

impl Start {
    fn write(&self, path: &Path) -> Result<(), Failed> {
        let write = || -> std::io::Result<()> {
            let mut file = File::create(path)?;
            file.write_all(&self.bytes)?;
            file.set_len(self.file_bytes)
        };
        write().map_err(Failed::Disk)
    }

    /// Bytes up to the header's end, as its first ones tell; None where they tell what cannot be, which whoever reads
    /// the file will say.
    fn header_end(&self) -> Option<u64> {
        let length = u64::from_le_bytes(*self.bytes.first_chunk::<LENGTH_BYTES>()?);
        (length <= HEADER_BYTES_MAX).then(|| length + LENGTH_BYTES as u64)
    }
}

/// The start of a weights file, its whole header at least.
fn header(agent: &Agent, url: &str, hub: &Hub) -> Result<Start, Failed> {
    let start = request(agent, url, hub, FIRST_BYTES)?;
    match start.header_end() {
        Some(end) if end > FIRST_BYTES => request(agent, url, hub, end),
        _ => Ok(start),
    }
}

/// The first `bytes_max` bytes, whether or not the hub knows ranges.
fn request(agent: &Agent, url: &str, hub: &Hub, bytes_max: u64) -> Result<Start, Failed> {
    let mut request = agent.get(url).set("Range", &format!("bytes=0-{}", bytes_max - 1));
    if let Some(token) = &hub.token {
        request = request.set("Authorization", &format!("Bearer {token}"));
    }
    let response = request.call().map_err(|e| Failed::Hub(Box::new(e).into()))?;
    let unreadable = |e: Error| Failed::Hub(ApiError::IoError(e));
    let file_bytes = file_bytes(&response)
        .ok_or_else(|| unreadable(Error::other("the hub does not say how long the file is")))?;
    let mut bytes = Vec::new();
    response.into_reader().take(bytes_max).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(Start { bytes, file_bytes })
}

/// `Content-Range: bytes 0-9/12345`, or the length of a body that is the file.
fn file_bytes(response: &Response) -> Option<u64> {
    let text = match response.status() {
        206 => response.header("Content-Range")?.rsplit_once('/')?.1,
        _ => response.header("Content-Length")?,
    };
    text.trim().parse().ok()
}

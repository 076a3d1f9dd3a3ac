//! `fetch`: a model from a hub into a directory, by commit. Enters: `hf://ORG/NAME[@REVISION]` and a directory. Leaves:
//! the files that serving needs, and last the commit they are of, so that a directory with a commit is whole. Safe to
//! repeat: what is there of the same commit is kept, an interrupted download goes on. Never here: weights in memory.
//! What a checkpoint is, without its tensors, `peek` tells.

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Repo, RepoType};

use crate::model::{LoadError, REVISION_FILE};

pub mod peek;

/// Unfinished downloads, within the target directory so that finished ones only need a new name.
const PARTS: &str = ".plimsoll-parts";
/// Files of one model; the largest known has a few hundred.
const FILES_MAX: usize = 4096;
const RETRIES: usize = 5;

/// `hf://ORG/NAME[@REVISION]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSource {
    pub repository: String,
    /// A branch, tag or commit; `main` unless given.
    pub revision: String,
}

impl HubSource {
    pub fn parse(source: &str) -> Result<HubSource, LoadError> {
        let wrong = || LoadError::ModelNotFound {
            source_name: source.into(),
            problem: "this is not a model on a hub".into(),
            remedy: "write hf://ORG/NAME or hf://ORG/NAME@REVISION".into(),
        };
        let rest = source.strip_prefix("hf://").ok_or_else(wrong)?;
        let (repository, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let parts: Vec<&str> = repository.split('/').collect();
        let plain = |part: &&str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let revision_plain = !revision.is_empty() && !revision.contains(char::is_whitespace);
        if parts.len() != 2 || !parts.iter().all(plain) || !revision_plain {
            return Err(wrong());
        }
        Ok(HubSource { repository: repository.into(), revision: revision.into() })
    }
}

/// Which hub, and who asks.
pub struct Hub {
    pub endpoint: String,
    /// An access token.
    pub token: Option<String>,
}

/// Downloads what is missing and returns the commit. `progress` hears each file's name before it is downloaded.
pub fn fetch(
    source: &HubSource,
    into: &Path,
    hub: &Hub,
    progress: &mut dyn FnMut(&str),
) -> Result<String, LoadError> {
    let parts = into.join(PARTS);
    let pinned = Pinned::find(source, hub, &parts)?;
    begin(into, &pinned.commit, &pinned.files)?;
    for file in &pinned.files {
        if !into.join(file).is_file() {
            progress(file);
            download(&pinned.repository, file, into).map_err(|e| e.of(source, file, into))?;
        }
    }
    write_whole(&into.join(REVISION_FILE), &pinned.commit)?;
    fs::remove_dir_all(&parts).map_err(|e| unwritable(&parts, e))?;
    Ok(pinned.commit)
}

/// A repository at the commit that the source stands for now.
struct Pinned {
    commit: String,
    /// What serving needs of it; weights are among them.
    files: Vec<String>,
    repository: ApiRepo,
}

impl Pinned {
    /// Asks the hub; what it sends later passes through `parts`.
    fn find(source: &HubSource, hub: &Hub, parts: &Path) -> Result<Pinned, LoadError> {
        let failed = |what: &str, e: ApiError| refusal(source, what, e);
        fs::create_dir_all(parts).map_err(|e| unwritable(parts, e))?;
        let api = ApiBuilder::from_cache(hf_hub::Cache::new(parts.to_owned()))
            .with_endpoint(hub.endpoint.trim_end_matches('/').into())
            .with_token(hub.token.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .build()
            .map_err(|e| failed("the hub's address", e))?;
        let info = repository(&api, source, &source.revision)
            .info()
            .map_err(|e| failed("the repository", e))?;
        let commit = commit(source, &info.sha)?;
        let files = wanted(info.siblings.iter().map(|file| file.rfilename.as_str()));
        if files.len() > FILES_MAX || !files.iter().any(|file| is_weights(file)) {
            return Err(LoadError::ModelNotFound {
                source_name: source.repository.clone(),
                problem: format!(
                    "it holds {} files that serving needs, none of them weights or too many",
                    files.len()
                ),
                remedy: "choose a repository with *.safetensors".into(),
            });
        }
        let files = files.into_iter().map(str::to_owned).collect();
        Ok(Pinned { repository: repository(&api, source, &commit), commit, files })
    }
}

fn is_weights(file: &str) -> bool {
    file.ends_with(".safetensors")
}

fn repository(api: &Api, source: &HubSource, revision: &str) -> ApiRepo {
    api.repo(Repo::with_revision(source.repository.clone(), RepoType::Model, revision.into()))
}

/// The hub's word for the commit becomes part of paths and of facts, so it must look like one.
fn commit(source: &HubSource, sha: &str) -> Result<String, LoadError> {
    if sha.len() <= 64 && !sha.is_empty() && sha.chars().all(|c| c.is_ascii_hexdigit()) {
        return Ok(sha.into());
    }
    Err(LoadError::ModelNotFound {
        source_name: source.repository.clone(),
        problem: "the hub named no commit".into(),
        remedy: "check the hub's address".into(),
    })
}

/// What serving reads: configuration, weights, tokenizer and templates at the top of the repository.
fn wanted<'a>(files: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    files
        .filter(|file| !file.contains(['/', '\\']) && !file.starts_with('.'))
        .filter(|file| {
            [".json", ".safetensors", ".jinja"].iter().any(|end| file.ends_with(end))
                || file.starts_with("tokenizer.")
        })
        .collect()
}

/// Keeps what a former call downloaded of the same commit; what is of another one goes. In a directory that no call
/// has filled before, only files about to be replaced go: the others are somebody's.
fn begin(into: &Path, commit: &str, files: &[String]) -> Result<(), LoadError> {
    let started = into.join(PARTS).join("commit");
    let of = |path: &Path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let known = [of(&started), of(&into.join(REVISION_FILE))];
    if known.iter().all(|known| known != commit) {
        remove_if_there(&into.join(REVISION_FILE))?;
        let entries = fs::read_dir(into).map_err(|e| unwritable(into, e))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let ours = known.iter().any(|known| !known.is_empty());
        for name in wanted(names.collect::<Vec<_>>().iter().map(String::as_str)) {
            if ours || files.iter().any(|file| file == name) {
                remove_if_there(&into.join(name))?;
            }
        }
    }
    write_whole(&started, commit)
}

fn remove_if_there(path: &Path) -> Result<(), LoadError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(unwritable(path, e)),
        _ => Ok(()),
    }
}

enum Failed {
    Hub(ApiError),
    Disk(std::io::Error),
}

impl Failed {
    fn of(self, source: &HubSource, file: &str, into: &Path) -> LoadError {
        match self {
            Failed::Hub(e) => refusal(source, file, e),
            Failed::Disk(e) => unwritable(&into.join(file), e),
        }
    }
}

/// The file appears under its name only when it is whole.
fn download(repository: &ApiRepo, file: &str, into: &Path) -> Result<(), Failed> {
    let link = repository.download(file).map_err(Failed::Hub)?;
    let blob: PathBuf = link.canonicalize().map_err(Failed::Disk)?;
    fs::rename(blob, into.join(file)).map_err(Failed::Disk)
}

fn write_whole(path: &Path, text: &str) -> Result<(), LoadError> {
    let draft = path.with_extension("draft");
    fs::write(&draft, format!("{text}\n")).map_err(|e| unwritable(&draft, e))?;
    fs::rename(&draft, path).map_err(|e| unwritable(path, e))
}

fn unwritable(path: &Path, source: std::io::Error) -> LoadError {
    LoadError::Unreachable {
        source_name: path.display().to_string(),
        problem: source.to_string(),
        remedy: "make room or make the directory writable".into(),
    }
}

/// Tells a missing model and a closed one from a hub that does not answer, which a retry may mend.
fn refusal(source: &HubSource, what: &str, error: ApiError) -> LoadError {
    let source_name = format!("hf://{}@{}", source.repository, source.revision);
    let problem = format!("{what}: {error}");
    let status = match error {
        ApiError::RequestError(e) => e.into_response().map(|response| response.status()),
        _ => None,
    };
    match status {
        Some(401 | 403) => LoadError::ModelUnauthorized {
            source_name,
            problem,
            remedy: "give a token that may read the model, or check its name: a hub hides what it does not show".into(),
        },
        Some(404) => LoadError::ModelNotFound {
            source_name,
            problem,
            remedy: "check the name and the revision".into(),
        },
        _ => LoadError::Unreachable {
            source_name,
            problem,
            remedy: "check the network and HF_ENDPOINT, then try again: what is there is kept".into(),
        },
    }
}

#[cfg(test)]
mod tests;

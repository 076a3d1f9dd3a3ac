//! `spec.model.source`: text in, a typed source or the sentence that refuses it out. Pure.

use std::fmt;

use serde::Serialize;

const SOURCE_CHARACTERS_MAX: usize = 512;
const HUB_REVISION_DEFAULT: &str = "main";

/// Where a model lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Source {
    /// A repository of a model hub, at a branch, tag or commit.
    Hub { repo: String, revision: String },
    /// A folder in a PersistentVolumeClaim; the path has no slash at either end.
    Claim { name: String, path: String },
    /// An absolute folder of the machine.
    File { path: String },
}

impl fmt::Display for Source {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Hub { repo, revision } => write!(out, "hf://{repo}@{revision}"),
            Source::Claim { name, path } => write!(out, "pvc://{name}/{path}"),
            Source::File { path } => write!(out, "file://{path}"),
        }
    }
}

/// The same rules as the CEL of `spec.model.source`.
pub fn parse(text: &str) -> Result<Source, &'static str> {
    if text.len() > SOURCE_CHARACTERS_MAX {
        return Err("must have at most 512 characters");
    }
    if text.contains("..") {
        return Err("must not contain '..': name the folder directly");
    }
    if let Some(rest) = text.strip_prefix("hf://") {
        return hub(rest).ok_or(
            "an hf:// source is hf://ORG/NAME or hf://ORG/NAME@REVISION, for instance hf://Qwen/Qwen3-0.6B@main",
        );
    }
    if let Some(rest) = text.strip_prefix("pvc://") {
        return claim(rest).ok_or(
            "a pvc:// source is pvc://CLAIM or pvc://CLAIM/PATH, for instance pvc://models/llama-3.2-1b",
        );
    }
    if let Some(rest) = text.strip_prefix("file://") {
        return file(rest).ok_or(
            "a file:// source has an absolute path here, for instance file:///models/llama; a path relative to the manifest works in `plimsoll up` only",
        );
    }
    Err(
        "must start with hf:// (model hub), pvc:// (a PersistentVolumeClaim) or file:// (a folder): for instance hf://Qwen/Qwen3-0.6B",
    )
}

fn hub(rest: &str) -> Option<Source> {
    let (repo, revision) = match rest.split_once('@') {
        Some((repo, revision)) => (repo, revision),
        None => (rest, HUB_REVISION_DEFAULT),
    };
    let (organisation, name) = repo.split_once('/')?;
    let good = is_word(organisation, 96, "._-")
        && is_word(name, 96, "._-")
        && is_word(revision, 128, "._/-");
    good.then(|| Source::Hub { repo: repo.to_owned(), revision: revision.to_owned() })
}

fn claim(rest: &str) -> Option<Source> {
    let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
    let name_good = (1..=63).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    let path_good = path.chars().all(|c| c.is_ascii_alphanumeric() || "._/-".contains(c));
    (name_good && path_good)
        .then(|| Source::Claim { name: name.to_owned(), path: path.trim_matches('/').to_owned() })
}

fn file(path: &str) -> Option<Source> {
    let good =
        path.len() > 1 && path.starts_with('/') && !path.contains(|c: char| c.is_ascii_control());
    good.then(|| Source::File { path: path.to_owned() })
}

fn is_word(text: &str, characters_max: usize, others: &str) -> bool {
    (1..=characters_max).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || others.contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_read_as_documented() {
        let hub = |repo: &str, revision: &str| Source::Hub {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
        };
        let claim =
            |name: &str, path: &str| Source::Claim { name: name.to_owned(), path: path.to_owned() };
        assert_eq!(parse("hf://Qwen/Qwen3-0.6B"), Ok(hub("Qwen/Qwen3-0.6B", "main")));
        assert_eq!(parse("hf://a/b@refs/pr/1"), Ok(hub("a/b", "refs/pr/1")));
        assert_eq!(parse("pvc://models"), Ok(claim("models", "")));
        assert_eq!(parse("pvc://models/llama/1b/"), Ok(claim("models", "llama/1b")));
        assert_eq!(parse("file:///m"), Ok(Source::File { path: "/m".to_owned() }));
    }

    #[test]
    fn what_is_no_source_is_refused() {
        for text in [
            "",
            "qwen",
            "s3://a/b",
            "hf://a",
            "hf://a/b/c",
            "hf://a/b@",
            "hf://-a/b",
            "hf://a b/c",
            "pvc://",
            "pvc://Models",
            "pvc://m/a b",
            "pvc://m/../n",
            "file://",
            "file:///",
            "file://m",
            "file:///a\nb",
            "file:///a/../b",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(parse(&format!("file:///{}", "a".repeat(600))).is_err());
    }

    #[test]
    fn a_source_prints_as_it_is_written() {
        for text in ["hf://a/b@main", "pvc://models/llama", "file:///m/n"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }
}

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use plimsoll_contract::exit::ExitReason;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OTHER: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// A hub with one repository, `org/model`, as far as the client asks it.
#[derive(Default)]
struct FakeHub {
    /// By commit; the last is `main`.
    commits: Vec<(&'static str, BTreeMap<&'static str, Vec<u8>>)>,
    token: Option<&'static str>,
    /// Break off after this many bytes of a file's body, once.
    break_after: Option<usize>,
    /// Paths of downloads, with the first byte asked for.
    served: Vec<(String, usize)>,
    /// Bytes of weights that were sent.
    weights_sent: usize,
    /// It answers with whole files, whatever range is asked for.
    knows_no_ranges: bool,
}

fn start(hub: FakeHub) -> (String, Arc<Mutex<FakeHub>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let hub = Arc::new(Mutex::new(hub));
    let shared = hub.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let hub = shared.clone();
            std::thread::spawn(move || answer(&mut stream.unwrap(), &hub));
        }
    });
    (address, hub)
}

fn answer(stream: &mut TcpStream, hub: &Mutex<FakeHub>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let headers: Vec<String> =
        lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let header = |name: &str| {
        headers.iter().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let mut hub = hub.lock().unwrap();
    let wanted_token = hub.token.map(|token| format!("Bearer {token}"));
    let (status, extra, body) = if wanted_token.is_some() && header("authorization") != wanted_token
    {
        ("401 Unauthorized", String::new(), Vec::new())
    } else if let Some(revision) = path.strip_prefix("/api/models/org/model/revision/") {
        match hub.commits.iter().rev().find(|(c, _)| revision == "main" || revision == *c) {
            None => ("404 Not Found", String::new(), Vec::new()),
            Some((commit, files)) => {
                let siblings: Vec<_> =
                    files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
                let json = serde_json::json!({"sha": commit, "siblings": siblings});
                ("200 OK", String::new(), json.to_string().into_bytes())
            }
        }
    } else {
        file(&mut hub, &path, header("range"))
    };
    let cut = (body.len() > 1).then(|| hub.break_after.take()).flatten();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{extra}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(&body[..cut.unwrap_or(body.len()).min(body.len())]).ok()
}

fn file(hub: &mut FakeHub, path: &str, range: Option<String>) -> (&'static str, String, Vec<u8>) {
    let found = hub.commits.iter().find_map(|(commit, files)| {
        let name = path.strip_prefix(&format!("/org/model/resolve/{commit}/"))?;
        Some((*commit, files.get(name)?.clone()))
    });
    let Some((commit, bytes)) = found else { return ("404 Not Found", String::new(), Vec::new()) };
    let range = range.filter(|_| !hub.knows_no_ranges).unwrap_or_default();
    let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap_or(("0", ""));
    let first: usize = first.parse().unwrap_or(0);
    let last = last.parse().unwrap_or(bytes.len() - 1).min(bytes.len() - 1);
    if (first, last) != (0, 0) {
        hub.served.push((path.to_owned(), first));
    }
    if path.ends_with(".safetensors") {
        hub.weights_sent += last + 1 - first;
    }
    if hub.knows_no_ranges {
        return ("200 OK", String::new(), bytes);
    }
    let sum: u64 = bytes.iter().map(|&b| u64::from(b)).sum();
    let extra = format!(
        "ETag: \"e{sum}-{}\"\r\nX-Repo-Commit: {commit}\r\nContent-Range: bytes {first}-{last}/{}\r\n",
        path.len(),
        bytes.len()
    );
    ("206 Partial Content", extra, bytes[first..=last].to_vec())
}

fn files(marker: &str) -> BTreeMap<&'static str, Vec<u8>> {
    BTreeMap::from([
        ("config.json", format!("{{\"marker\": \"{marker}\"}}").into_bytes()),
        ("model.safetensors", marker.repeat(9_000).into_bytes()),
        ("tokenizer.json", b"{ }".to_vec()),
        ("chat_template.jinja", b"{{ messages }}".to_vec()),
        ("pytorch_model.bin", b"not wanted".to_vec()),
        ("original/params.json", b"not wanted".to_vec()),
        ("README.md", b"not wanted".to_vec()),
    ])
}

fn hub(endpoint: &str, token: Option<&str>) -> Hub {
    Hub { endpoint: endpoint.to_owned(), token: token.map(str::to_owned) }
}

struct Target(PathBuf);

impl Target {
    fn new(name: &str) -> Target {
        let dir =
            std::env::temp_dir().join(format!("plimsoll-fetch-{name}-{}", std::process::id()));
        fs::remove_dir_all(&dir).ok();
        Target(dir)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn fetch(
        &self,
        source: &str,
        endpoint: &str,
        token: Option<&str>,
    ) -> Result<String, LoadError> {
        fetch(&HubSource::parse(source)?, &self.0, &hub(endpoint, token), &mut |_| ())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

#[test]
fn a_model_arrives_whole_with_its_commit_and_nothing_else() {
    let (hub, served) =
        start(FakeHub { commits: vec![(COMMIT, files("a"))], ..FakeHub::default() });
    let target = Target::new("whole");
    assert_eq!(target.fetch("hf://org/model", &hub, None).unwrap(), COMMIT);
    let want = [
        REVISION_FILE,
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ];
    assert_eq!(target.names(), want);
    assert_eq!(fs::read(target.0.join("model.safetensors")).unwrap(), "a".repeat(9_000).as_bytes());
    assert_eq!(fs::read_to_string(target.0.join(REVISION_FILE)).unwrap().trim(), COMMIT);
    // Again: nothing is downloaded twice.
    let before = served.lock().unwrap().served.len();
    assert_eq!(target.fetch("hf://org/model@main", &hub, None).unwrap(), COMMIT);
    assert_eq!(served.lock().unwrap().served.len(), before);
    assert_eq!(target.names(), want);
}

#[test]
fn a_moved_branch_replaces_every_file_and_an_old_commit_can_still_be_had() {
    let mut newer = files("b");
    newer.remove("chat_template.jinja");
    let commits = vec![(COMMIT, files("a")), (OTHER, newer)];
    let (hub, _) = start(FakeHub { commits, ..FakeHub::default() });
    let target = Target::new("moved");
    let source = format!("hf://org/model@{COMMIT}");
    assert_eq!(target.fetch(&source, &hub, None).unwrap(), COMMIT);
    assert_eq!(target.fetch("hf://org/model", &hub, None).unwrap(), OTHER);
    let want = [REVISION_FILE, "config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(target.names(), want, "the old template is gone");
    assert_eq!(fs::read(target.0.join("model.safetensors")).unwrap()[0], b'b');
}

#[test]
fn a_strangers_files_stay_and_a_file_in_the_way_is_replaced() {
    let (hub, _) = start(FakeHub { commits: vec![(COMMIT, files("a"))], ..FakeHub::default() });
    let target = Target::new("strangers");
    fs::create_dir_all(&target.0).unwrap();
    fs::write(target.0.join("package.json"), "mine").unwrap();
    fs::write(target.0.join("config.json"), "old").unwrap();
    target.fetch("hf://org/model", &hub, None).unwrap();
    assert_eq!(fs::read_to_string(target.0.join("package.json")).unwrap(), "mine");
    assert!(fs::read_to_string(target.0.join("config.json")).unwrap().contains("marker"));
}

#[test]
fn an_interrupted_download_leaves_no_commit_and_no_half_file_and_goes_on_later() {
    let big = BTreeMap::from([
        ("config.json", b"{}".to_vec()),
        ("model.safetensors", (0..3_000_000u32).map(|i| i as u8).collect::<Vec<u8>>()),
    ]);
    let (hub, served) =
        start(FakeHub { commits: vec![(COMMIT, big.clone())], ..FakeHub::default() });
    let target = Target::new("interrupted");
    // As a killed process leaves it: the commit begun, the config there, no weights.
    fs::create_dir_all(target.0.join(PARTS)).unwrap();
    fs::write(target.0.join(PARTS).join("commit"), COMMIT).unwrap();
    fs::write(target.0.join("config.json"), "{}").unwrap();
    served.lock().unwrap().break_after = Some(100_000);
    let first = target.fetch("hf://org/model", &hub, None);
    if first.is_err() {
        assert!(!target.names().iter().any(|n| n == REVISION_FILE || n == "model.safetensors"));
        target.fetch("hf://org/model", &hub, None).unwrap();
    }
    assert_eq!(fs::read(target.0.join("model.safetensors")).unwrap(), big["model.safetensors"]);
    let served = &served.lock().unwrap().served;
    assert!(served.iter().all(|(path, _)| !path.ends_with("config.json")), "{served:?}");
    assert_eq!(target.names(), [REVISION_FILE, "config.json", "model.safetensors"]);
}

#[test]
fn a_closed_model_wants_a_token_and_a_missing_one_is_not_found() {
    let commits = vec![(COMMIT, files("a"))];
    let (hub, _) = start(FakeHub { commits, token: Some("secret"), ..FakeHub::default() });
    let target = Target::new("closed");
    let reason = |source: &str, token| {
        target.fetch(source, &hub, token).map_err(|error| error.exit_reason())
    };
    assert_eq!(reason("hf://org/model", None), Err(ExitReason::ModelUnauthorized));
    assert_eq!(reason("hf://org/model@v9", Some("secret")), Err(ExitReason::ModelNotFound));
    assert_eq!(reason("hf://org/other", Some("secret")), Err(ExitReason::ModelNotFound));
    assert_eq!(reason("hf://org/model", Some("secret")), Ok(COMMIT.to_owned()));
}

#[test]
fn a_hub_that_does_not_answer_is_no_verdict_on_the_model() {
    let target = Target::new("silent");
    let error = target.fetch("hf://org/model", "http://127.0.0.1:1", None).unwrap_err();
    assert!(!error.exit_reason().needs_a_person(), "{error}");
    assert!(error.to_string().contains("try again"), "{error}");
}

/// The files of a golden checkpoint: three weights files of some 100 KB and an index.
fn sharded() -> BTreeMap<&'static str, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/llama3-rope");
    let names = [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ];
    names.map(|name| (name, fs::read(folder.join(name)).unwrap())).into()
}

/// A weights file with a header of `header_bytes` and tensors of 3 MB.
fn with_header(header_bytes: usize) -> Vec<u8> {
    let mut file = (header_bytes as u64).to_le_bytes().to_vec();
    file.resize(8 + header_bytes, b'h');
    file.resize(8 + header_bytes + 3_000_000, b't');
    file
}

#[test]
fn facts_of_a_model_on_a_hub_are_those_of_its_files() {
    let commits = vec![(COMMIT, sharded())];
    let (address, _) = start(FakeHub { commits, token: Some("secret"), ..FakeHub::default() });
    let source = HubSource::parse("hf://org/model").unwrap();
    let facts = |token| peek::facts(&source, &hub(&address, token), &mut |_| ());
    let target = Target::new("facts");
    target.fetch("hf://org/model", &address, Some("secret")).unwrap();
    let of_files = crate::inspect::facts(target.0.to_str().unwrap()).unwrap();
    assert_eq!(of_files.revision.as_deref(), Some(COMMIT));
    assert_eq!(facts(Some("secret")).unwrap(), of_files);
    assert_eq!(facts(None).unwrap_err().exit_reason(), ExitReason::ModelUnauthorized);
}

#[test]
fn of_weights_the_header_alone_is_asked_for_and_the_length_kept() {
    for (header_bytes, asked_most) in [(1000, 256 << 10), (700_000, (256 << 10) + 700_008)] {
        let file = with_header(header_bytes);
        let files = BTreeMap::from([("model.safetensors", file.clone())]);
        let (address, served) =
            start(FakeHub { commits: vec![(COMMIT, files)], ..FakeHub::default() });
        let target = Target::new("headers");
        let source = HubSource::parse("hf://org/model").unwrap();
        peek::peek(&source, &target.0, &hub(&address, None), &mut |_| ()).unwrap();
        let brought = fs::read(target.0.join("model.safetensors")).unwrap();
        assert_eq!(brought.len(), file.len());
        assert_eq!(brought[..8 + header_bytes], file[..8 + header_bytes]);
        assert!(brought[1 << 20..].iter().all(|&byte| byte == 0), "holes in place of tensors");
        assert_eq!(served.lock().unwrap().weights_sent, asked_most);
    }
}

#[test]
fn a_hub_without_ranges_is_cut_short_and_a_short_or_lying_file_comes_as_it_is() {
    let lying = u64::MAX.to_le_bytes().to_vec();
    for file in [with_header(1000), b"abc".to_vec(), lying] {
        let files = BTreeMap::from([("model.safetensors", file.clone())]);
        let commits = vec![(COMMIT, files)];
        let (address, _) = start(FakeHub { commits, knows_no_ranges: true, ..FakeHub::default() });
        let target = Target::new("no-ranges");
        let source = HubSource::parse("hf://org/model").unwrap();
        peek::peek(&source, &target.0, &hub(&address, None), &mut |_| ()).unwrap();
        let brought = fs::read(target.0.join("model.safetensors")).unwrap();
        assert_eq!(brought.len(), file.len());
        let same = file.len().min(256 << 10);
        assert_eq!(brought[..same], file[..same]);
    }
}

#[test]
fn addresses_that_lead_elsewhere_are_refused() {
    let parsed = HubSource::parse("hf://org/model-1.0_x@refs/pr/3").unwrap();
    assert_eq!(
        (parsed.repository.as_str(), parsed.revision.as_str()),
        ("org/model-1.0_x", "refs/pr/3")
    );
    for source in
        ["org/model", "hf://model", "hf://a/b/c", "hf://../x", "hf://a/b?x", "hf://a/b@", ""]
    {
        assert!(HubSource::parse(source).is_err(), "{source}");
    }
    assert_eq!(
        wanted(["../a.json", "a/b.json", ".x.json", "a\\b.json", "a.json"].into_iter()),
        ["a.json"]
    );
}

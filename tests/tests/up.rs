//! `plimsoll up` and `plimsoll plan` as a person runs them, with the bundled model and no cluster.

// Helpers of tests are tests: a panic is how they report.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use plimsoll_tests::hub::{self, Hub, Repository};
use plimsoll_tests::install::root;

const QUESTION: &str = "Who is the harbour master of Plimsoll Bay?";
const ANSWER: &str = "Mara Tollard";

/// The program that was built beside this test.
fn plimsoll() -> Command {
    let here = std::env::current_exe().unwrap();
    let program = here.ancestors().nth(2).unwrap().join("plimsoll");
    assert!(program.exists(), "{} is not built; run `make build` first", program.display());
    Command::new(program)
}

fn local_example() -> PathBuf {
    root().join("examples/local.yaml")
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

fn up(manifest: &Path, more: &[&str]) -> Output {
    let mut command = plimsoll();
    command.args(["up", "--listen", "127.0.0.1:0"]).arg(manifest).args(more);
    command.stdin(Stdio::null()).output().unwrap()
}

/// A manifest in a folder of its own, for a source given as text.
fn manifest(name: &str, spec: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("plimsoll-up-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("manifest.yaml");
    let text = format!(
        "apiVersion: plimsoll.dev/v1alpha1\nkind: LLMDeployment\nmetadata: {{name: plim}}\nspec: {spec}\n"
    );
    std::fs::write(&file, text).unwrap();
    file
}

#[test]
fn one_command_plans_serves_and_answers() {
    let output = up(&local_example(), &["--ask", QUESTION, "--once"]);
    let (answer, told) = said(&output);
    assert!(output.status.success(), "{told}");
    assert!(answer.contains(ANSWER) && answer.ends_with(".\n"), "{answer}\n{told}");
    for words in ["F32 weights", "█ weights", "not taken", "curl -N http://127.0.0.1:", "drained"]
    {
        assert!(told.contains(words), "{words} in {told}");
    }
    // The capture in the README, as far as it is the same on every machine.
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let capture = readme.split("$ target/release/plimsoll up").nth(1).unwrap();
    let capture = capture.split("```").next().unwrap();
    let same = ["  cache  ", "█ weights", "  not taken  ", "  draining  "];
    let lines = capture.lines().filter(|line| same.iter().any(|start| line.contains(start)));
    assert_eq!(lines.clone().count(), same.len(), "{capture}");
    for line in lines {
        assert!(told.contains(line), "{line} of the README in {told}");
    }
}

#[test]
fn the_plan_is_printed_as_data_with_the_flags_of_the_engine() {
    let mut command = plimsoll();
    command.args(["plan", "--output", "json", "--node-memory", "64Gi", "--node-cpu", "16", "-f"]);
    let output = command.arg(local_example()).output().unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["plan"]["cache"]["tokens"], 8 * 2048);
    assert_eq!(plan["plan"]["memoryBytes"]["capacity"], 64_u64 << 30);
    let flags = plan["flags"].as_array().unwrap();
    assert!(flags.contains(&"--kv-tokens=16384".into()), "{flags:?}");
    assert!(output.status.success());
}

#[test]
fn what_does_not_fit_is_refused_with_the_sum_and_an_exit_code() {
    let mut command = plimsoll();
    command.args(["plan", "--node-memory", "64Mi", "-f"]).arg(local_example());
    let output = command.output().unwrap();
    let (table, _) = said(&output);
    assert!(!output.status.success());
    for words in ["DoesNotFit", "of 64.0 MiB", "weights 22.0 MiB", "remedy"] {
        assert!(table.contains(words), "{words} in {table}");
    }
}

#[test]
fn manifests_that_cannot_work_are_refused_before_anything_runs() {
    for (name, spec, words) in [
        ("claim", "{model: {source: 'pvc://models/x'}}", "only a cluster has"),
        ("typo", "{model: {sorce: x}}", "spec.model.sorce is unknown"),
        ("scheme", "{model: {source: 's3://x'}}", "must start with hf://"),
        ("nowhere", "{model: {source: 'file://nowhere'}}", "no folder"),
        ("suspended", "{model: {source: 'file:///x'}, suspend: true}", "spec.suspend is true"),
        (
            "keys",
            "{model: {source: 'file:///x'}, auth: {apiKeysSecretRef: {name: k}}}",
            "--api-key-file",
        ),
        ("missing", "{model: {source: 'file:///nowhere'}}", "ModelNotFound"),
    ] {
        let output = up(&manifest(name, spec), &[]);
        let (answer, told) = said(&output);
        assert!(!output.status.success() && answer.is_empty(), "{name}");
        assert!(told.contains(words), "{name}: {words} in {told}");
    }
}

#[test]
fn a_broken_checkpoint_ends_with_the_reason_the_remedy_and_the_exit_code_of_the_engine() {
    let file = manifest("broken", "{model: {source: 'file://.'}}");
    let folder = file.parent().unwrap();
    let model = root().join("tests/model");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model.join(name), folder.join(name)).unwrap();
    }
    let weights = std::fs::read(model.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    let output = up(&file, &[]);
    let (_, told) = said(&output);
    assert!(told.contains("CorruptWeights") && told.contains("remedy"), "{told}");
    assert_eq!(output.status.code(), Some(15));
}

#[test]
fn a_signal_drains_and_leaves_no_engine_behind() {
    let mut command = plimsoll();
    command.args(["up", "--listen", "127.0.0.1:0"]).arg(local_example());
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let ready = lines.find(|line| line.contains("ready      http://")).expect("it gets ready");
    let address = ready.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
    assert!(std::net::TcpStream::connect(&address).is_ok());
    interrupt(&child);
    let rest: Vec<String> = lines.collect();
    assert!(child.wait().unwrap().success(), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("drained")), "{rest:?}");
    assert!(std::net::TcpStream::connect(&address).is_err(), "nobody listens any more");
}

fn interrupt(child: &Child) {
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: a signal to our own child, which has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub on loopback with the bundled model, for those who hold the token.
fn gated_hub() -> (SocketAddr, Arc<Hub>) {
    let model = root().join("tests/model");
    let mut repository = Repository::of_folder("org/plim", COMMIT, &model).unwrap();
    repository.token = Some("hf_right".to_owned());
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let hub = Arc::new(Hub::of(vec![repository]));
    hub::serve(hub.clone(), address).unwrap();
    (address, hub)
}

#[test]
fn a_model_of_a_hub_is_planned_from_its_headers_and_fetched_once_to_be_served() {
    let (address, hub) = gated_hub();
    let file = manifest("hub", "{model: {source: 'hf://org/plim'}}");
    let folder = file.parent().unwrap();
    std::fs::write(folder.join("token"), "hf_right").unwrap();
    let token = ["--hub-token-file".into(), folder.join("token").into_os_string()];
    let run = |command: &mut Command| {
        command.env("HF_ENDPOINT", format!("http://{address}")).output().unwrap()
    };
    let plan = || {
        let mut command = plimsoll();
        command.args(["plan", "--output", "json", "-f"]).arg(&file);
        command
    };
    let refused = run(&mut plan());
    let (_, told) = said(&refused);
    assert!(told.contains("ModelUnauthorized") && told.contains("remedy"), "{told}");
    assert_eq!(refused.status.code(), Some(13));

    let output = run(plan().args(&token));
    let (planned, told) = said(&output);
    assert!(output.status.success(), "{told}");
    let planned: serde_json::Value = serde_json::from_str(&planned).unwrap();
    assert_eq!(planned["model"]["revision"], COMMIT);
    let whole = std::fs::metadata(root().join("tests/model/model.safetensors")).unwrap().len();
    let sent = || hub.bytes_sent("org/plim", "model.safetensors");
    assert!(sent() < whole / 10, "{} of {whole} bytes for a plan", sent());

    for _ in 0..2 {
        let mut command = plimsoll();
        command.arg("up").arg(&file).args(["--listen", "127.0.0.1:0", "--ask", QUESTION, "--once"]);
        command.arg("--cache-dir").arg(folder.join("models")).args(&token);
        let output = run(&mut command);
        let (answer, told) = said(&output);
        assert!(output.status.success() && answer.contains(ANSWER), "{answer}{told}");
        // The second time it is there.
        assert!((whole..whole + whole / 10).contains(&sent()), "{} of {whole} bytes", sent());
    }
}

/// A program in the engine's place on a machine with this GPU: it answers `inspect`, and notes how it would have served.
fn engine_with(folder: &Path, device: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let facts = serde_json::json!({
        "family": "llama", "architecture": "LlamaForCausalLM", "layers": 16, "hidden": 2048, "intermediate": 8192,
        "parameters": {"embedding": 262_668_288, "attention": 167_772_160, "mlp": 805_306_368, "norm": 67_584, "head": 0},
        "diskBytes": {"BF16": 2_471_628_800_u64}, "heads": 32, "kvHeads": 8, "headDim": 64, "vocabulary": 128_256,
        "contextTokens": 131_072, "tiedHead": true, "chatTemplate": true,
    });
    let program = folder.join("engine");
    let noted = folder.join("served");
    let text = format!(
        "#!/bin/sh\ncase \"$1 $2\" in\n'inspect --device') echo '{device}' ;;\ninspect*) echo '{facts}' ;;\nserve*) echo \"$@\" > {} ; exit 16 ;;\nesac\n",
        noted.display()
    );
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    program
}

const H200: &str = r#"{"gpu": {"name": "NVIDIA H200", "memoryBytes": 150109880320, "memoryFreeBytes": 149500000000,
    "computeCapability": "9.0", "multiprocessors": 132, "driver": "580.95.05"}}"#;

#[test]
fn a_machine_with_a_gpu_uses_it_without_being_told() {
    // What is said of nodes does not matter here.
    let selector = "{nvidia.com/gpu.product: NVIDIA-L4}";
    let spec = format!(
        "{{model: {{source: 'file://.'}}, podTemplate: {{spec: {{nodeSelector: {selector}}}}}}}"
    );
    let file = manifest("gpu", &spec);
    let folder = file.parent().unwrap();
    let engine = engine_with(folder, H200);
    let plan = |more: &[&str]| {
        let mut command = plimsoll();
        command.args(["plan", "--output", "json", "--engine"]).arg(&engine).arg("-f").arg(&file);
        let output = command.args(more).output().unwrap();
        assert!(output.status.success(), "{}", said(&output).1);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let planned = plan(&[]);
    assert_eq!(planned["plan"]["accelerator"], "nvidia-h200");
    assert_eq!(planned["plan"]["dtype"], "BF16");
    assert_eq!(planned["plan"]["memoryBytes"]["capacity"], 150_109_880_320_u64 - (640 << 20));
    // Another machine is planned for without this one's GPU.
    assert_eq!(plan(&["--node-memory", "64Gi"])["plan"]["accelerator"], "cpu");

    let output = up(&file, &["--engine", engine.to_str().unwrap()]);
    let (_, told) = said(&output);
    for words in ["BF16 weights · TP 1 · nvidia-h200", "of 139 GiB", "comes before CPUs"] {
        assert!(told.contains(words), "{words} in {told}");
    }
    assert_eq!(output.status.code(), Some(16), "the engine was started: {told}");
    let served = std::fs::read_to_string(folder.join("served")).unwrap();
    for flag in ["--device=cuda", "--dtype=bf16", "--running-max=256", "--step-tokens-max=2048"] {
        assert!(served.contains(flag), "{flag} in {served}");
    }
}

fn plan_for(nodes: &str, fields: &str, more: &[&str]) -> Output {
    let manifest = manifest(
        &format!("nodes-{}", fields.len()),
        &format!("{{model: {{source: 'hf://a/b'}}{fields}}}"),
    );
    let config = root().join("tests/model/config.json");
    let mut command = plimsoll();
    command.args(["plan", "--nodes", nodes, "--config"]).arg(config).arg("-f").arg(manifest);
    command.args(more).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn machines_that_nobody_has_are_planned_for_from_a_config_alone() {
    let output = plan_for("nvidia-h200=8,nvidia-l4=4", "", &["--output", "json"]);
    let (text, told) = said(&output);
    assert!(output.status.success(), "{told}");
    let data: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(data["plan"]["accelerator"], "nvidia-l4");
    assert_eq!(data["plan"]["quantization"], "None");
    assert!(data["plan"]["predicted"]["tpotMicroseconds"].as_u64().unwrap() > 0, "{text}");
    assert_eq!(data["plan"]["rejected"].as_array().unwrap().len(), 8);
    let candidates = data["candidates"].as_array().unwrap();
    assert!(candidates.len() > 100, "{}", candidates.len());
    let runs = candidates.iter().filter(|candidate| candidate["runnable"] == true);
    let runs: Vec<_> = runs.map(|candidate| candidate["candidate"].as_str().unwrap()).collect();
    let both = ["None · BF16 · TP 1 · nvidia-l4", "None · BF16 · TP 1 · nvidia-h200"];
    assert_eq!(runs, both, "the chosen one first");
    let (table, _) = said(&plan_for("nvidia-h200=8", "", &[]));
    for words in ["predicted", "between tokens", "(runnable: false)", "more: --all lists them"] {
        assert!(table.contains(words), "{words} in {table}");
    }
    assert!(!table.contains('\x1b'), "no colours into a pipe: {table:?}");
}

#[test]
fn where_nothing_fits_the_exit_code_and_the_nearest_misses_say_so() {
    let fields = ", cache: {tokens: 1000000000}";
    let output = plan_for("nvidia-l4=1", fields, &["--output", "yaml"]);
    assert_eq!(output.status.code(), Some(1));
    let (text, _) = said(&output);
    assert!(text.contains("shortBy") && text.contains("bytes"), "{text}");
    let (table, _) = said(&plan_for("nvidia-l4=1", fields, &[]));
    assert!(table.contains("nearest") && table.contains("short by"), "{table}");
    let (_, told) = said(&plan_for("nvidia-x9=1", "", &[]));
    assert!(told.contains("--nodes: no card is known as nvidia-x9"), "{told}");
}

#[test]
fn a_machine_without_a_gpu_is_planned_for_as_a_cpu_and_says_nothing_of_gpus() {
    let file = manifest("no-gpu", "{model: {source: 'file://.'}, workload: {concurrency: 1}}");
    let folder = file.parent().unwrap();
    let device = r#"{"whyNone": "no CUDA driver: libcuda was not found on this host"}"#;
    let engine = engine_with(folder, device);
    let output = up(&file, &["--engine", engine.to_str().unwrap()]);
    let (_, told) = said(&output);
    assert!(told.contains("TP 1 · cpu") && !told.contains("GPU"), "{told}");
    let served = std::fs::read_to_string(folder.join("served")).unwrap();
    assert!(served.contains("--device=cpu"), "{served}");
    // An engine that fails when it is asked costs the GPU and not the plan.
    let broken = engine_with(folder, "no JSON");
    let output = up(&file, &["--engine", broken.to_str().unwrap()]);
    let (_, told) = said(&output);
    let words = "this machine: the engine could not look for a GPU";
    assert!(told.contains("TP 1 · cpu") && told.contains(words), "{told}");
}

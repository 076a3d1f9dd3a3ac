//! What `up` and `plan` share: a manifest and this machine enter; spec, facts and plan leave. The checks, the planner and
//! the flags are the operator's own; only the machine is read here in place of a cluster.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use plimsoll_contract::facts::{DeviceFacts, ModelFacts};

use crate::cli::{LocalArgs, PlanArgs, UpArgs};
use crate::engine::{self, Engine};
use crate::plan::cards::{self, Card, Gpus};
use crate::plan::what_if::Host;
use crate::plan::{self, NodeResources, PlanOutcome, Prices, Question, Scope};
use crate::spec::{Source, Spec};
use crate::{amount, manifest, show};

/// The spec that a manifest declares.
pub fn spec(file: &Path) -> anyhow::Result<Spec> {
    let object = manifest::read(file)?;
    Spec::parse(&object).with_context(|| format!("{} cannot be used", file.display()))
}

/// The folder with the model's files; downloads them where the source is a hub.
pub fn model_directory(spec: &Spec, engine: &Engine, args: &UpArgs) -> anyhow::Result<PathBuf> {
    match &spec.source {
        Source::File { path } => Ok(PathBuf::from(path)),
        Source::Claim { name, .. } => bail!(
            "spec.model.source is a PersistentVolumeClaim ({name}), which only a cluster has: use file:// or hf:// here"
        ),
        Source::Hub { repo, revision } => {
            let token = hub_token(spec, &args.local)?;
            let folder = format!("{repo}@{revision}").replace('/', "--");
            let into = cache(args.cache_dir.as_deref())?.join(folder);
            eprintln!("fetching {} into {}", spec.source, into.display());
            engine.fetch(&spec.source.to_string(), &into, token)?;
            Ok(into)
        }
    }
}

/// The file with the token, which a spec that names a Secret cannot do without.
fn hub_token<'a>(spec: &Spec, args: &'a LocalArgs) -> anyhow::Result<Option<&'a Path>> {
    if spec.credentials.is_some() && args.hub_token_file.is_none() {
        bail!(
            "spec.model.credentials names a Secret, which only a cluster has: give --hub-token-file FILE"
        );
    }
    Ok(args.hub_token_file.as_deref())
}

fn cache(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(given) = given {
        return Ok(given.to_path_buf());
    }
    let folder = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set: give --cache-dir DIR")?;
    Ok(folder.join("plimsoll/models"))
}

/// There where a driver for NVIDIA's cards is loaded.
const DRIVER: &str = "/proc/driver/nvidia/version";

/// This machine as a node: its CPUs, the memory that is available or that its cgroup leaves, and its GPU.
pub fn machine(engine: &Engine) -> anyhow::Result<NodeResources> {
    let gpus = gpus(engine);
    // The engine speaks of the first card alone.
    let gpu_count = u32::from(matches!(gpus, Gpus::Card(_)));
    Ok(NodeResources { gpus, gpu_count, ..host()? })
}

/// What the engine can use. Without a driver there is nothing to say; with one, somebody will wonder why the card is idle.
fn gpus(engine: &Engine) -> Gpus {
    let unusable = |why| Gpus::Unusable { class: cards::CLASS_UNKNOWN.to_owned(), why };
    match engine.inspect_device() {
        Ok(DeviceFacts { gpu: Some(gpu), .. }) => Gpus::Card(Card::found(&gpu)),
        Ok(DeviceFacts { why_none: Some(why), .. }) if Path::new(DRIVER).exists() => unusable(why),
        Ok(_) => Gpus::None,
        Err(error) => unusable(format!("the engine could not look for a GPU: {error:#}")),
    }
}

fn host() -> anyhow::Result<NodeResources> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let available = available_bytes(&meminfo).context("/proc/meminfo has no MemAvailable")?;
    let cpus = std::thread::available_parallelism()?.get();
    Ok(NodeResources {
        name: "this machine".to_owned(),
        memory_bytes: cgroup_limit().unwrap_or(u64::MAX).min(available),
        // What others use is not available.
        asked_bytes: 0,
        asked_cpu_millis: 0,
        pods_seen: plan::PodsSeen::All,
        cpu_millis: u32::try_from(cpus * 1000).unwrap_or(u32::MAX),
        gpus: Gpus::None,
        gpu_count: 0,
        asked_gpus: 0,
        open_to: plan::OpenTo::All,
    })
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

/// Version 2 or 1, as a container sees its own; absent, or "max", where there is no limit.
fn cgroup_limit() -> Option<u64> {
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
}

/// The plan for one machine that is no node: what the pod template selects means nothing here,
/// and one process serves.
pub fn plan_here(spec: &Spec, facts: &ModelFacts, machine: NodeResources) -> PlanOutcome {
    plan::plan(&here(spec), facts, &[machine])
}

fn here(spec: &Spec) -> Spec {
    Spec { pod_template: None, replicas: 1, ..spec.clone() }
}

/// The verb `plan`.
pub fn print_plan(args: &PlanArgs) -> anyhow::Result<ExitCode> {
    let spec = spec(&args.file)?;
    let facts = match facts(&spec, args) {
        Ok(facts) => facts,
        Err(error) => {
            eprintln!("plimsoll: {error:#}");
            return Ok(engine::exit_code(&error));
        }
    };
    let prices = args.prices.as_deref().map_or_else(|| Ok(Prices::default()), prices)?;
    let (spec, nodes, scope) = if args.nodes.is_empty() {
        (here(&spec), vec![planned_machine(args)?], Scope::Runnable)
    } else {
        let nodes = plan::what_if::nodes(&args.nodes, planned_host(args)?)
            .map_err(|error| anyhow::anyhow!("--nodes: {error}"))?;
        (spec, nodes, Scope::Everything)
    };
    let question = Question { scope, ..Question::of(&spec, &facts, &nodes, &prices) };
    let outcome = plan::choose(&question);
    let listed = if args.all { show::Listed::All } else { show::Listed::Best };
    let paint = show::Paint::of(&std::io::stdout());
    print!("{}", show::rendered(args.output, &spec, &facts, &outcome, paint, listed));
    Ok(exit_code(&outcome))
}

fn prices(file: &Path) -> anyhow::Result<Prices> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {shown}"))?;
    let given = serde_yaml_ng::from_str(&text).with_context(|| format!("{shown} is no YAML"))?;
    Prices::overridden(&given).map_err(|error| anyhow::anyhow!("{shown}: {error}"))
}

fn planned_host(args: &PlanArgs) -> anyhow::Result<Host> {
    let usual = Host::default();
    Ok(Host {
        memory_bytes: node_memory(args)?.unwrap_or(usual.memory_bytes),
        cpu_millis: node_cpu(args)?.unwrap_or(usual.cpu_millis),
    })
}

fn node_memory(args: &PlanArgs) -> anyhow::Result<Option<u64>> {
    let Some(memory) = &args.node_memory else { return Ok(None) };
    let bytes = amount::units(memory);
    Ok(Some(bytes.context("--node-memory must be a quantity, for instance 64Gi")?))
}

fn node_cpu(args: &PlanArgs) -> anyhow::Result<Option<u32>> {
    let Some(cpu) = &args.node_cpu else { return Ok(None) };
    let millis = amount::millis(cpu).context("--node-cpu must be a quantity, for instance 16")?;
    Ok(Some(u32::try_from(millis).unwrap_or(u32::MAX)))
}

fn facts(spec: &Spec, args: &PlanArgs) -> anyhow::Result<ModelFacts> {
    if let Some(file) = &args.facts {
        let text =
            std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        return serde_json::from_slice(&text)
            .with_context(|| format!("{} holds no facts", file.display()));
    }
    let engine = || Engine::find(args.local.engine.as_deref());
    if let Some(config) = &args.config {
        return engine()?.inspect(config);
    }
    match &spec.source {
        Source::Claim { name, .. } => bail!(
            "the model lies in the PersistentVolumeClaim {name}, out of reach from here: give --config FILE, its config.json, or --facts FILE, as `plimsoll-engine inspect --json` prints it"
        ),
        Source::File { path } => engine()?.inspect(Path::new(path)),
        Source::Hub { .. } => {
            let token = hub_token(spec, &args.local)?;
            engine()?.inspect_on_hub(&spec.source.to_string(), token)
        }
    }
}

fn planned_machine(args: &PlanArgs) -> anyhow::Result<NodeResources> {
    let other = args.node_memory.is_some() || args.node_cpu.is_some();
    // With the facts in a file nothing else needs the engine, so that it may be missing.
    let engine = Engine::find(args.local.engine.as_deref());
    let mut node = match engine {
        Ok(engine) if !other => machine(&engine)?,
        _ => host()?,
    };
    if other {
        node.name = "the machine asked for".to_owned();
    }
    node.memory_bytes = node_memory(args)?.unwrap_or(node.memory_bytes);
    node.cpu_millis = node_cpu(args)?.unwrap_or(node.cpu_millis);
    Ok(node)
}

/// A shell can tell whether there is a plan.
fn exit_code(outcome: &PlanOutcome) -> ExitCode {
    if outcome.chosen.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_kibibytes() {
        let text = "MemTotal:       24570880 kB\nMemAvailable:   23000000 kB\nBuffers: 1 kB\n";
        assert_eq!(available_bytes(text), Some(23_000_000 << 10));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
    }
}

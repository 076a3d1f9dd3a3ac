//! Plimsoll on a node, as a user installs it: images and the Helm chart.
//!
//! In: the programs in this build's folder, the chart and the one before it. Out: the operator, Available, in a
//! namespace that enforces the restricted pod security level. Never compiles anything.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cluster::{Image, Node, wait_until};

/// The operator's own namespace.
pub const NAMESPACE: &str = "plimsoll-system";
const RELEASE: &str = "plimsoll";
/// The chart before the last change of its values, packed.
const PREVIOUS_CHART: &str = "plimsoll-0.1.0-first.tgz";
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The root of the clone.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the clone")
}

/// `operator` or `engine` as an image, from the program that was built beside this one.
pub fn image(name: &str, program: &str) -> Result<Image> {
    let destination = format!("/usr/bin/{program}");
    // The tag that the chart asks for by itself: its appVersion.
    let image = Image::named(&format!("docker.io/plimsoll/{name}:{}", env!("CARGO_PKG_VERSION")))
        .program(&built(program)?, &destination)?
        .file(Path::new(CERTIFICATES), CERTIFICATES, 0o644)
        .entrypoint(&[&destination]);
    Ok(image)
}

/// Makes the engine's image known to the node.
pub fn import_engine(node: &Node) -> Result<()> {
    node.import(&image("engine", "plimsoll-engine")?)
}

/// Imports the images and installs the chart with `settings` (Helm's `key=value`), in place of what an earlier call
/// installed. The first call installs the chart as it was before and upgrades to the one of this clone as users do, their
/// values kept. Returns when the operator is Available and alone.
pub fn install(node: &Node, settings: &[&str]) -> Result<()> {
    import_engine(node)?;
    node.import(&image("operator", "plimsoll")?)?;
    restricted_namespace(node, NAMESPACE)?;
    let chart = root().join("charts/plimsoll").display().to_string();
    let mut words = vec!["upgrade", RELEASE, &chart, "--namespace", NAMESPACE];
    if node.helm(&["status", RELEASE, "--namespace", NAMESPACE]).is_err() {
        install_previous(node, settings)?;
        words.push("--reuse-values");
    } else {
        words.push("--reset-values");
    }
    words.extend(["--wait", "--timeout", "90s"]);
    for setting in settings {
        words.extend(["--set", setting]);
    }
    node.helm(&words).with_context(|| {
        // Helm says that it waited in vain; why stands in the pods.
        let words = ["--namespace", NAMESPACE, "describe", "pods"];
        node.kubectl().run(&words).unwrap_or_default()
    })?;
    wait_until("the former operator is gone", Duration::from_secs(60), || {
        Ok((operator_pods(node)?.len() == 1).then_some(()))
    })
}

/// Not awaited: its image is this build's, which its rights were not made for. It knows no Prometheus.
fn install_previous(node: &Node, settings: &[&str]) -> Result<()> {
    let before = root().join("tests/charts").join(PREVIOUS_CHART).display().to_string();
    let mut words = vec!["install", RELEASE, &before, "--namespace", NAMESPACE];
    for setting in settings.iter().filter(|setting| !setting.starts_with("prometheus.")) {
        words.extend(["--set", setting]);
    }
    node.helm(&words).map(drop)
}

/// Names of the operator's pods, those on their way out among them.
pub fn operator_pods(node: &Node) -> Result<Vec<String>> {
    let words =
        ["pods", "--namespace", NAMESPACE, "--selector=app.kubernetes.io/instance=plimsoll"];
    let pods = node.kubectl().get(&words)?;
    let items = pods["items"].as_array().context("a list has items")?;
    Ok(items.iter().filter_map(|pod| Some(pod["metadata"]["name"].as_str()?.to_string())).collect())
}

/// Makes a namespace that enforces the restricted pod security level.
pub fn restricted_namespace(node: &Node, name: &str) -> Result<()> {
    node.kubectl().apply(&format!(
        "{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: \
         {{pod-security.kubernetes.io/enforce: restricted}}}}}}"
    ))?;
    Ok(())
}

/// A program beside this one, or one folder up where tests lie.
pub fn built(program: &str) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let found = here.ancestors().skip(1).take(2).map(|folder| folder.join(program));
    match found.into_iter().find(|path| path.exists()) {
        Some(path) => Ok(path),
        None => bail!("{program} is not built; run `make build` first"),
    }
}

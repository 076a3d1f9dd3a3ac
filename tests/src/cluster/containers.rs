//! containerd, pod networking and names inside a sandbox.
//!
//! In: a sandbox. Out: a container runtime with a bridge network and the images it is given, and
//! the configuration of CoreDNS. Never the machine's own containerd: root, state and socket are
//! the node's.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::image::Image;
use super::process::{Daemon, Lifetime, wait_until};
use super::sandbox::{POD_NETWORK, Sandbox};
use super::tools::Tools;

const PAUSE_IMAGE: &str = "localhost/pause:1";

/// A running containerd.
pub(crate) struct Containers {
    _daemon: Daemon,
}

/// The socket kubelet and `ctr` talk to.
pub(crate) fn socket(sandbox: &Sandbox) -> PathBuf {
    sandbox.folder().join("containerd.sock")
}

impl Containers {
    pub fn start(sandbox: &Sandbox, tools: &Tools, life: Lifetime) -> Result<Containers> {
        write_cni(sandbox)?;
        let config = sandbox.folder().join("containerd.toml");
        std::fs::write(&config, containerd_config(sandbox))?;
        let words =
            [tools.containerd.display().to_string(), format!("--config={}", config.display())];
        let log = sandbox.folder().join("log/containerd.log");
        let _daemon = Daemon::start("containerd", sandbox.daemon(&words), &log, life)?;
        Ok(Containers { _daemon })
    }

    /// Waits for containerd, then imports the pause image and the given ones.
    pub fn import_all(&self, sandbox: &Sandbox, tools: &Tools, images: &[Image]) -> Result<()> {
        wait_until("containerd answers", Duration::from_secs(30), || {
            Ok(ctr(sandbox, &["version"]).output()?.status.success().then_some(()))
        })
        .with_context(|| sandbox.last_lines("containerd"))?;
        let pause =
            Image::named(PAUSE_IMAGE).program(&tools.pause, "/pause")?.entrypoint(&["/pause"]);
        self.import(sandbox, &pause)?;
        images.iter().try_for_each(|image| self.import(sandbox, image))
    }

    pub fn import(&self, sandbox: &Sandbox, image: &Image) -> Result<()> {
        let file = sandbox.folder().join("image.tar");
        image.write(&file).with_context(|| format!("image {}", image.name()))?;
        let path = file.display().to_string();
        let output = ctr(sandbox, &["--namespace=k8s.io", "images", "import", &path]).output()?;
        if !output.status.success() {
            bail!("import of {}: {}", image.name(), String::from_utf8_lossy(&output.stderr));
        }
        std::fs::remove_file(&file)?;
        Ok(())
    }
}

/// BusyBox and curl as an image, for pods that tests look around with. (BusyBox's own wget is linked
/// statically and dies while it resolves names.)
pub fn toolbox_image(tools: &Tools) -> Result<Image> {
    let mut image = Image::named("localhost/toolbox:1")
        .program(&tools.busybox, "/bin/busybox")?
        .program(&tools.curl, "/usr/bin/curl")?
        .entrypoint(&["/bin/busybox"]);
    for name in ["sh", "sleep", "cat", "nslookup", "httpd", "id", "ls", "date"] {
        image = image.link(&format!("/bin/{name}"), "busybox");
    }
    Ok(image)
}

fn ctr(sandbox: &Sandbox, args: &[&str]) -> Command {
    let address = format!("--address={}", socket(sandbox).display());
    let words: Vec<String> =
        ["ctr", &address].iter().chain(args).map(|word| word.to_string()).collect();
    sandbox.daemon(&words)
}

fn containerd_config(sandbox: &Sandbox) -> String {
    let folder = sandbox.folder().display();
    format!(
        r#"version = 2
root = "{folder}/containerd/root"
state = "{folder}/containerd/state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  netns_mounts_under_state_dir = true
  # A build machine may not let us lower the score.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"#
    )
}

fn write_cni(sandbox: &Sandbox) -> Result<()> {
    let folder = sandbox.folder().join("cni");
    std::fs::create_dir_all(&folder)?;
    let network = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
         "ipam": {"type": "host-local", "ranges": [[{"subnet": POD_NETWORK}]],
                  "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]});
    std::fs::write(folder.join("10-pods.conflist"), network.to_string())?;
    Ok(())
}

/// CoreDNS answers for Services and nothing else: there is no outside.
pub(crate) fn write_corefile(sandbox: &Sandbox, kubeconfig: &Path) -> Result<PathBuf> {
    let path = sandbox.folder().join("Corefile");
    let text = format!(
        ".:53 {{\n    errors\n    kubernetes cluster.local {{\n        kubeconfig {}\n    }}\n}}\n",
        kubeconfig.display()
    );
    std::fs::write(&path, text)?;
    Ok(path)
}

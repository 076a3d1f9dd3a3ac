//! Container images without a container engine.
//!
//! In: files of this machine and what to run. Out: a tar in the OCI layout that containerd imports.
//! Never compressed, never dated: the same files give the same bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::tools::hex;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Tar works in blocks.
const BLOCK: usize = 512;

/// An image under construction: one layer and its configuration.
#[derive(Clone, Debug)]
pub struct Image {
    name: String,
    files: Vec<Entry>,
    entrypoint: Vec<String>,
    user: String,
}

#[derive(Clone, Debug)]
struct Entry {
    path: String,
    mode: u32,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Folder,
    Link(String),
    Bytes(Vec<u8>),
    Host(PathBuf),
}

impl Image {
    /// An empty image; `name` is what `crictl images` will show, with registry and tag.
    pub fn named(name: &str) -> Image {
        let files = vec![Entry { path: "tmp".into(), mode: 0o1777, content: Content::Folder }];
        Image { name: name.into(), files, entrypoint: Vec::new(), user: "65532:65532".into() }
    }

    /// The same image under another name.
    pub fn renamed(self, name: &str) -> Image {
        Image { name: name.into(), ..self }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a program and the shared libraries it is linked to, each under its own path.
    pub fn program(mut self, host: &Path, destination: &str) -> Result<Image> {
        for library in shared_libraries(host)? {
            let path = library.display().to_string();
            if !self.files.iter().any(|entry| entry.path == path.trim_start_matches('/')) {
                self = self.file(&library, &path, 0o755);
            }
        }
        Ok(self.file(host, destination, 0o755))
    }

    /// Adds a file of this machine.
    pub fn file(self, host: &Path, destination: &str, mode: u32) -> Image {
        self.entry(destination, mode, Content::Host(host.into()))
    }

    /// Adds a file with this text.
    pub fn text(self, destination: &str, text: &str) -> Image {
        self.entry(destination, 0o644, Content::Bytes(text.into()))
    }

    /// Adds a symbolic link.
    pub fn link(self, destination: &str, target: &str) -> Image {
        self.entry(destination, 0o777, Content::Link(target.into()))
    }

    /// What runs when a pod names no command.
    pub fn entrypoint(mut self, words: &[&str]) -> Image {
        self.entrypoint = words.iter().map(|word| word.to_string()).collect();
        self
    }

    fn entry(mut self, destination: &str, mode: u32, content: Content) -> Image {
        let path = destination.trim_start_matches('/').to_string();
        self.files.push(Entry { path, mode, content });
        self
    }

    /// Writes the image as one tar in the OCI layout.
    pub fn write(&self, target: &Path) -> Result<()> {
        let layer = self.layer()?;
        let layer_digest = digest(&layer);
        let config = serde_json::to_vec(&json!({
            "architecture": architecture()?, "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "User": self.user,
                       "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_digest}")]},
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &config),
            "layers": [descriptor(LAYER, &layer)],
        }))?;
        let mut described = descriptor(MANIFEST, &manifest);
        described["annotations"] = json!({"io.containerd.image.name": self.name});
        let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [described]}))?;
        let mut tar = Tar::default();
        tar.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        tar.file("index.json", 0o644, &index)?;
        for blob in [&layer, &config, &manifest] {
            tar.file(&format!("blobs/sha256/{}", digest(blob)), 0o644, blob)?;
        }
        fs::write(target, tar.finish()).with_context(|| format!("{}", target.display()))
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut tar = Tar::default();
        for Entry { path, mode, content } in &self.files {
            match content {
                Content::Folder => tar.folder(path, *mode)?,
                Content::Link(target) => tar.link(path, target)?,
                Content::Bytes(bytes) => tar.file(path, *mode, bytes)?,
                Content::Host(host) => {
                    let bytes = fs::read(host).with_context(|| format!("{}", host.display()))?;
                    tar.file(path, *mode, &bytes)?;
                }
            }
        }
        Ok(tar.finish())
    }
}

fn descriptor(media_type: &str, bytes: &[u8]) -> serde_json::Value {
    let digest = format!("sha256:{}", digest(bytes));
    json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
}

fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Go's word for this machine's processor.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("no image architecture is known for {other}"),
    }
}

/// What the dynamic loader would map, the loader itself included; nothing for a static program.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("failed to run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(missing) = text.lines().find(|line| line.contains("not found")) {
        bail!("{}: {}", program.display(), missing.trim());
    }
    // `libm.so.6 => /lib/.../libm.so.6 (0x…)`, or the loader's path alone.
    let paths = text.lines().filter_map(|line| {
        let path = line.split("=>").last()?.split_whitespace().next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    });
    Ok(paths.collect())
}

/// A POSIX `ustar` archive in memory.
#[derive(Default)]
struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.header(path, mode, content.len(), b'0', "")?;
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }

    fn folder(&mut self, path: &str, mode: u32) -> Result<()> {
        self.header(&format!("{path}/"), mode, 0, b'5', "")
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.header(path, 0o777, 0, b'2', target)
    }

    /// Field offsets are those of POSIX.1-1988; owner is root, time is 1970.
    fn header(&mut self, path: &str, mode: u32, size: usize, kind: u8, to: &str) -> Result<()> {
        let mut block = [0u8; BLOCK];
        if path.len() > 100 || to.len() > 100 {
            bail!("{path} is longer than the 100 bytes of a tar header");
        }
        block[..path.len()].copy_from_slice(path.as_bytes());
        block[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
        block[108..115].copy_from_slice(b"0000000");
        block[116..123].copy_from_slice(b"0000000");
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[136..147].copy_from_slice(b"00000000000");
        block[148..156].copy_from_slice(b"        ");
        block[156] = kind;
        block[157..157 + to.len()].copy_from_slice(to.as_bytes());
        block[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&block);
        Ok(())
    }

    fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(tar: &Path) -> String {
        let output = Command::new("tar").args(["-tvf"]).arg(tar).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn tar_reads_what_we_write() {
        let folder = std::env::temp_dir().join(format!("plimsoll-image-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let image =
            Image::named("localhost/a:1").text("/etc/greeting", "hello").link("/g", "etc/greeting");
        fs::write(folder.join("layer.tar"), image.layer().unwrap()).unwrap();
        let layer = listing(&folder.join("layer.tar"));
        assert!(layer.contains("drwxrwxrwt 0/0") && layer.contains("g -> etc/greeting"), "{layer}");
        image.write(&folder.join("image.tar")).unwrap();
        let whole = listing(&folder.join("image.tar"));
        assert_eq!(whole.matches("blobs/sha256/").count(), 3, "{whole}");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_linked_program_brings_the_loader() {
        let libraries = shared_libraries(&std::env::current_exe().unwrap()).unwrap();
        let is_loader = |path: &PathBuf| path.display().to_string().contains("ld-linux");
        assert!(libraries.iter().any(is_loader), "{libraries:?}");
    }

    #[test]
    fn a_path_that_no_header_holds_is_refused() {
        let image = Image::named("localhost/a:1").text(&"x".repeat(101), "");
        assert!(image.layer().is_err());
    }
}

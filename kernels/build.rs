//! Compiles each `cuda/*.cu` into one fatbin (sm_80, sm_89, sm_90a and PTX for what comes later) and
//! writes `images.rs` into `OUT_DIR`, through which the crate embeds them.
//!
//! Where no nvcc is found the build goes on without images, and the reason stands in `images.rs` for
//! the message at run time. An nvcc that fails fails the build, and so does a kernel that spills.
//! Nothing is downloaded here: `make cuda` does that.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The CUDA of the oldest driver we load on; PTX of a newer one would not load there.
const CUDA_MAJOR: &str = "13.";

/// A spill or a local array is an error.
const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O3",
    "-t2",
    "-fatbin",
    "--compress-mode=size",
    "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage,-Werror",
];

/// One SASS image per generation, and PTX of the oldest for cards that none of them fits (sm_90a
/// code runs on nothing else, so its PTX would not help).
const EVERYWHERE: &[&str] = &[
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_89,code=sm_89",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=compute_80",
];

/// For sources whose first line says so: what they use exists on Hopper alone, and another family does
/// the same elsewhere.
const HOPPER: &[&str] = &["-gencode=arch=compute_90a,code=sm_90a"];
const HOPPER_MARK: &str = "// Hopper only.";

fn main() {
    // A folder counts with all that lies in it; `make cuda` touches it so that nvcc is found at once.
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=build.rs");
    for variable in ["NVCC", "CUDA_HOME", "XDG_CACHE_HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let images = match find_nvcc() {
        Ok(nvcc) => {
            println!("cargo::rerun-if-changed={}", nvcc.path.display());
            let cuobjdump = nvcc.path.with_file_name("cuobjdump");
            if cuobjdump.exists() {
                println!("cargo::rustc-env=PLIMSOLL_CUOBJDUMP={}", cuobjdump.display());
            }
            compile_all(&nvcc, &out)
        }
        Err(reason) => format!(
            "pub(crate) const ABSENT: &str = {reason:?};\n\
             pub(crate) const IMAGES: &[(&str, &[u8])] = &[];\n"
        ),
    };
    fs::write(out.join("images.rs"), images).expect("OUT_DIR can be written");
}

struct Nvcc {
    path: PathBuf,
    version: String,
}

/// The first nvcc of `NVCC`, `CUDA_HOME`, the folder that `make cuda` fills, and `PATH`.
fn find_nvcc() -> Result<Nvcc, String> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(nvcc) = variable("NVCC") {
        return version_of(nvcc);
    }
    if let Some(home) = variable("CUDA_HOME") {
        return version_of(home.join("bin/nvcc"));
    }
    let cache =
        variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    let fetched = cache.map(|cache| cache.join("plimsoll/cuda/toolkit/bin/nvcc"));
    if let Some(nvcc) = fetched.filter(|nvcc| nvcc.exists()) {
        return version_of(nvcc);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join("nvcc"));
    match on_path.into_iter().find(|nvcc| nvcc.exists()) {
        Some(nvcc) => version_of(nvcc),
        None => Err("it was built where no nvcc was found".into()),
    }
}

fn version_of(path: PathBuf) -> Result<Nvcc, String> {
    let output = Command::new(&path).arg("--version").output();
    let output = output.map_err(|e| format!("{} did not start: {e}", path.display()))?;
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    let release = version.split_once("release ").map_or("unknown", |(_, rest)| rest);
    let release = release.split([',', '\n']).next().unwrap_or_default();
    if !release.starts_with(CUDA_MAJOR) {
        let path = path.display();
        return Err(format!("{path} is of CUDA {release}, and the kernels need {CUDA_MAJOR}x"));
    }
    Ok(Nvcc { path, version })
}

fn compile_all(nvcc: &Nvcc, out: &Path) -> String {
    let mut images = String::from(
        "pub(crate) const ABSENT: &str = \"\";\npub(crate) const IMAGES: &[(&str, &[u8])] = &[\n",
    );
    // A header counts for every source.
    let headers: String = files("cuh").iter().map(|path| text_of(path)).collect();
    for source in files("cu") {
        let name = source.file_stem().expect("a .cu file has a stem").to_string_lossy();
        let image = compile(nvcc, &source, &headers, &out.join(format!("{name}.fatbin")));
        writeln!(images, "    ({name:?}, include_bytes!({:?})),", image.display().to_string())
            .expect("writing to a string does not fail");
    }
    images + "];\n"
}

fn text_of(path: &Path) -> String {
    fs::read_to_string(path).expect("a source file can be read")
}

fn files(extension: &str) -> Vec<PathBuf> {
    let folder = fs::read_dir("cuda").expect("kernels/cuda lies beside build.rs");
    let mut sources: Vec<PathBuf> = folder
        .map(|entry| entry.expect("the folder can be read").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    sources.sort();
    sources
}

/// Compiles one source, unless an image of exactly this text, these flags and this nvcc is there.
fn compile(nvcc: &Nvcc, source: &Path, headers: &str, image: &Path) -> PathBuf {
    let text = text_of(source);
    let targets = if text.starts_with(HOPPER_MARK) { HOPPER } else { EVERYWHERE };
    let key = format!("{}\n{FLAGS:?}\n{targets:?}\n{headers}\n{text}", nvcc.version);
    let key_file = image.with_extension("key");
    if image.exists() && fs::read_to_string(&key_file).is_ok_and(|held| held == key) {
        return image.to_owned();
    }
    let output = Command::new(&nvcc.path)
        .args(FLAGS)
        .args(targets)
        .arg("-o")
        .arg(image)
        .arg(source)
        .output();
    let output = output.unwrap_or_else(|e| panic!("{} did not start: {e}", nvcc.path.display()));
    assert!(
        output.status.success(),
        "nvcc refused {}:\n{}{}",
        source.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    fs::write(key_file, key).expect("OUT_DIR can be written");
    image.to_owned()
}

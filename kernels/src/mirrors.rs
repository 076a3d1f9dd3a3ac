//! What Rust and the kernels both write down, compared by the CUDA compiler: sizes of structs, each field's offset and
//! width, constants. Only for tests, and without a device; what drifts is named.
//!
//! Beside its structs an op writes `mirrors! { "its_kernel.cu": Its { all, its, fields } }`, which is a test.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cuda::{Family, image};

/// What a source must agree to, as `static_assert`s.
pub(crate) struct Claims {
    source: &'static str,
    asserts: String,
}

impl Claims {
    /// Of a file under `cuda/`.
    pub(crate) fn new(source: &'static str) -> Self {
        Self { source, asserts: String::new() }
    }

    pub(crate) fn equal(&mut self, what: &str, value: usize) {
        writeln!(self.asserts, "static_assert({what} == {value}, \"Rust has {value}: {what}\");")
            .expect("writing to a string does not fail");
    }

    /// Panics with what the compiler says where the source does not agree.
    pub(crate) fn hold(&self) {
        let Some(nvcc) = nvcc() else { return };
        if let Some(refusal) = self.refusal(&nvcc) {
            panic!("{} disagrees:\n{refusal}", self.source);
        }
    }

    fn refusal(&self, nvcc: &Path) -> Option<String> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let stem = format!("mirror-{}-{number}", std::process::id());
        let [text, out] =
            ["cu", "ptx"].map(|kind| std::env::temp_dir().join(format!("{stem}.{kind}")));
        let Self { source, asserts } = self;
        std::fs::write(&text, format!("#include <cstddef>\n#include \"{source}\"\n{asserts}"))
            .unwrap();
        let output = Command::new(nvcc)
            .args(["-std=c++17", "-ptx", "-arch=compute_90a", "-Xcicc", "-O0"])
            .arg(format!("-I{}/cuda", env!("CARGO_MANIFEST_DIR")))
            .arg("-o")
            .arg(&out)
            .arg(&text)
            .output()
            .unwrap();
        let _ = (std::fs::remove_file(&text), std::fs::remove_file(&out));
        let said = [output.stdout, output.stderr].concat();
        (!output.status.success()).then(|| String::from_utf8_lossy(&said).into_owned())
    }
}

/// The width of the field that a closure borrows.
pub(crate) fn width<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// The compiler that built the kernels; none if this build had none, which CI does not allow.
fn nvcc() -> Option<PathBuf> {
    let cuobjdump = option_env!("PLIMSOLL_CUOBJDUMP");
    if cuobjdump.is_none() {
        let reason = image(Family::ALL[0]).err().map(|missing| missing.to_string());
        let reason = reason.unwrap_or_else(|| "no cuobjdump beside nvcc".into());
        let required = std::env::var("PLIMSOLL_REQUIRE_CUDA_BUILD").is_ok_and(|value| value == "1");
        assert!(!required, "PLIMSOLL_REQUIRE_CUDA_BUILD=1, but {reason}");
        eprintln!("left out: {reason}");
    }
    cuobjdump.map(|path| Path::new(path).with_file_name("nvcc"))
}

/// A test that structs have the same fields on both sides of a source; a field that is left out does not compile.
/// `Here as "There"` where names differ, of structs and fields.
macro_rules! mirrors {
    ($source:literal: $($name:ident $(as $there:literal)? { $($field:ident $(as $field_there:literal)?),* $(,)? })*) => {
        #[cfg(test)]
        mod mirrors {
            #[allow(unused_imports, reason = "some files list what lies beside")]
            use super::*;

            #[test]
            fn rust_and_the_kernel_agree_on_every_field() {
                let mut claims = crate::mirrors::Claims::new($source);
                $({
                    let _all_are_listed = |$name { $($field: _),* }: $name| ();
                    let name = [$($there,)? stringify!($name)][0];
                    claims.equal(&format!("sizeof({name})"), size_of::<$name>());
                    $(
                        let field = [$($field_there,)? stringify!($field)][0];
                        claims.equal(
                            &format!("offsetof({name}, {field})"),
                            std::mem::offset_of!($name, $field),
                        );
                        claims.equal(
                            &format!("sizeof({name}::{field})"),
                            crate::mirrors::width(|it: &$name| &it.$field),
                        );
                    )*
                })*
                claims.hold();
            }
        }
    };
}
pub(crate) use mirrors;

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::ops::gemm::GemmArguments;

    #[test]
    fn a_field_that_moved_is_named() {
        let Some(nvcc) = nvcc() else { return };
        let mut claims = Claims::new("gemm.cuh");
        claims.equal("offsetof(GemmArguments, eps)", offset_of!(GemmArguments, eps) + 4);
        let refusal = claims.refusal(&nvcc).expect("four bytes too far");
        assert!(refusal.contains("offsetof(GemmArguments, eps)"), "{refusal}");
    }

    #[test]
    fn every_struct_that_the_device_sees_is_compared() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let listed = text.split_once("mirrors! {").map_or("", |(_, list)| list);
            for (at, _) in text.match_indices("#[repr(C)]") {
                let (_, rest) = text[at..].split_once("struct ").expect("it stands on a struct");
                let name = rest.split(|c: char| !c.is_alphanumeric()).next().unwrap();
                let compared = [" {", " as "].map(|after| format!("    {name}{after}"));
                assert!(
                    compared.iter().any(|line| listed.contains(line)),
                    "{} does not list {name} in mirrors!",
                    path.display()
                );
            }
        }
    }
}

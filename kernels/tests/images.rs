//! What the compiler made of the kernels, read back without a device: every architecture is there,
//! none uses more than its budget, and the hot loads are as wide as they were written.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use plimsoll_kernels::cuda::{Family, image};

/// The toolkit's reader of images; none if this build had no nvcc, which CI does not allow.
fn cuobjdump() -> Option<&'static str> {
    let found = option_env!("PLIMSOLL_CUOBJDUMP");
    if found.is_none() {
        let reason = image(Family::ALL[0]).err().map(|missing| missing.to_string());
        let reason = reason.unwrap_or_else(|| "no cuobjdump beside nvcc".into());
        let required = std::env::var("PLIMSOLL_REQUIRE_CUDA_BUILD").is_ok_and(|value| value == "1");
        assert!(!required, "PLIMSOLL_REQUIRE_CUDA_BUILD=1, but {reason}");
        eprintln!("left out: {reason}");
    }
    found
}

fn dump(cuobjdump: &str, family: Family, option: &str) -> String {
    let name = format!("{}-{}{option}.fatbin", family.name(), std::process::id());
    let file: PathBuf = std::env::temp_dir().join(name);
    std::fs::write(&file, image(family).unwrap()).unwrap();
    let output = Command::new(cuobjdump).arg(option).arg(&file).output().unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// `REG:53 STACK:0 …` as a map; `CONSTANT[0]:384` and its like keep their index in the name.
fn usage(line: &str) -> BTreeMap<&str, u32> {
    let pairs = line.split_whitespace().filter_map(|word| word.split_once(':'));
    pairs.map(|(name, value)| (name, value.parse().unwrap())).collect()
}

/// Usage by (kernel, architecture), as cuobjdump lists it.
fn measured(listing: &str) -> BTreeMap<(String, String), BTreeMap<&str, u32>> {
    let mut found = BTreeMap::new();
    let (mut architecture, mut kernel) = ("", "");
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("arch = ") {
            architecture = name;
        } else if let Some(name) = line.strip_prefix("Function ") {
            kernel = name.trim_end_matches(':');
        } else if line.starts_with("REG:") {
            found.insert((kernel.to_owned(), architecture.to_owned()), usage(line));
        }
    }
    found
}

/// `cuda/budget/<family>.txt`: kernel, image, registers of a thread, static shared memory of a block (on sm_90a
/// the system's own 1,024 bytes included). Local memory and stack are always 0.
fn budget_file(family: Family) -> PathBuf {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/budget");
    std::path::Path::new(folder).join(format!("{}.txt", family.name()))
}

/// `PLIMSOLL_WRITE_BUDGET=1` writes what is measured instead of comparing; read the difference before committing it.
#[test]
fn every_kernel_stays_within_its_committed_budget_on_every_architecture() {
    let Some(cuobjdump) = cuobjdump() else { return };
    let write = std::env::var("PLIMSOLL_WRITE_BUDGET").is_ok_and(|value| value == "1");
    for family in Family::ALL {
        let listing = dump(cuobjdump, family, "--dump-resource-usage");
        let mut found = measured(&listing);
        for (key, used) in &found {
            assert_eq!((used["STACK"], used["LOCAL"]), (0, 0), "{key:?} spills: {used:?}");
        }
        if write {
            let line = |((kernel, image), used): (&(String, String), &BTreeMap<&str, u32>)| {
                format!("{kernel} {image} {} {}\n", used["REG"], used["SHARED"])
            };
            std::fs::write(budget_file(family), found.iter().map(line).collect::<String>())
                .unwrap();
        }
        // A family without kernels needs no file.
        let budget = std::fs::read_to_string(budget_file(family)).unwrap_or_default();
        for line in budget.lines() {
            let [kernel, architecture, registers, shared] =
                line.split_whitespace().collect::<Vec<_>>().try_into().expect("four columns");
            let key = (kernel.to_owned(), architecture.to_owned());
            let used = found.remove(&key).unwrap_or_else(|| panic!("no image of {key:?}"));
            assert!(used["REG"] <= registers.parse().unwrap(), "{key:?} uses {used:?}");
            assert!(used["SHARED"] <= shared.parse().unwrap(), "{key:?} uses {used:?}");
        }
        assert!(found.is_empty(), "no budget for {:?}", found.keys());
    }
}

/// Machine code by (kernel, architecture), as cuobjdump lists it.
fn code(listing: &str) -> BTreeMap<(String, String), String> {
    let mut found: BTreeMap<(String, String), String> = BTreeMap::new();
    let (mut architecture, mut kernel) = ("", None);
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("arch = ") {
            (architecture, kernel) = (name, None);
        } else if let Some(name) = line.strip_prefix("Function : ") {
            kernel = Some((name.to_owned(), architecture.to_owned()));
        } else if let Some(kernel) = &kernel {
            let text = found.entry(kernel.clone()).or_default();
            text.push_str(line);
            text.push('\n');
        }
    }
    found
}

/// Whether an instruction is there, in any of its forms: `LDSM` is in `LDSM.16.M88.4`, and not in `UTMALDSM`.
fn uses(code: &str, instruction: &str) -> bool {
    code.match_indices(instruction).any(|(at, _)| {
        let (before, after) = (&code[..at], &code[at + instruction.len()..]);
        before.ends_with(' ') && after.starts_with(['.', ' ', ';'])
    })
}

/// What a kernel must be made of, whatever else it contains: the matrix units, wide copies, and no memory of a
/// thread's own.
#[test]
fn every_kernel_is_made_of_the_instructions_it_was_written_for() {
    let Some(cuobjdump) = cuobjdump() else { return };
    for family in Family::ALL {
        let code = code(&dump(cuobjdump, family, "-sass"));
        let expected: &[&str] = match family {
            Family::GemmStream | Family::GemmTile => &["HGMMA", "UBLKCP"],
            Family::GemmPortable => &["HMMA", "LDSM", "LDGSTS", "LDGDEPBAR"],
            Family::AttentionHopper => &["HGMMA"],
            Family::AttentionMany => &["HMMA", "UBLKCP"],
            _ => &[],
        };
        for (kernel, code) in &code {
            assert!(code.contains("EXIT"), "{kernel:?} has no code");
            for instruction in expected {
                assert!(uses(code, instruction), "{kernel:?} is without {instruction}");
            }
            for spill in ["LDL", "STL"] {
                assert!(!uses(code, spill), "{kernel:?} uses local memory");
            }
            // ptxas 13.0 gives cp.async with a cache policy and a uniform address a descriptor that begins at an odd
            // register; the card calls that an illegal instruction.
            for odd in ["UR1]", "UR3]", "UR5]", "UR7]", "UR9]"] {
                assert!(!code.contains(&format!("desc[{odd}")), "{kernel:?}: {odd} cannot be run");
            }
        }
    }
}

#[test]
fn an_instruction_is_found_by_its_whole_name() {
    let line = "/*0a00*/ @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;";
    assert!(uses(line, "LDGSTS") && !uses(line, "LDG") && !uses(line, "STS"));
    assert!(uses("/*0*/ EXIT ;", "EXIT") && uses("/*0*/ HGMMA.64x8x16.F32.BF16 R4", "HGMMA"));
}

#[test]
fn every_family_carries_ptx_for_architectures_that_are_yet_to_come() {
    let Some(cuobjdump) = cuobjdump() else { return };
    for family in Family::ALL.into_iter().filter(|family| !family.is_hopper_only()) {
        let listing = dump(cuobjdump, family, "-lptx");
        assert!(listing.contains("sm_80.ptx"), "{}: {listing}", family.name());
    }
}

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
        let reason = image(Family::RmsNorm).err().map(|missing| missing.to_string());
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

#[test]
fn every_kernel_stays_within_its_committed_budget_on_every_architecture() {
    let Some(cuobjdump) = cuobjdump() else { return };
    let listings: Vec<String> =
        Family::ALL.iter().map(|&f| dump(cuobjdump, f, "--dump-resource-usage")).collect();
    let mut found = BTreeMap::new();
    for listing in &listings {
        found.extend(measured(listing));
    }
    let budget = include_str!("../cuda/budget.txt");
    for line in budget.lines().filter(|line| !line.starts_with('#')) {
        let [kernel, architecture, registers, shared] =
            line.split_whitespace().collect::<Vec<_>>().try_into().expect("four columns");
        let key = (kernel.to_owned(), architecture.to_owned());
        let used = found.remove(&key).unwrap_or_else(|| panic!("no image of {key:?}"));
        assert!(used["REG"] <= registers.parse().unwrap(), "{key:?} uses {used:?}");
        assert!(used["SHARED"] <= shared.parse().unwrap(), "{key:?} uses {used:?}");
        assert_eq!((used["STACK"], used["LOCAL"]), (0, 0), "{key:?} spills: {used:?}");
    }
    assert!(found.is_empty(), "no budget for {:?}", found.keys());
}

#[test]
fn every_family_carries_ptx_for_architectures_that_are_yet_to_come() {
    let Some(cuobjdump) = cuobjdump() else { return };
    for family in Family::ALL {
        let listing = dump(cuobjdump, family, "-lptx");
        assert!(listing.contains("sm_80.ptx"), "{}: {listing}", family.name());
    }
}

#[test]
fn rms_norm_moves_sixteen_bytes_at_a_time() {
    let Some(cuobjdump) = cuobjdump() else { return };
    let sass = dump(cuobjdump, Family::RmsNorm, "-sass");
    for architecture in sass.split("arch = ").skip(1).filter(|part| part.contains("Function")) {
        let count = |opcode| architecture.matches(opcode).count();
        // Four vectors of the row and four of the weight in; four vectors out.
        assert_eq!(count("LDG.E.128"), 8, "{}", &architecture[..6]);
        assert_eq!(count("STG.E.128"), 4, "{}", &architecture[..6]);
    }
}

use std::collections::BTreeMap;
use std::fs;

use plimsoll_contract::abilities::{Backend, Dtype};
use plimsoll_contract::facts::{Family, ParametersByRole};

use super::*;

const CPU: Ability = Ability::plain(Backend::Cpu, Dtype::F32);
const LIMITS: StepLimits = StepLimits { step_tokens_max: 512, running_max: 32 };

fn facts() -> ModelFacts {
    ModelFacts {
        family: Family::Llama,
        architecture: "LlamaForCausalLM".into(),
        revision: None,
        parameters: ParametersByRole { embedding: 1 << 30, ..ParametersByRole::default() },
        disk_bytes: BTreeMap::new(),
        quantization: None,
        layers: 16,
        hidden: 2048,
        intermediate: 8192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 128_256,
        context_tokens: 8192,
        tied_head: true,
        sliding_window: None,
        chat_template: true,
        tokenizer_bytes: 1 << 20,
    }
}

const GIB: u64 = 1 << 30;

#[test]
fn spare_memory_becomes_pages_and_never_more_than_there_is() {
    for available in [5 * GIB, 6 * GIB, 7 * GIB + 12_345] {
        let plan = fit(&facts(), CPU, LIMITS, None, available, 8192).unwrap();
        assert!(plan.total() <= available, "{plan:?}");
        let page = 64 * 2 * 16 * 8 * 64 * 4;
        assert!(plan.total() + page > available, "one more page would not fit: {plan:?}");
        assert_eq!(plan.kv_tokens % 64, 0);
    }
}

#[test]
fn abundance_does_not_become_pages_that_nobody_can_fill() {
    let plan = fit(&facts(), CPU, LIMITS, None, 1 << 50, 8192).unwrap();
    assert_eq!(plan.kv_tokens, 2 * 32 * 8192);
}

#[test]
fn a_refusal_shows_every_summand_and_the_remedy() {
    let error = fit(&facts(), CPU, LIMITS, None, 2 * GIB, 8192).unwrap_err().to_string();
    for part in ["weights 4.00 GiB", "workspace", "process", "KV", "2.00 GiB is available", "f16"] {
        assert!(error.contains(part), "{error}");
    }
    let error = fit(&facts(), CPU, LIMITS, Some(1 << 20), 8 * GIB, 8192).unwrap_err().to_string();
    assert!(error.contains("1048576 tokens") && error.contains("--kv-tokens"), "{error}");
}

#[test]
fn a_large_tokenizer_is_part_of_the_process_share() {
    let process = |tokenizer_bytes| {
        let facts = ModelFacts { tokenizer_bytes, ..facts() };
        fit(&facts, CPU, LIMITS, Some(64), 8 * GIB, 8192).unwrap().process
    };
    assert_eq!(process(200 << 10), 256 << 20);
    assert_eq!(process(9 << 20), (256 + 8 * 14) << 20);
    // Facts that do not know its length take what a vocabulary of this size usually has.
    assert_eq!(process(0), (256 << 20) + 14 * (128_256 * 64 - (1 << 20)));
}

/// A root directory with what the kernel would show.
fn root(name: &str, files: &[(&str, &str)]) -> std::path::PathBuf {
    let root = std::env::temp_dir().join(format!("plimsoll-memory-{name}-{}", std::process::id()));
    for (path, text) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    root
}

const MEMINFO: (&str, &str) =
    ("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\nSwapFree: 0 kB\n");

fn available(name: &str, files: &[(&str, &str)]) -> Option<u64> {
    let root = root(name, files);
    let bytes = available_bytes(&root);
    fs::remove_dir_all(root).unwrap();
    bytes
}

#[test]
fn without_a_limit_the_system_decides() {
    let files = [MEMINFO, ("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/memory.max", "max\n")];
    assert_eq!(available("none", &files), Some(8000 * 1024));
    assert_eq!(available("bare", &[MEMINFO]), Some(8000 * 1024));
}

#[test]
fn the_tightest_limit_of_all_ancestors_binds_and_page_cache_does_not_count() {
    let files = [
        MEMINFO,
        ("proc/self/cgroup", "0::/pods/a\n"),
        ("sys/fs/cgroup/pods/memory.max", "3000000\n"),
        ("sys/fs/cgroup/pods/memory.current", "1500000\n"),
        (
            "sys/fs/cgroup/pods/memory.stat",
            "anon 1000000\ninactive_file 400000\nactive_file 100000\n",
        ),
        ("sys/fs/cgroup/pods/a/memory.max", "max\n"),
        ("sys/fs/cgroup/pods/a/memory.current", "1000\n"),
    ];
    assert_eq!(available("v2", &files), Some(2_000_000));
}

#[test]
fn the_older_kind_of_group_is_read_too() {
    let files = [
        MEMINFO,
        ("proc/self/cgroup", "5:cpu:/x\n4:memory:/a\n"),
        ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2000000\n"),
        ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "500000\n"),
    ];
    assert_eq!(available("v1", &files), Some(1_500_000));
}

#[test]
fn the_peak_leaves_out_files_that_are_only_mapped() {
    let root = std::env::temp_dir().join(format!("plimsoll-peak-{}", std::process::id()));
    fs::create_dir_all(root.join("proc/self")).unwrap();
    let status = "Name:\tengine\nVmHWM:\t    3072 kB\nVmRSS:\t    2048 kB\nRssFile:\t    1024 kB\n";
    fs::write(root.join("proc/self/status"), status).unwrap();
    assert_eq!(peak_bytes(&root), Some(2 << 20));
    fs::write(root.join("proc/self/status"), "Name:\tengine\n").unwrap();
    assert_eq!(peak_bytes(&root), None);
    fs::remove_dir_all(root).unwrap();
}

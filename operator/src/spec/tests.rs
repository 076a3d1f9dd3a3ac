//! The door, as tables.

use plimsoll_contract::abilities::{CacheStrategy, KvDtype, Quantization};
use serde_json::json;

use super::*;

fn object(spec: Value) -> LLMDeployment {
    serde_json::from_value(json!({
        "apiVersion": "plimsoll.dev/v1alpha1", "kind": "LLMDeployment",
        "metadata": {"name": "assistant"}, "spec": spec,
    }))
    .unwrap()
}

#[test]
fn five_lines_are_enough() {
    let spec = Spec::parse(&object(json!({"model": {"source": "hf://a/b"}}))).unwrap();
    assert_eq!(spec.served_name, "assistant");
    assert_eq!(spec.replicas, 1);
    assert_eq!(spec.drain_seconds, 60);
    assert!(spec.prefix_reuse);
    assert_eq!(spec.storage.size, "20Gi");
    assert_eq!(spec.context_tokens, None);
    assert_eq!(spec.budget, Budget::default());
}

#[test]
fn every_field_arrives() {
    let spec = Spec::parse(&object(json!({
        "model": {"source": "hf://a/b@v1", "name": "org/chat",
            "credentials": {"secretRef": {"name": "hf", "key": "t"}}},
        "auth": {"apiKeysSecretRef": {"name": "keys"}},
        "workload": {"promptTokens": 1000, "outputTokens": 200, "concurrency": 4},
        "contextTokens": 4096,
        "cache": {"dtype": "F16", "tokens": 8192, "prefixReuse": false},
        "replicas": 3,
        "storage": {"accessMode": "ReadWriteMany", "size": "50Gi", "storageClassName": "nfs"},
        "resources": {"cpu": 2, "memory": "4Gi"},
        "rollout": {"drainSeconds": 5},
        "suspend": true,
        "podTemplate": {"metadata": {"labels": {"team": "a"}}},
    })))
    .unwrap();
    assert_eq!(spec.source, Source::Hub { repo: "a/b".into(), revision: "v1".into() });
    assert_eq!(spec.served_name, "org/chat");
    assert_eq!(spec.credentials, Some(SecretKey { name: "hf".into(), key: "t".into() }));
    assert_eq!(spec.api_keys, Some(SecretKey { name: "keys".into(), key: "keys".into() }));
    assert_eq!(
        spec.workload,
        Workload { prompt_tokens: Some(1000), output_tokens: Some(200), concurrency: Some(4) }
    );
    assert_eq!(spec.context_tokens, Some(4096));
    assert_eq!((spec.preferences.cache_dtype, spec.cache_tokens), (Some(KvDtype::F16), Some(8192)));
    assert!(!spec.prefix_reuse && spec.suspend);
    assert_eq!(spec.replicas, 3);
    assert_eq!(spec.storage.access_mode, AccessMode::ReadWriteMany);
    assert_eq!(spec.budget, Budget { cpu_millis: Some(2000), memory_bytes: Some(4 << 30) });
    assert_eq!(spec.drain_seconds, 5);
    assert!(spec.pod_template.is_some());
}

#[test]
fn all_problems_are_told_at_once_each_with_its_field() {
    let error = Spec::parse(&object(json!({
        "model": {"source": "s3://bucket", "name": "a b"},
        "contextTokens": 4096,
        "cache": {"tokens": 1024},
        "workload": {"promptTokens": 4000, "outputTokens": 1000},
        "replicas": -1,
        "storage": {"size": "lots"},
        "resources": {"memory": "4gb"},
    })))
    .unwrap_err();
    let fields: Vec<_> = error.problems.iter().map(|problem| problem.field.as_str()).collect();
    for field in [
        "spec.model.source",
        "spec.model.name",
        "spec.replicas",
        "spec.storage.size",
        "spec.resources.memory",
        "spec.storage",
        "spec.workload",
        "spec.cache.tokens",
    ] {
        assert!(fields.contains(&field), "{field} in {fields:?}");
    }
    assert!(error.to_string().contains("hf://"), "{error}");
}

#[test]
fn a_name_that_cannot_name_a_service_is_refused() {
    for name in ["9lives", "Upper", "a_b", "trailing-", &"a".repeat(54)] {
        let mut object = object(json!({"model": {"source": "hf://a/b"}}));
        object.metadata.name = Some(name.to_owned());
        let error = Spec::parse(&object).unwrap_err();
        assert_eq!(error.problems[0].field, "metadata.name", "{name}");
    }
}

#[test]
fn what_plans_have_to_keep_arrives_in_the_planners_units() {
    let spec = Spec::parse(&object(json!({
        "model": {"source": "hf://a/b"},
        "objective": "Cost",
        "slo": {"ttftMilliseconds": 500, "tpotMilliseconds": 40},
        "quantization": "W8A8-FP8",
        "quality": {"minWeightBits": 4},
        "tensorParallel": 2,
        "accelerators": {"classes": ["nvidia-h200"], "maxGPUs": 8},
        "cache": {"strategy": "SlidingWindow", "dtype": "FP8"},
    })))
    .unwrap();
    let found = spec.preferences;
    assert_eq!(found.objective, Some(crds::Objective::Cost));
    assert_eq!((found.slo.ttft, found.slo.tpot), (Some(500_000), Some(40_000)));
    assert_eq!(found.quantization, Some(Quantization::W8A8Fp8));
    assert_eq!((found.quality.weight_bits, found.quality.kv_bits), (4, 8));
    assert_eq!((found.tensor_parallel, found.gpus_max), (Some(2), Some(8)));
    assert_eq!(found.classes, ["nvidia-h200"]);
    assert_eq!(found.cache_strategy, Some(CacheStrategy::SlidingWindow));
    assert_eq!(found.cache_dtype, Some(KvDtype::Fp8));
    let usual = Spec::parse(&object(json!({"model": {"source": "hf://a/b"},
        "quantization": "Auto", "cache": {"strategy": "Auto", "dtype": "Auto"}})));
    assert_eq!(usual.unwrap().preferences, Preferences::default());
}

#[test]
fn what_no_plan_could_keep_is_refused_by_field() {
    for (fields, field) in [
        (json!({"slo": {"tpotMilliseconds": 0}}), "spec.slo.tpotMilliseconds"),
        (json!({"slo": {"ttftMilliseconds": 9_000_000}}), "spec.slo.ttftMilliseconds"),
        (json!({"quality": {"minWeightBits": 2}}), "spec.quality.minWeightBits"),
        (json!({"quality": {"minKvBits": 64}}), "spec.quality.minKvBits"),
        (json!({"tensorParallel": 17}), "spec.tensorParallel"),
        (json!({"accelerators": {"maxGPUs": -1}}), "spec.accelerators.maxGPUs"),
        (json!({"accelerators": {"classes": [""]}}), "spec.accelerators.classes"),
    ] {
        let mut spec = json!({"model": {"source": "hf://a/b"}});
        spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let error = Spec::parse(&object(spec)).unwrap_err();
        let fields: Vec<_> = error.problems.iter().map(|problem| problem.field.as_str()).collect();
        assert_eq!(fields, [field]);
    }
}

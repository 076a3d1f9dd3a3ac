use serde_json::json;

use super::*;

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024
    })
}

fn with(mut json: Value, changes: &[(&str, Value)]) -> Value {
    for (field, value) in changes {
        json[*field] = value.clone();
    }
    json
}

fn qwen2(changes: &[(&str, Value)]) -> Config {
    let base = with(llama(), &[("architectures", json!(["Qwen2ForCausalLM"]))]);
    Config::parse(&with(base, changes)).unwrap()
}

#[test]
fn old_and_new_rope_fields_mean_the_same() {
    let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128});
    let old = with(scaling.clone(), &[("rope_type", json!("llama3"))]);
    let oldest = with(scaling.clone(), &[("type", json!("llama3"))]);
    let new = with(old.clone(), &[("rope_theta", json!(5e5))]);
    let parse = |changes: &[(&str, Value)]| Config::parse(&with(llama(), changes)).unwrap().rope;
    let want = Rope {
        theta: 5e5,
        scaling: Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 128,
        },
    };
    assert_eq!(parse(&[("rope_theta", json!(5e5)), ("rope_scaling", old)]), want);
    assert_eq!(parse(&[("rope_theta", json!(5e5)), ("rope_scaling", oldest)]), want);
    assert_eq!(parse(&[("rope_parameters", new)]), want);
    let plain = Rope { theta: 10_000.0, scaling: Scaling::Default };
    assert_eq!(parse(&[]), plain, "the first checkpoints say nothing");
    assert_eq!(parse(&[("rope_scaling", Value::Null)]), plain);
}

#[test]
fn what_a_family_fixes_is_not_read_from_the_file() {
    let config = qwen2(&[("attention_bias", json!(false))]);
    assert!(config.qkv_bias && !config.output_bias && !config.qk_norm);
    let qwen3 = with(llama(), &[("architectures", json!(["Qwen3ForCausalLM"]))]);
    let config = Config::parse(&qwen3).unwrap();
    assert!(config.qk_norm && !config.qkv_bias);
    assert_eq!(config.head_dim, 128, "Qwen3's own default, not hidden / heads");
    let mistral = with(llama(), &[("architectures", json!(["MistralForCausalLM"]))]);
    assert_eq!(Config::parse(&mistral).unwrap().windows, [Some(4096); 4], "absent: the default");
    let mistral = with(mistral, &[("sliding_window", Value::Null)]);
    assert_eq!(Config::parse(&mistral).unwrap().windows, [None; 4], "null: none");
}

#[test]
fn windows_follow_layer_types_or_the_first_windowed_layer_and_only_when_used() {
    let window = ("sliding_window", json!(70));
    let used = ("use_sliding_window", json!(true));
    assert_eq!(qwen2(std::slice::from_ref(&window)).windows, [None; 4]);
    let first = ("max_window_layers", json!(3));
    let windows = qwen2(&[window.clone(), used.clone(), first.clone()]).windows;
    assert_eq!(windows, [None, None, None, Some(70)]);
    let (full, sliding) = ("full_attention", "sliding_attention");
    let types = ("layer_types", json!([sliding, full, sliding, full]));
    let windows = qwen2(&[window, used, first, types]).windows;
    assert_eq!(windows, [Some(70), None, Some(70), None], "names win over the number");
}

#[test]
fn the_context_includes_what_yarn_stretches() {
    let yarn = |positions: usize| {
        let scaling =
            json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256});
        let changes = [("max_position_embeddings", json!(positions)), ("rope_scaling", scaling)];
        Config::parse(&with(llama(), &changes)).unwrap().context_tokens
    };
    assert_eq!(yarn(256), 1024, "stated before stretching");
    assert_eq!(yarn(1024), 1024, "stated after it");
}

#[test]
fn what_is_not_run_is_refused_by_name_with_a_remedy() {
    let cases = [
        (vec![("architectures", json!(["GemmaForCausalLM"]))], "architectures is GemmaForCausalLM"),
        (vec![("architectures", Value::Null)], "architectures is absent"),
        (vec![("quantization_config", json!({"quant_method": "gptq"}))], "is gptq"),
        (vec![("hidden_act", json!("gelu"))], "hidden_act is gelu"),
        (vec![("partial_rotary_factor", json!(0.5))], "partial_rotary_factor is 0.5"),
        (vec![("rope_scaling", json!({"type": "dynamic", "factor": 2.0}))], "rope_type is dynamic"),
        (vec![("rope_scaling", json!({"type": "yarn", "mscale": 0.7}))], "mscale is 0.7"),
    ];
    for (changes, message) in cases {
        let error = Config::parse(&with(llama(), &changes)).unwrap_err();
        assert!(matches!(error, LoadError::UnsupportedModel { .. }), "{error}");
        assert!(error.to_string().contains(message), "{error}");
        assert!(error.to_string().contains("choose") || error.to_string().contains("remove"));
    }
}

#[test]
fn nonsense_is_refused_with_field_and_finding() {
    let cases = [
        ("hidden_size", json!(0), "hidden_size to be a number from 1"),
        ("hidden_size", json!(66), "multiple of num_attention_heads"),
        ("hidden_size", json!(-4), "found -4"),
        ("hidden_size", json!(1e300), "found 1e"),
        ("num_hidden_layers", json!(u64::MAX), "found 18446744073709551615"),
        ("num_key_value_heads", json!(3), "a divisor of num_attention_heads"),
        ("head_dim", json!(7), "an even number"),
        ("head_dim", json!(4096), "from 1 to 256"),
        ("rms_norm_eps", json!("tiny"), "a positive number"),
        ("tie_word_embeddings", json!("yes"), "true or false"),
        ("vocab_size", Value::Null, "found null"),
        ("rope_scaling", json!([1]), "an object"),
        ("rope_scaling", json!({"type": "linear"}), "rope_scaling.factor"),
        ("rope_theta", json!(0.5), "above 1"),
    ];
    for (field, value, message) in cases {
        let error = Config::parse(&with(llama(), &[(field, value)])).unwrap_err();
        assert!(matches!(error, LoadError::CorruptWeights { .. }), "{error}");
        assert!(error.to_string().contains(message), "{error}");
    }
    assert!(Config::parse(&json!([])).is_err());
}

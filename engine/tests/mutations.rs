//! The golden gate must notice a wrong model. Each test makes one mistake in the layer plan or the weights, the way an
//! engine would make it, and demands that the log-probabilities leave the gate by far.

#![allow(clippy::unwrap_used)]

mod support;

use plimsoll_contract::abilities::Dtype;
use plimsoll_engine::model::{Checkpoint, Plan};
use plimsoll_kernels::reference::rope::{Scaling, frequencies};
use support::*;

const WINDOWED: [&str; 2] = ["mistral-window", "qwen2-window"];

/// How far the golden log-probabilities are from what `checkpoint` gives.
fn distance(case: &str, checkpoint: &Checkpoint) -> f64 {
    let golden = Golden::read(&golden_dir(case).join("golden.json"));
    let mut driver = Driver::new(backend(checkpoint, Dtype::F32, 40));
    let sequence = Sequence::new(0, &golden.tokens, 3);
    // Two chunks: a query of the first then really can look at what the second has not written.
    let half = golden.tokens.len() / 2;
    let mut got = logprobs(&driver.step(vec![], vec![sequence.span(0..half, true)])[0]);
    let rest = sequence.span(half..golden.tokens.len(), false);
    got.extend(logprobs(&driver.step(vec![], vec![rest])[0]));
    mean_difference(&got, &golden.logprobs)
}

fn fails(cases: &[&str], mistake: impl Fn(&mut Plan)) {
    for case in cases {
        let mut checkpoint = open(&golden_dir(case));
        assert!(distance(case, &checkpoint) <= GATE, "{case} is right before the mistake");
        mistake(&mut checkpoint.plan);
        let distance = distance(case, &checkpoint);
        println!("{case}: {distance:.3}");
        assert!(distance > 10.0 * GATE, "{case}: only {distance:.2e} from the golden");
    }
}

fn scaling_of(case: &str) -> (f64, usize) {
    let config = open(&golden_dir(case)).config;
    (config.rope.theta, config.head_dim)
}

#[test]
fn a_model_without_rope_fails_the_gate() {
    fails(&CASES, |plan| plan.rope.inverse.fill(0.0));
}

#[test]
fn a_mask_that_shows_the_next_token_fails_the_gate() {
    fails(&CASES, |plan| plan.layers.iter_mut().for_each(|l| l.attention.sight.ahead = 1));
}

#[test]
fn a_forgotten_window_fails_the_gate() {
    fails(&WINDOWED, |plan| plan.layers.iter_mut().for_each(|l| l.attention.sight.window = None));
}

#[test]
fn a_window_off_by_one_fails_the_gate() {
    for change in [-1isize, 1] {
        fails(&WINDOWED, |plan| {
            for layer in &mut plan.layers {
                let window = &mut layer.attention.sight.window;
                *window = window.map(|tokens| tokens.strict_add_signed(change));
            }
        });
    }
}

#[test]
fn a_window_on_the_wrong_layers_fails_the_gate() {
    fails(&["qwen2-window"], |plan| plan.layers.swap(0, 2));
}

#[test]
fn unscaled_rope_fails_the_gate() {
    for case in ["llama3-rope", "llama-linear", "llama-yarn", "qwen3-yarn"] {
        let (theta, dims) = scaling_of(case);
        fails(&[case], |plan| {
            plan.rope.inverse = frequencies(theta, dims, &Scaling::Default).inverse
        });
    }
}

#[test]
fn a_forgotten_attention_factor_of_yarn_fails_the_gate() {
    fails(&["llama-yarn", "qwen3-yarn"], |plan| plan.rope.attention_factor = 1.0);
}

#[test]
fn forgotten_biases_and_head_norms_fail_the_gate() {
    fails(&["qwen2-bias", "qwen2-window"], |plan| {
        plan.layers.iter_mut().for_each(|l| l.attention.qkv_bias = false);
    });
    fails(&["qwen3-qknorm", "qwen3-yarn"], |plan| {
        plan.layers.iter_mut().for_each(|l| l.attention.qk_norm = false);
    });
}

#[test]
fn swapped_kv_heads_fail_the_gate() {
    for case in CASES {
        let dir = Scratch::new(&format!("swapped-{case}"));
        copy_checkpoint(&golden_dir(case), &dir.0);
        let config = open(&dir.0).config;
        for file in safetensors_files(&dir.0) {
            edit_tensors(&file, |name, bytes| {
                if name.ends_with("k_proj.weight") || name.ends_with("v_proj.weight") {
                    swap_first_heads(bytes, config.head_dim * config.hidden * 2);
                } else if name.ends_with("k_proj.bias") || name.ends_with("v_proj.bias") {
                    swap_first_heads(bytes, config.head_dim * 2);
                }
            });
        }
        let distance = distance(case, &open(&dir.0));
        println!("{case}: {distance:.3}");
        assert!(distance > 10.0 * GATE, "{case}: only {distance:.2e} from the golden");
    }
}

fn swap_first_heads(bytes: &mut [u8], head: usize) {
    let (first, rest) = bytes.split_at_mut(head);
    first.swap_with_slice(&mut rest[..head]);
}

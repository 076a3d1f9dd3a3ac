//! A second oracle, which shares no code with the goldens: candle's own Llama on a random checkpoint.

#![allow(clippy::unwrap_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama};
use plimsoll_contract::abilities::Dtype;
use plimsoll_engine::batch::TokenId;
use plimsoll_kernels::reference::softmax::log_softmax;
use support::*;

const VOCABULARY: usize = 96;
const TOKENS: usize = 150;

fn candle_logprobs(dir: &std::path::Path, tokens: &[TokenId]) -> Vec<Vec<f32>> {
    let config = Config {
        hidden_size: 96,
        intermediate_size: 160,
        vocab_size: VOCABULARY,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        use_flash_attn: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: 256,
        tie_word_embeddings: false,
    };
    let device = Device::Cpu;
    let files = [dir.join("model.safetensors")];
    // SAFETY: the file is this test's own and nobody changes it.
    let weights = unsafe { VarBuilder::from_mmaped_safetensors(&files, DType::F32, &device) };
    let model = Llama::load(weights.unwrap(), &config).unwrap();
    let mut cache = Cache::new(true, DType::F32, &config, &device).unwrap();
    let mut one = |(position, &token): (usize, &TokenId)| {
        let input = Tensor::new(&[[token]], &device).unwrap();
        let logits = model.forward(&input, position, &mut cache).unwrap();
        let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut out = vec![0.0; VOCABULARY];
        log_softmax(&logits, &mut out);
        out
    };
    tokens.iter().enumerate().map(&mut one).collect()
}

#[test]
fn the_whole_distribution_agrees_with_candle_at_every_position() {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": 160,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "max_position_embeddings": 256
    });
    let dir = Scratch::new("oracle");
    random_checkpoint(&dir.0, &config, 5);
    let mut dice = Dice(6);
    let tokens: Vec<TokenId> = (0..TOKENS).map(|_| dice.below(VOCABULARY) as TokenId).collect();
    let want = candle_logprobs(&dir.0, &tokens);
    let mut driver = Driver::new(backend(&open(&dir.0), Dtype::F32, 8));
    let mut sequence = Sequence::new(0, &tokens, 1);
    std::sync::Arc::make_mut(&mut sequence.sampling).prompt_logprobs = Some(VOCABULARY as u32);
    let output = driver.step(vec![], vec![sequence.span(0..TOKENS, true)]);
    let (mut sum, mut spread) = (0.0, 0.0f32);
    for (got, want) in output[0].prompt_logprobs.iter().zip(&want) {
        assert_eq!(got.top.len(), VOCABULARY);
        sum += got.top.iter().map(|&(t, p)| f64::from((p - want[t as usize]).abs())).sum::<f64>();
        spread = spread.max(got.top[0].1 - got.top[VOCABULARY - 1].1);
    }
    let mean = sum / ((TOKENS - 1) * VOCABULARY) as f64;
    assert!(spread > 1.0, "log-probabilities spread over {spread} nats");
    assert!(mean <= GATE, "mean |Δlogprob| {mean:.2e}");
    println!("mean |Δlogprob| {mean:.1e}, spread {spread:.1} nats");
}

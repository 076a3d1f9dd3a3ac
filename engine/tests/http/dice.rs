//! Seeded chance for fuzz targets, and bodies made of it.

use std::time::Duration;

use serde_json::{Value, json};

/// SplitMix64: a seeded run can be repeated.
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// A JSON value of any kind.
    pub fn value(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 8 } else { 10 }) {
            0 => Value::Null,
            1 => json!(self.below(2) == 0),
            2 => json!(self.below(400) as i64 - 40),
            3 => json!(self.next()),
            4 => json!((self.next() as i64) as f64 / 1e15),
            5 => json!(*self.of(&["", "user", "text", "x", "scripted", "\u{0}€", "<s>", "f32"])),
            6 => json!("long ".repeat(self.below(300))),
            7 => json!(1e300),
            8 => (0..self.below(5)).map(|_| self.value(depth - 1)).collect(),
            _ => {
                let keys = ["role", "content", "type", "text", "include_usage", "5", "name"];
                (0..self.below(5))
                    .map(|_| ((*self.of(&keys)).to_owned(), self.value(depth - 1)))
                    .collect()
            }
        }
    }

    /// A body that is often almost right.
    pub fn body(&mut self) -> Vec<u8> {
        const NAMES: [&str; 36] = [
            "model",
            "prompt",
            "messages",
            "n",
            "stop",
            "seed",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "logit_bias",
            "logprobs",
            "top_logprobs",
            "echo",
            "max_tokens",
            "max_completion_tokens",
            "stream",
            "stream_options",
            "user",
            "cache_salt",
            "ignore_eos",
            "stop_token_ids",
            "tools",
            "response_format",
            "suffix",
            "best_of",
            "chat_template_kwargs",
            "add_generation_prompt",
            "tokens",
            "return_token_strs",
            "add_special_tokens",
            "store",
            "zzz",
        ];
        let mut body = serde_json::Map::new();
        body.insert("model".into(), json!("scripted"));
        match self.below(4) {
            0 => drop(body.insert("prompt".into(), json!("hi"))),
            1 => drop(body.insert("messages".into(), json!([{"role": "user", "content": "hi"}]))),
            2 => drop(body.insert("prompt".into(), json!([[1, 2], "three"]))),
            _ => {}
        }
        for _ in 0..self.below(4) {
            body.insert((*self.of(&NAMES)).into(), self.value(3));
        }
        let mut bytes = Value::Object(body).to_string().into_bytes();
        for _ in 0..self.below(3) * self.below(2) {
            let at = self.below(bytes.len());
            match self.below(3) {
                0 => bytes[at] = self.next() as u8,
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, self.next() as u8),
            }
        }
        bytes
    }
}

/// How long a fuzz target runs; in a test run, a second.
pub fn fuzz_time() -> Duration {
    Duration::from_secs(from_environment("PLIMSOLL_FUZZ_SECONDS"))
}

/// Where a fuzz target begins.
pub fn fuzz_seed() -> u64 {
    from_environment("PLIMSOLL_FUZZ_SEED")
}

/// One where it is not set.
fn from_environment(name: &str) -> u64 {
    std::env::var(name).map_or(1, |value| value.parse().expect("a whole number"))
}

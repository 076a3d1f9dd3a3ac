//! A checkpoint, described once for every backend: config.json becomes a [`Config`], the config a [`Plan`] of layers,
//! and the plan names every tensor that the [`Weights`] must hold. Enters: a directory. Leaves: facts, plan, and tensors
//! read on demand. Never here: arithmetic on activations, a device, the network.

mod config;
mod error;
mod families;
pub(crate) mod files;
mod layers;
mod named;
mod weights;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use plimsoll_contract::facts::{ModelFacts, ParametersByRole, SlidingWindow};

pub use config::{Config, Rope};
pub use error::LoadError;
pub use layers::{
    Attention, Layer, LayerTensors, Linear, Mlp, Plan, Role, Sight, Split, TensorSpec,
};
pub use named::{NAMES, named};
pub use weights::{Shard, Stored, TensorView, Weights};

use crate::batch::TokenId;

/// Where `fetch` writes the commit it downloaded.
pub const REVISION_FILE: &str = ".plimsoll-revision";

/// The only format of tokenizers that is read.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// A checkpoint whose every tensor is known to be there in the right shape; no weight has been read yet.
#[derive(Debug)]
pub struct Checkpoint {
    pub dir: PathBuf,
    pub config: Config,
    /// What a backend executes. Tests change it to show that the golden gate notices.
    pub plan: Plan,
    pub weights: Weights,
    /// Any of them ends a sequence; may be empty.
    pub eos_token_ids: Vec<TokenId>,
    facts: ModelFacts,
}

impl Checkpoint {
    /// Reads config.json and the headers of the safetensors files, and checks every tensor that the config implies.
    pub fn open(dir: &Path) -> Result<Checkpoint, LoadError> {
        let config = Config::read(dir)?;
        let eos_token_ids = config::eos_token_ids(dir)?;
        let plan = Plan::new(&config);
        let weights = Weights::open(dir)?;
        weights.check(&plan.tensors())?;
        let facts = facts(dir, &config, &plan, &weights);
        Ok(Checkpoint { dir: dir.to_owned(), config, plan, weights, eos_token_ids, facts })
    }

    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }
}

fn facts(dir: &Path, config: &Config, plan: &Plan, weights: &Weights) -> ModelFacts {
    ModelFacts {
        revision: revision(dir),
        disk_bytes: weights.disk_bytes(),
        chat_template: has_chat_template(dir),
        tokenizer_bytes: std::fs::metadata(dir.join(TOKENIZER_FILE)).map_or(0, |file| file.len()),
        ..facts_of(config, plan)
    }
}

/// What a config alone tells: no file, so no bytes on disk, no revision and no template.
pub fn facts_of(config: &Config, plan: &Plan) -> ModelFacts {
    let windowed: Vec<u32> =
        config.windows.iter().filter_map(|window| window.map(|tokens| tokens as u32)).collect();
    ModelFacts {
        family: config.family,
        architecture: config.architecture.to_owned(),
        revision: None,
        parameters: parameters(plan),
        disk_bytes: BTreeMap::new(),
        quantization: None,
        layers: config.layers as u32,
        hidden: config.hidden as u32,
        intermediate: config.intermediate as u32,
        heads: config.heads as u32,
        kv_heads: config.kv_heads as u32,
        head_dim: config.head_dim as u32,
        vocabulary: config.vocabulary as u32,
        context_tokens: config.context_tokens as u32,
        tied_head: config.tied_head,
        sliding_window: windowed
            .first()
            .map(|&tokens| SlidingWindow { tokens, layers: windowed.len() as u32 }),
        chat_template: false,
        tokenizer_bytes: 0,
    }
}

fn parameters(plan: &Plan) -> ParametersByRole {
    let mut sums = BTreeMap::from(Role::ALL.map(|role| (role, 0u64)));
    for spec in plan.tensors() {
        *sums.entry(spec.role).or_default() += spec.elements();
    }
    ParametersByRole {
        embedding: sums[&Role::Embedding],
        attention: sums[&Role::Attention],
        mlp: sums[&Role::Mlp],
        norm: sums[&Role::Norm],
        head: sums[&Role::Head],
    }
}

fn revision(dir: &Path) -> Option<String> {
    let text = files::read(&dir.join(REVISION_FILE), files::TEXT_BYTES_MAX).ok()?;
    let text = String::from_utf8(text).ok()?;
    // Facts travel in a small message: a commit is 40 digits, anything much longer is not one.
    Some(text.trim().chars().take(64).collect::<String>()).filter(|text| !text.is_empty())
}

fn has_chat_template(dir: &Path) -> bool {
    if dir.join("chat_template.jinja").is_file() {
        return true;
    }
    let file = dir.join("tokenizer_config.json");
    let text = files::read(&file, files::TEXT_BYTES_MAX).unwrap_or_default();
    serde_json::from_slice::<serde_json::Value>(&text)
        .is_ok_and(|config| config.get("chat_template").is_some_and(|template| !template.is_null()))
}

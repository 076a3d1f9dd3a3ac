//! Device memory to the byte, before any is taken: what the buffers of each file add up to, which the planner's sum in the
//! contract crate must equal. Pure.

use super::kernels::{self, Card};
use super::shape::{Shape, StepShape};
use super::{input, model, slots, space};

/// All that is neither weights nor pages.
pub fn workspace_bytes(card: Card, shape: &Shape, step: &StepShape) -> usize {
    model::rope_bytes(shape, step.context_tokens)
        + space::bytes(shape, step)
        + input::bytes(step, card.cuts_max(shape, step))
        + slots::bytes(shape, step)
        + kernels::workspace_bytes(card, shape, step)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use plimsoll_contract::abilities::{Ability, Backend, Dtype, PAGE_TOKENS};
    use plimsoll_contract::memory::{self, StepLimits};

    use super::*;
    use crate::model::{Config, NAMES, Plan, facts_of, named};

    const BF16: Ability = Ability::plain(Backend::Cuda, Dtype::Bf16);

    /// One of each: narrow and padded heads, tied and untied, biases, norms of heads, odd vocabularies.
    const GOLDENS: [&str; 9] = [
        "llama2-mha",
        "llama3-rope",
        "llama-linear",
        "llama-yarn",
        "mistral-window",
        "qwen2-bias",
        "qwen2-window",
        "qwen3-qknorm",
        "qwen3-yarn",
    ];

    fn configs() -> Vec<(String, Config)> {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests");
        let read = |dir: &str| {
            let text = std::fs::read_to_string(tests.join(dir).join("config.json")).unwrap();
            Config::parse(&serde_json::from_str(&text).unwrap()).unwrap()
        };
        let goldens = GOLDENS.map(|case| (case.to_owned(), read(&format!("goldens/{case}"))));
        let published = NAMES.map(|name| (name.to_owned(), named(name).unwrap()));
        let bundled = ("bundled".to_owned(), read("model"));
        goldens.into_iter().chain(published).chain([bundled]).collect()
    }

    fn card(capability: (i32, i32), processors: u32) -> Card {
        let is_hopper = capability == (9, 0);
        Card { capability, processors, is_hopper, portable: !is_hopper }
    }

    fn limits(step_tokens_max: u32, running_max: u32) -> StepLimits {
        StepLimits { step_tokens_max, running_max }
    }

    /// Of the engine: weights, workspace and pages.
    fn sums(
        config: &Config,
        card: Card,
        limits: StepLimits,
        context_tokens: usize,
        pages: usize,
    ) -> [u64; 3] {
        let plan = Plan::new(config);
        let shape = Shape::new(&plan).unwrap();
        let step = StepShape {
            step_tokens_max: limits.step_tokens_max as usize,
            running_max: limits.running_max as usize,
            context_tokens,
        };
        let workspace = workspace_bytes(card, &shape, &step);
        [model::bytes(&plan, &shape), workspace, pages * shape.page_bytes()].map(|n| n as u64)
    }

    #[test]
    fn the_planners_sum_is_what_the_engine_takes_to_the_byte() {
        for (name, config) in configs() {
            let facts = facts_of(&config, &Plan::new(&config));
            let steps = [(2048, 256), (512, 32), (8192, 256), (64, 1), (100, 300), (16384, 1000)];
            for (step_tokens_max, running_max) in steps {
                let limits = limits(step_tokens_max, running_max);
                let pages = 77;
                let plan = memory::plan(&facts, BF16, limits, pages * u64::from(PAGE_TOKENS));
                let hopper = card((9, 0), 132);
                let taken = sums(&config, hopper, limits, config.context_tokens, pages as usize);
                let planned = [plan.weights, plan.workspace, plan.kv];
                assert_eq!(planned, taken, "{name}, {limits:?}: weights, workspace, KV");
            }
        }
    }

    #[test]
    fn on_other_cards_and_for_shorter_contexts_both_are_within_two_percent() {
        let cards = [((9, 0), 114), ((8, 0), 108), ((8, 9), 58), ((8, 6), 72), ((10, 0), 148)];
        let published = configs().into_iter().filter(|(name, _)| name.starts_with("llama-3."));
        for (name, config) in published {
            let facts = facts_of(&config, &Plan::new(&config));
            for (capability, processors) in cards {
                for context_tokens in [4096, config.context_tokens] {
                    let limits = limits(2048, 256);
                    let kv_tokens = 256 * 512;
                    let plan = memory::plan(&facts, BF16, limits, kv_tokens);
                    let pages = plan.kv_tokens / u64::from(PAGE_TOKENS);
                    let card = card(capability, processors);
                    let taken: u64 =
                        sums(&config, card, limits, context_tokens, pages as usize).iter().sum();
                    let off = (plan.total() - plan.process) as f64 / taken as f64 - 1.0;
                    assert!(off.abs() <= 0.02, "{name} on {capability:?}: off by {off}");
                }
            }
        }
    }
}

//! A backend for tests that computes nothing and forgives nothing. Its tokens are a function of the tokens before them,
//! the seed and the position, so that every schedule must give the same ones ([`oracle`]). It keeps a shadow of the KV
//! pages and fails a step that a real backend would compute wrongly: a row that would read anything but its own past, a
//! slot that was not started, an input that is not the sequence's token.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use plimsoll_contract::abilities::{Dtype, PAGE_TOKENS};

use super::{Backend, BackendError, KvLayout, LayerGroup, Ticket};
use crate::batch::{
    PageId, RowInput, SampledToken, SamplingParams, SequenceId, Slot, Span, SpanOutput, Step,
    StepNumber, StepOutput, TokenId, TokenLogprob,
};

/// How the scripted model behaves.
#[derive(Clone, Debug)]
pub struct Script {
    pub vocabulary: u32,
    /// What a step takes.
    pub step_time: Duration,
    /// Steps that fail.
    pub failing_steps: BTreeSet<StepNumber>,
    /// The step at which the device is lost.
    pub lost_at: Option<StepNumber>,
}

impl Default for Script {
    fn default() -> Self {
        Script {
            vocabulary: 50_000,
            step_time: Duration::ZERO,
            failing_steps: BTreeSet::new(),
            lost_at: None,
        }
    }
}

pub struct ScriptedBackend {
    layout: KvLayout,
    script: Script,
    /// Per group and page: the hash of the tokens up to and with each position written there.
    shadow: Vec<Vec<[u64; PAGE_TOKENS as usize]>>,
    slots: HashMap<Slot, SlotState>,
    done: VecDeque<Result<StepOutput, BackendError>>,
}

struct SlotState {
    sequence: SequenceId,
    tokens: Vec<TokenId>,
    /// `prefixes[i]` stands for `tokens[..=i]`.
    prefixes: Vec<u64>,
    prompt_tokens: usize,
    sampling: std::sync::Arc<SamplingParams>,
}

/// Never the hash of a prefix.
const UNWRITTEN: u64 = 0;

impl ScriptedBackend {
    pub fn new(kv_pages: &[u32], script: Script) -> ScriptedBackend {
        let group = |_| LayerGroup { layers: vec![0] };
        let pages = |&pages: &u32| vec![[UNWRITTEN; PAGE_TOKENS as usize]; pages as usize];
        ScriptedBackend {
            layout: KvLayout {
                groups: kv_pages.iter().map(group).collect(),
                kv_heads: 1,
                head_dim: 1,
                dtype: Dtype::F32,
            },
            script,
            shadow: kv_pages.iter().map(pages).collect(),
            slots: HashMap::new(),
            done: VecDeque::new(),
        }
    }

    fn run(&mut self, step: &Step) -> Result<StepOutput, String> {
        for copy in &step.copies {
            let pages = &mut self.shadow[copy.group];
            pages[copy.to.0 as usize] = pages[copy.from.0 as usize];
        }
        let mut slots = BTreeSet::new();
        let mut spans = Vec::with_capacity(step.spans.len());
        for span in &step.spans {
            if !slots.insert(span.slot) {
                return Err(format!("{:?} appears twice", span.slot));
            }
            self.begin(span)?;
            self.write(span)?;
        }
        // Rows of a step are written before any is read, as a device would do it layer by layer.
        for span in &step.spans {
            self.read(span)?;
            spans.push(self.sample(span));
        }
        Ok(StepOutput { number: step.number, spans })
    }

    fn begin(&mut self, span: &Span) -> Result<(), String> {
        if let Some(start) = &span.start {
            let mut state = SlotState {
                sequence: span.sequence,
                tokens: Vec::with_capacity(start.tokens.len()),
                prefixes: Vec::with_capacity(start.tokens.len()),
                prompt_tokens: start.prompt_tokens,
                sampling: start.sampling.clone(),
            };
            start.tokens.iter().for_each(|&token| state.push(token));
            self.slots.insert(span.slot, state);
        }
        match self.slots.get(&span.slot) {
            Some(state) if state.sequence == span.sequence => Ok(()),
            _ => Err(format!("{:?} of {:?} was not started", span.slot, span.sequence)),
        }
    }

    fn write(&mut self, span: &Span) -> Result<(), String> {
        let state = &self.slots[&span.slot];
        if span.inputs.is_empty() || span.tables.len() != self.shadow.len() {
            return Err("a span has rows, and a table per group".into());
        }
        for (position, input) in (span.position as usize..).zip(&span.inputs) {
            let known = state.tokens.get(position);
            let known = known.ok_or_else(|| format!("no token at position {position} yet"))?;
            match input {
                RowInput::Token(token) if token == known => {}
                RowInput::Sampled if position + 1 == state.tokens.len() => {}
                other => return Err(format!("{other:?} at {position}, where {known} stands")),
            }
            for (group, table) in span.tables.iter().enumerate() {
                let page = page_at(table, position)?;
                let offset = position % PAGE_TOKENS as usize;
                self.shadow[group][page.0 as usize][offset] = state.prefixes[position];
            }
        }
        Ok(())
    }

    fn read(&self, span: &Span) -> Result<(), String> {
        let state = &self.slots[&span.slot];
        let end = span.position as usize + span.inputs.len();
        for (group, table) in span.tables.iter().enumerate() {
            for position in 0..end {
                let page = page_at(table, position)?;
                let found = self.shadow[group][page.0 as usize][position % PAGE_TOKENS as usize];
                if found != state.prefixes[position] {
                    return Err(format!(
                        "{:?} reads position {position} in {page:?} and finds another's",
                        span.sequence
                    ));
                }
            }
        }
        Ok(())
    }

    fn sample(&mut self, span: &Span) -> SpanOutput {
        let state = self.slots.get_mut(&span.slot).expect("begun in this step or before");
        let mut output = SpanOutput::default();
        if span.prompt_logprobs {
            let end = span.position as usize + span.inputs.len();
            let next = span.position as usize + 1..(end + 1).min(state.prompt_tokens);
            output.prompt_logprobs = next.map(|position| state.logprob(position)).collect();
        }
        if span.sample {
            let token = state.next_token(self.script.vocabulary);
            state.push(token);
            let wanted = state.sampling.logprobs.is_some();
            let logprob = wanted.then(|| state.logprob(state.tokens.len() - 1));
            output.sampled = Some(SampledToken { token, logprob });
        }
        output
    }
}

impl Backend for ScriptedBackend {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn submit(&mut self, step: Step) -> Result<Ticket, BackendError> {
        std::thread::sleep(self.script.step_time);
        let number = step.number;
        if self.script.lost_at == Some(number) {
            return Err(BackendError::DeviceLost("the script says so".into()));
        }
        let failed = |reason| BackendError::StepFailed { number, reason };
        let result = self.run(&step).map_err(failed);
        self.done.push_back(if self.script.failing_steps.contains(&number) {
            Err(failed("the script says so".into()))
        } else {
            result
        });
        Ok(Ticket(number))
    }

    fn collect(&mut self, _ticket: Ticket) -> Result<StepOutput, BackendError> {
        self.done.pop_front().expect("only submitted steps are collected")
    }
}

impl SlotState {
    fn push(&mut self, token: TokenId) {
        let before = self.prefixes.last().copied().unwrap_or(1);
        self.tokens.push(token);
        self.prefixes.push(mix(before, u64::from(token)));
    }

    fn next_token(&self, vocabulary: u32) -> TokenId {
        let last = self.prefixes.last().copied().unwrap_or(1);
        token_after(last, self.sampling.seed, self.tokens.len(), vocabulary)
    }

    fn logprob(&self, position: usize) -> TokenLogprob {
        let logprob = -((self.prefixes[position] % 997) as f32) / 100.0;
        TokenLogprob { token: self.tokens[position], logprob, rank: 1, top: Vec::new() }
    }
}

/// The tokens that follow `prompt`, whatever the schedule.
pub fn oracle(prompt: &[TokenId], seed: u64, vocabulary: u32, tokens: usize) -> Vec<TokenId> {
    let mut prefix = prompt.iter().fold(1, |prefix, &token| mix(prefix, u64::from(token)));
    let next = |position| {
        let token = token_after(prefix, seed, position, vocabulary);
        prefix = mix(prefix, u64::from(token));
        token
    };
    (prompt.len()..prompt.len() + tokens).map(next).collect()
}

fn token_after(prefix: u64, seed: u64, position: usize, vocabulary: u32) -> TokenId {
    let hash = mix(mix(prefix, seed), position as u64);
    (hash % u64::from(vocabulary)) as TokenId
}

fn page_at(table: &[PageId], position: usize) -> Result<PageId, String> {
    let page = table.get(position / PAGE_TOKENS as usize).copied();
    page.ok_or_else(|| format!("position {position} lies behind the block table"))
}

/// Mixes a value into a hash; never [`UNWRITTEN`].
fn mix(hash: u64, value: u64) -> u64 {
    let mut z =
        (hash ^ value.wrapping_mul(0xa076_1d64_78bd_642f)).wrapping_mul(0xe703_7ed1_a0b4_28db);
    z ^= z >> 32;
    z | 1 << 63
}

#[cfg(test)]
mod tests;

//! Everything that could be wrong with a step is found before anything is changed: what no scheduler of ours submits, a
//! backend refuses with the reason. Pure; the same for every backend that computes.

use plimsoll_contract::abilities::PAGE_TOKENS;

use crate::batch::{AdapterIndex, RowInput, Span, Step};

/// What a slot holds, as far as a check needs to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotUse {
    pub started: bool,
    pub sampled: bool,
}

/// What steps must stay within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub slots: usize,
    pub pages: u32,
    pub vocabulary: usize,
    pub hidden: usize,
}

pub fn check(bounds: Bounds, step: &Step, slot: impl Fn(usize) -> SlotUse) -> Result<(), String> {
    for copy in &step.copies {
        if copy.group != 0 || copy.from.0.max(copy.to.0) >= bounds.pages {
            return Err(format!("{copy:?} is outside the pool of {} pages", bounds.pages));
        }
    }
    let mut taken = vec![false; bounds.slots];
    for span in &step.spans {
        let index = span.slot.0 as usize;
        if taken.get_mut(index).is_none_or(|taken| std::mem::replace(taken, true)) {
            return Err(format!("{:?} is taken twice or does not exist", span.slot));
        }
        check_span(bounds, span, slot(index))
            .map_err(|what| format!("{:?}: {what}", span.sequence))?;
    }
    Ok(())
}

fn check_span(bounds: Bounds, span: &Span, slot: SlotUse) -> Result<(), String> {
    if span.adapter != AdapterIndex::BASE {
        return Err(format!("{:?} is not loaded", span.adapter));
    }
    if span.inputs.is_empty() {
        return Err("a span without rows".into());
    }
    let [table] = span.tables.as_slice() else {
        return Err(format!("{} block tables for one layer group", span.tables.len()));
    };
    let end = span.position as usize + span.inputs.len();
    let used = table.get(..end.div_ceil(PAGE_TOKENS as usize));
    let used = used.ok_or_else(|| format!("a block table too short for {end} positions"))?;
    if let Some(page) = used.iter().find(|page| page.0 >= bounds.pages) {
        return Err(format!("{page:?} is outside the pool of {} pages", bounds.pages));
    }
    if span.start.is_none() && !slot.started {
        return Err(format!("{:?} was never started", span.slot));
    }
    let sampled = span.start.is_none() && slot.sampled;
    span.inputs.iter().try_for_each(|input| check_input(bounds, input, sampled))
}

fn check_input(bounds: Bounds, input: &RowInput, sampled: bool) -> Result<(), String> {
    match input {
        RowInput::Token(token) if *token as usize >= bounds.vocabulary => {
            Err(format!("token {token} is outside the vocabulary of {}", bounds.vocabulary))
        }
        RowInput::Embedding(row) if row.len() != bounds.hidden => {
            Err(format!("an embedding of {} floats, not {}", row.len(), bounds.hidden))
        }
        RowInput::Sampled if !sampled => Err("the slot has sampled nothing yet".into()),
        _ => Ok(()),
    }
}

//! What the device says of a step: it writes each row's token into host memory, and the step's number last. The host
//! waits for that number and for nothing else. A ring, so that a step can be written while an earlier one is being read.

use std::time::Instant;

use plimsoll_kernels::device::{Device, DeviceError, Mark, Pinned, Pointer};
use plimsoll_kernels::ops::sampling::SampleResult;

use super::input::RING;
use super::shape::StepShape;
use crate::batch::{SampledToken, TokenLogprob};

/// Where a result's epoch lies, in words.
const EPOCH_WORD: usize = std::mem::offset_of!(SampleResult, epoch) / size_of::<u32>();

pub struct Answers {
    results: Pinned<SampleResult>,
    each: usize,
}

impl Answers {
    pub fn allocate(device: &Device, step: &StepShape) -> Result<Answers, DeviceError> {
        let each = step.head_rows() + step.rows_max();
        Ok(Answers { results: device.pinned(RING * each)?, each })
    }

    /// For the device.
    pub fn pointer(&self) -> Pointer<SampleResult> {
        self.results.pointer()
    }

    /// Results of one step.
    pub fn each(&self) -> usize {
        self.each
    }

    fn at(&self, epoch: u32, index: usize) -> usize {
        assert!(index < self.each, "a step has no more results than it has rows");
        epoch as usize % RING * self.each + index
    }

    /// Waits until the device has written a result, or has passed the step without doing so.
    pub fn wait(&self, epoch: u32, index: usize, end: &Mark) -> Result<(), DeviceError> {
        let at = self.at(epoch, index);
        let begun = Instant::now();
        let mut polls = 0u32;
        while self.results.word(at, EPOCH_WORD) != epoch {
            polls += 1;
            if !polls.is_multiple_of(256) {
                std::hint::spin_loop();
                continue;
            }
            // An error of the device shows here, and so does a row that nobody wrote.
            if end.is_passed()? && self.results.word(at, EPOCH_WORD) != epoch {
                return Err(DeviceError::NoResult);
            }
            if begun.elapsed().as_micros() > 100 {
                std::thread::yield_now();
            }
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        Ok(())
    }

    /// A drawn token; with its log-probability where that was asked for.
    pub fn sampled(&self, epoch: u32, index: usize, reports: bool) -> Result<SampledToken, String> {
        let result = self.result(epoch, index)?;
        Ok(SampledToken { token: result.token, logprob: reports.then(|| logprob(&result)) })
    }

    pub fn logprob(&self, epoch: u32, index: usize) -> Result<TokenLogprob, String> {
        Ok(logprob(&self.result(epoch, index)?))
    }

    /// What a row brought, once it was waited for.
    fn result(&self, epoch: u32, index: usize) -> Result<SampleResult, String> {
        let result = self.results.read(self.at(epoch, index));
        if result.failed != 0 {
            return Err("the model's logits are not finite".into());
        }
        Ok(result)
    }
}

fn logprob(result: &SampleResult) -> TokenLogprob {
    let tops = &result.top[..result.tops as usize];
    TokenLogprob {
        token: result.token,
        logprob: result.logprob,
        rank: result.rank,
        top: tops.iter().map(|top| (top.token, top.logprob)).collect(),
    }
}

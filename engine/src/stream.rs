//! From a choice's tokens to its text. Enter: the bytes of one token after another. Leaves: text that never holds a
//! broken character nor any part of a stop string, and each token's log-probability beside the text it made. How the
//! bytes are cut into tokens changes nothing. Pure: no clock, no tokio, no tokenizer.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::batch::TokenLogprob;

/// A token's report with the place of its text.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacedLogprob {
    pub logprob: TokenLogprob,
    /// Characters of the choice's text before this token's.
    pub offset_chars: usize,
}

/// What one token settled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    pub text: String,
    pub logprobs: Vec<PlacedLogprob>,
    /// A stop string was found: the text ends before it and no more will come.
    pub stopped: bool,
}

/// The text of one choice as it grows.
#[derive(Debug)]
pub struct TextStream {
    stops: Arc<[String]>,
    /// Start of a character whose end has not come: at most 3 bytes.
    undecoded: Vec<u8>,
    /// Decoded text that may be the beginning of a stop string: shorter than the longest one.
    held: String,
    given_bytes: usize,
    decoded_chars: usize,
    /// Reports whose text is still held.
    waiting: VecDeque<Waiting>,
    stopped: bool,
}

/// A report with the span of its token's text, in bytes from the start of the choice's text.
#[derive(Debug)]
struct Waiting {
    placed: PlacedLogprob,
    start: usize,
    end: usize,
}

impl TextStream {
    /// `stops` holds no empty string.
    pub fn new(stops: Arc<[String]>) -> TextStream {
        assert!(stops.iter().all(|s| !s.is_empty()), "empty stop strings are refused at the door");
        TextStream {
            stops,
            undecoded: Vec::new(),
            held: String::new(),
            given_bytes: 0,
            decoded_chars: 0,
            waiting: VecDeque::new(),
            stopped: false,
        }
    }

    /// Takes one token: its bytes (none for a special token) and its report, where asked for.
    pub fn push(&mut self, bytes: &[u8], logprob: Option<TokenLogprob>) -> Delta {
        if self.stopped {
            return Delta { stopped: true, ..Delta::default() };
        }
        let start = self.decoded_bytes();
        let offset_chars = self.decoded_chars;
        self.undecoded.extend_from_slice(bytes);
        let decoded = decode(&mut self.undecoded);
        self.hold(&decoded);
        let end = self.decoded_bytes();
        if let Some(logprob) = logprob {
            let placed = PlacedLogprob { logprob, offset_chars };
            self.waiting.push_back(Waiting { placed, start, end });
        }
        self.settle()
    }

    /// No more tokens will come: an unfinished character becomes U+FFFD and what was held is given.
    pub fn end(&mut self) -> Delta {
        if self.stopped {
            return Delta { stopped: true, ..Delta::default() };
        }
        let rest = String::from_utf8_lossy(&std::mem::take(&mut self.undecoded)).into_owned();
        self.hold(&rest);
        let mut delta = self.settle();
        if !delta.stopped {
            let held = std::mem::take(&mut self.held);
            self.given_bytes += held.len();
            delta.text.push_str(&held);
            delta.logprobs.extend(self.waiting.drain(..).map(|w| w.placed));
        }
        delta
    }

    fn decoded_bytes(&self) -> usize {
        self.given_bytes + self.held.len()
    }

    fn hold(&mut self, text: &str) {
        self.decoded_chars += text.chars().count();
        self.held.push_str(text);
    }

    /// Gives what can no longer become part of a stop string.
    fn settle(&mut self) -> Delta {
        if let Some(cut) = first_stop(&self.held, &self.stops) {
            self.stopped = true;
            let cut_bytes = self.given_bytes + cut;
            self.held.truncate(cut);
            let text = std::mem::take(&mut self.held);
            self.given_bytes += text.len();
            let before = self.waiting.drain(..).filter(|w| w.start < cut_bytes);
            return Delta { text, logprobs: before.map(|w| w.placed).collect(), stopped: true };
        }
        let keep = partial_stop(&self.held, &self.stops);
        let held = self.held.split_off(self.held.len() - keep);
        let text = std::mem::replace(&mut self.held, held);
        self.given_bytes += text.len();
        let given_bytes = self.given_bytes;
        let mut logprobs = Vec::new();
        while self.waiting.front().is_some_and(|w| w.end <= given_bytes) {
            logprobs.extend(self.waiting.pop_front().map(|w| w.placed));
        }
        Delta { text, logprobs, stopped: false }
    }
}

/// Takes every complete character out of `bytes`, U+FFFD for what can never become one, and leaves an unfinished one.
/// Over any cutting of the input the result is that of `String::from_utf8_lossy` over the whole.
fn decode(bytes: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut used = 0;
    loop {
        match std::str::from_utf8(&bytes[used..]) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = &bytes[used..used + error.valid_up_to()];
                text.push_str(std::str::from_utf8(valid).expect("checked just now"));
                used += error.valid_up_to();
                match error.error_len() {
                    Some(broken) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        used += broken;
                    }
                    None => {
                        bytes.drain(..used);
                        return text;
                    }
                }
            }
        }
    }
}

/// Where the text ends if a stop string stands in it: the one that is complete first, the longest of those.
fn first_stop(text: &str, stops: &[String]) -> Option<usize> {
    stops
        .iter()
        .filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at)))
        .min()
        .map(|(_, at)| at)
}

/// Length of the longest end of `text` that begins a stop string.
fn partial_stop(text: &str, stops: &[String]) -> usize {
    let begins = |stop: &String| {
        let longest = (stop.len() - 1).min(text.len());
        (1..=longest).rev().find(|&n| {
            text.is_char_boundary(text.len() - n) && stop.starts_with(&text[text.len() - n..])
        })
    };
    stops.iter().filter_map(begins).max().unwrap_or(0)
}

#[cfg(test)]
mod tests;

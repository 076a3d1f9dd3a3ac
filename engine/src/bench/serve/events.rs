//! A streamed completion as it arrives. Enters: bytes of server-sent events, cut anywhere, each piece with its time.
//! Leaves: when tokens came and how many there were, or what was wrong with the stream. Pure.

use std::borrow::Cow;
use std::time::Duration;

use serde::Deserialize;

use super::client::Failure;

/// Of an event that takes longer than this, the stream is not one of completions.
const LINE_BYTES_MAX: usize = 1 << 20;

/// What came of one request. Times are since it was sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Of the first event with text.
    pub first: Duration,
    /// Of the last event that belongs to the answer, its finish reason included.
    pub last: Duration,
    /// Between every two events with text.
    pub gaps: Vec<Duration>,
    pub prompt_tokens: u64,
    /// As the server counts them.
    pub output_tokens: u64,
}

impl Answer {
    /// Events with text. A token that ends within a character, or has no text, brings none.
    pub fn events(&self) -> u64 {
        self.gaps.len() as u64 + 1
    }

    /// Mean time per output token after the first; none where there is but one.
    pub fn per_token(&self) -> Option<Duration> {
        let more = self.output_tokens.checked_sub(1).filter(|&more| more > 0)?;
        Some((self.last - self.first).div_f64(more as f64))
    }
}

/// Gathers one stream.
#[derive(Debug, Default)]
pub struct Listener {
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    first: Option<Duration>,
    /// Of the last event with text.
    last_text: Duration,
    last: Duration,
    gaps: Vec<Duration>,
    usage: Option<Usage>,
    done: bool,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(default, borrow)]
    choices: Vec<Choice<'a>>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<Told>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default, borrow)]
    text: Option<Cow<'a, str>>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

#[derive(Deserialize)]
struct Told {
    message: String,
}

impl Listener {
    /// Takes what arrived `at` that time.
    pub fn take(&mut self, mut bytes: &[u8], at: Duration) -> Result<(), Failure> {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            if self.line.is_empty() {
                self.read(line, at)?;
            } else {
                let mut whole = std::mem::take(&mut self.line);
                whole.extend_from_slice(line);
                self.read(&whole, at)?;
            }
            bytes = rest;
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() > LINE_BYTES_MAX {
            return Err(Failure::Malformed(format!("a line of more than {LINE_BYTES_MAX} bytes")));
        }
        Ok(())
    }

    /// Blank lines and comments separate events or keep a connection alive; every event here is one line.
    fn read(&mut self, line: &[u8], at: Duration) -> Result<(), Failure> {
        let Some(data) = line.strip_prefix(b"data:") else { return Ok(()) };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|error| {
            Failure::Malformed(format!("{error}: {}", String::from_utf8_lossy(data)))
        })?;
        if let Some(Told { message }) = chunk.error {
            return Err(Failure::Told(message));
        }
        self.usage = chunk.usage.or(self.usage);
        if let [choice] = &chunk.choices[..] {
            self.choice(choice.text.as_ref().is_some_and(|text| !text.is_empty()), at);
        }
        Ok(())
    }

    fn choice(&mut self, has_text: bool, at: Duration) {
        self.last = at;
        if !has_text {
            return;
        }
        if self.first.is_none() {
            self.first = Some(at);
        } else {
            self.gaps.push(at - self.last_text);
        }
        self.last_text = at;
    }

    /// How many events with text have come.
    pub fn events(&self) -> usize {
        self.gaps.len() + usize::from(self.first.is_some())
    }

    /// The answer, once the stream has ended: whole, with its usage, and as long as was `wanted`.
    pub fn finish(self, wanted: u32) -> Result<Answer, Failure> {
        if !self.done {
            let events = self.events();
            return Err(Failure::Cut { events, how: "it ended without [DONE]".into() });
        }
        let usage = self.usage.ok_or_else(|| Failure::Malformed("no event had a usage".into()))?;
        if usage.completion_tokens != u64::from(wanted) {
            return Err(Failure::Length { tokens: usage.completion_tokens, wanted });
        }
        Ok(Answer {
            // Tokens that all lack text show in the end alone.
            first: self.first.unwrap_or(self.last),
            last: self.last,
            gaps: self.gaps,
            prompt_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        ": keep alive\n\n",
        "data: {\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":null}],\"usage\":null}\n\n",
        "data: {\"choices\":[{\"index\":0,\"text\":\"\\u00e9\",\"finish_reason\":null}]}\r\n\r\n",
        "data: {\"choices\":[{\"index\":0,\"text\":\"c\",\"finish_reason\":null}]}\n\n",
        "data: {\"choices\":[{\"index\":0,\"text\":\"\",\"finish_reason\":\"length\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":4,\"total_tokens\":11}}\n\n",
        "data: [DONE]\n\n",
    );

    fn milliseconds(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    /// The stream's events, one piece each, ten milliseconds apart from 100 on.
    fn listened(stream: &str) -> Result<Listener, Failure> {
        let mut listener = Listener::default();
        let events = stream.split_inclusive("\n\n").filter(|event| event.starts_with("data"));
        for (number, event) in events.enumerate() {
            listener.take(event.as_bytes(), milliseconds(100 + 10 * number as u64))?;
        }
        Ok(listener)
    }

    #[test]
    fn times_are_those_of_events_with_text_and_the_end_that_of_the_finish_reason() {
        // The carriage returns keep two events in one piece here: both come at 110.
        let answer = listened(STREAM).unwrap().finish(4).unwrap();
        assert_eq!(answer.first, milliseconds(100));
        assert_eq!(answer.gaps, [milliseconds(10), milliseconds(0)]);
        assert_eq!(answer.last, milliseconds(120));
        assert_eq!((answer.prompt_tokens, answer.output_tokens, answer.events()), (7, 4, 3));
        // 20 ms over three tokens after the first.
        let per_token = answer.per_token().unwrap();
        assert!((per_token.as_secs_f64() - 0.02 / 3.0).abs() < 1e-9, "{per_token:?}");
    }

    #[test]
    fn a_stream_may_be_cut_into_pieces_anywhere() {
        let whole = {
            let mut listener = Listener::default();
            listener.take(STREAM.as_bytes(), milliseconds(5)).unwrap();
            listener.finish(4).unwrap()
        };
        for size in 1..40 {
            let mut listener = Listener::default();
            for piece in STREAM.as_bytes().chunks(size) {
                listener.take(piece, milliseconds(5)).unwrap();
            }
            assert_eq!(listener.finish(4).unwrap(), whole, "pieces of {size}");
        }
    }

    #[test]
    fn one_token_has_a_first_time_and_no_time_per_token() {
        let one = Answer {
            first: milliseconds(8),
            last: milliseconds(8),
            gaps: Vec::new(),
            prompt_tokens: 1,
            output_tokens: 1,
        };
        assert_eq!(one.per_token(), None);
    }

    #[test]
    fn a_stream_that_stops_short_is_a_failure_however_it_stops() {
        let without_done = STREAM.replace("data: [DONE]\n\n", "");
        let cut = listened(&without_done).unwrap().finish(4).unwrap_err();
        assert_eq!(cut.kind(), "cut stream");
        let short = listened(STREAM).unwrap().finish(5).unwrap_err();
        assert_eq!(short, Failure::Length { tokens: 4, wanted: 5 });
        let no_usage = STREAM.replace("\"usage\":{", "\"other\":{");
        assert_eq!(listened(&no_usage).unwrap().finish(4).unwrap_err().kind(), "malformed");
    }

    #[test]
    fn an_error_among_the_events_and_what_is_no_json_are_failures() {
        let told = listened("data: {\"error\":{\"message\":\"step 3 failed\",\"code\":null}}\n\n");
        assert_eq!(told.unwrap_err(), Failure::Told("step 3 failed".into()));
        assert_eq!(listened("data: <html>\n\n").unwrap_err().kind(), "malformed");
        let endless = Listener::default().take(&vec![b'x'; LINE_BYTES_MAX + 1], milliseconds(0));
        assert_eq!(endless.unwrap_err().kind(), "malformed");
    }
}

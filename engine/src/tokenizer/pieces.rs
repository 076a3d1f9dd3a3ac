//! Cuts a long text into pieces that have, one after the other, the tokens of the whole, so that tokenizing takes memory
//! for a piece and not for the text. Enters: a tokenizer and its vocabulary's bytes; then texts. Leaves: pieces, or the
//! stretch that has no place to be cut. A tokenizer with a step that is not known here is never cut. Pure.
//!
//! A text is cut only behind a letter or digit (a "word"), and only where every step starts anew:
//!
//! - added tokens: none holds a word followed by the character behind the cut, none takes spaces around it;
//! - the normalizer changes no character by what stands beyond a cut;
//! - the pre-tokenizer splits by a pattern that is known ([`PATTERNS`]): none of its alternatives goes on from a letter or
//!   digit to what is neither, or from one of them to the other, and none looks behind; or
//! - without such a pattern the model merges pairs, and no token of its vocabulary spans a cut, so that no merge does.

use std::collections::BTreeSet;

use serde_json::Value;
use tokenizers::models::ModelWrapper;

/// Bytes of a piece, if there is a place to cut before.
pub const PIECE_BYTES: usize = 2 << 10;
/// Bytes without a place to cut that are still tokenized. Words of people and programs are far shorter; encoded data has
/// digits beside letters, or punctuation.
pub const STRETCH_BYTES_MAX: usize = 64 << 10;

/// What may follow a word at a cut: neither letter, number nor mark.
const FOLLOWERS: &str = " \t\n\r!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~，。、；：！？";

/// Patterns by which tokenizers of the supported families split; GPT-2's stands in the step `ByteLevel` itself.
const PATTERNS: [&str; 3] = [
    // Llama 3.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Qwen 2 and 3.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Mistral Nemo.
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// SentencePiece's space.
const SPACE_MARK: &str = "▁";

/// Places where texts are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cuts {
    /// What follows a word behind a cut.
    followers: BTreeSet<char>,
    /// Letters are cut from digits.
    kinds: bool,
    /// The tokenizer puts a space before every text, which stands for the one at the cut.
    space_is_put_back: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Letter,
    Digit,
}

/// What the steps before the model do to a text.
#[derive(Clone, Copy, Debug, Default)]
struct Steps {
    /// They split it by a known pattern.
    split: bool,
    /// They put a space before it, whatever it begins with.
    put_space: bool,
    /// They put a space before it unless it begins with one.
    put_missing_space: bool,
}

impl Cuts {
    /// None for a tokenizer that has a step which is not known here. `vocabulary` is each token's bytes.
    pub fn of<'v>(
        tokenizer: &tokenizers::Tokenizer,
        vocabulary: impl Iterator<Item = &'v [u8]>,
    ) -> Option<Cuts> {
        let steps = steps(tokenizer)?;
        let mut cuts = Cuts {
            followers: FOLLOWERS.chars().collect(),
            kinds: steps.split,
            space_is_put_back: steps.put_space,
        };
        if steps.put_space || steps.put_missing_space {
            cuts.followers.retain(|&c| c == ' ');
            cuts.kinds = false;
        }
        if !steps.split {
            if !merges_alone(tokenizer) {
                return None;
            }
            // A byte of a longer character could be part of a token that spans a cut.
            cuts.followers.retain(char::is_ascii);
            vocabulary.for_each(|token| cuts.spare(&String::from_utf8_lossy(token)));
        }
        for token in tokenizer.get_added_tokens_decoder().values() {
            if token.lstrip || token.rstrip || token.single_word {
                return None;
            }
            if steps.put_space && token.content.starts_with(|c| kind(c).is_some()) {
                return None;
            }
            cuts.spare(&token.content);
        }
        Some(cuts)
    }

    /// Never cut where this token would be.
    fn spare(&mut self, token: &str) {
        for (left, right) in token.chars().zip(token.chars().skip(1)) {
            // What is broken may be the end of a letter.
            let left =
                if left == char::REPLACEMENT_CHARACTER { Some(Kind::Letter) } else { kind(left) };
            match (left, kind(right)) {
                (None, _) => {}
                (Some(_), None) => _ = self.followers.remove(&right),
                (Some(left), Some(right)) => self.kinds &= left == right,
            }
        }
    }

    /// Whether a text may be cut behind `left`; `rest` is not empty.
    fn between(&self, left: char, rest: &str) -> bool {
        let mut rest = rest.chars();
        let right = rest.next().expect("something is left");
        match (kind(left), kind(right)) {
            (None, _) => false,
            (Some(left), Some(right)) => self.kinds && left != right,
            (Some(_), None) => {
                let mut put_back = || rest.next().is_some_and(|c| kind(c).is_some());
                self.followers.contains(&right) && (!self.space_is_put_back || put_back())
            }
        }
    }

    /// Cuts off a piece of up to `piece_bytes`, or of more where nothing before may be cut. None if that is more than
    /// [`STRETCH_BYTES_MAX`].
    pub fn cut<'t>(&self, text: &'t str, piece_bytes: usize) -> Option<(&'t str, &'t str)> {
        if text.len() <= piece_bytes {
            return Some((text, ""));
        }
        let (piece, rest) = text.split_at(self.piece(text, piece_bytes)?);
        let space = if self.space_is_put_back { " " } else { "" };
        Some((piece, rest.strip_prefix(space).unwrap_or(rest)))
    }

    /// The length of that piece.
    fn piece(&self, text: &str, piece_bytes: usize) -> Option<usize> {
        let mut chars = text.char_indices();
        let (_, mut left) = chars.next()?;
        let mut last = None;
        for (at, right) in chars {
            if at > STRETCH_BYTES_MAX || (at > piece_bytes && last.is_some()) {
                break;
            }
            if self.between(left, &text[at..]) {
                last = Some(at);
            }
            left = right;
        }
        last.or((text.len() <= STRETCH_BYTES_MAX).then_some(text.len()))
    }
}

/// Letters of much-used scripts, in whole blocks that hold nothing else, and decimal digits. Others only cut less.
fn kind(c: char) -> Option<Kind> {
    match c {
        '0'..='9' => Some(Kind::Digit),
        'A'..='Z' | 'a'..='z' => Some(Kind::Letter),
        // Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai.
        '\u{c0}'..='\u{d6}' | '\u{d8}'..='\u{f6}' | '\u{f8}'..='\u{24f}' => Some(Kind::Letter),
        '\u{391}'..='\u{3a1}' | '\u{3a3}'..='\u{3ce}' | '\u{400}'..='\u{481}' => Some(Kind::Letter),
        '\u{5d0}'..='\u{5ea}' | '\u{620}'..='\u{64a}' => Some(Kind::Letter),
        '\u{904}'..='\u{939}' | '\u{e01}'..='\u{e30}' => Some(Kind::Letter),
        // Kana, Chinese characters, Hangul.
        '\u{3041}'..='\u{3096}' | '\u{30a1}'..='\u{30fa}' => Some(Kind::Letter),
        '\u{4e00}'..='\u{9fd5}' | '\u{ac00}'..='\u{d7a3}' => Some(Kind::Letter),
        _ => None,
    }
}

fn steps(tokenizer: &tokenizers::Tokenizer) -> Option<Steps> {
    let normalizers = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
    let pre_tokenizers = serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?;
    let mut steps = Steps::default();
    for step in flat(normalizers, "normalizers") {
        normalizer(&step, &mut steps)?;
    }
    for step in flat(pre_tokenizers, "pretokenizers") {
        pre_tokenizer(&step, &mut steps)?;
    }
    Some(steps)
}

/// The steps of a sequence, or the one step there is.
fn flat(step: Value, name: &str) -> Vec<Value> {
    match step {
        Value::Null => Vec::new(),
        Value::Object(mut sequence) if sequence.get("type") == Some(&"Sequence".into()) => {
            match sequence.remove(name) {
                Some(Value::Array(steps)) => {
                    steps.into_iter().flat_map(|step| flat(step, name)).collect()
                }
                _ => Vec::new(),
            }
        }
        one => vec![one],
    }
}

fn normalizer(step: &Value, steps: &mut Steps) -> Option<()> {
    match step["type"].as_str()? {
        // Composes marks and parts of Hangul with what stands before them, none of which follows a cut.
        "NFC" => {}
        "Prepend" if step["prepend"] == SPACE_MARK => steps.put_space = true,
        "Replace" if step["pattern"]["String"] == " " && step["content"] == SPACE_MARK => {}
        _ => return None,
    }
    Some(())
}

fn pre_tokenizer(step: &Value, steps: &mut Steps) -> Option<()> {
    match step["type"].as_str()? {
        "ByteLevel" if step["add_prefix_space"] == false => {
            steps.split |= step["use_regex"] != false;
        }
        "Split" if PATTERNS.iter().any(|pattern| step["pattern"]["Regex"] == *pattern) => {
            let whole = (step["behavior"].as_str()?, step["invert"].as_bool()?);
            if whole != ("Isolated", false) && whole != ("Removed", true) {
                return None;
            }
            steps.split = true;
        }
        "Digits" => {}
        "Metaspace" if step["replacement"] == SPACE_MARK => {
            steps.put_missing_space = step["prepend_scheme"] != "never";
        }
        _ => return None,
    }
    Some(())
}

/// Whether tokens are made of a whole text by merging neighbours and by nothing else.
fn merges_alone(tokenizer: &tokenizers::Tokenizer) -> bool {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return false };
    let every_byte =
        || (0..=255u8).all(|b| tokenizer.token_to_id(&format!("<{b:#04X}>")).is_some());
    let fuses_unknown = model.fuse_unk && model.unk_token.is_some();
    model.continuing_subword_prefix.is_none()
        && model.end_of_word_suffix.is_none()
        && model.dropout.is_none_or(|chance| chance == 0.0)
        && !model.ignore_merges
        && (!fuses_unknown || model.byte_fallback && every_byte())
}

#[cfg(test)]
mod tests;

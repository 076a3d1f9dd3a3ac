//! Cuts a long text into pieces that have, one after the other, the tokens of the whole, so that tokenizing takes memory
//! for a piece and not for the text. Enters: a tokenizer and its vocabulary's bytes; then texts. Leaves: pieces; a stretch
//! without a place to be cut is one, however long. A tokenizer with a step that is not known here is never cut. Pure.
//!
//! A text is cut behind a character that is no space, and only where every step starts anew:
//!
//! - added tokens: none holds such a character followed by the one behind the cut, none takes spaces around it;
//! - the normalizer changes no character by what stands beyond a cut;
//! - the pre-tokenizer splits by a pattern that is known ([`PATTERNS`]): none of its alternatives goes on from a letter or
//!   digit to what is neither, or from one of them to the other, or from anything else to a space that breaks no line,
//!   and none looks behind; or
//! - without such a pattern the model merges pairs, and no token of its vocabulary spans a cut, so that no merge does;
//! - where a space is put before every text, a piece begins with the last character of the one before (it is "known"),
//!   which takes that space; the tokens of both are those of the known character and are left out.

use std::collections::BTreeSet;

use serde_json::Value;
use tokenizers::models::ModelWrapper;

/// Bytes of a piece, if there is a place to cut before.
pub const PIECE_BYTES: usize = 2 << 10;
/// What may follow a letter or digit at a cut: neither letter, number nor mark.
const FOLLOWERS: &str =
    " \t\n\r!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u{3000}，。、；：！？「」『』（）・।،؛؟۔";
/// What may follow any character but spaces, whatever its script and class: spaces that break no line.
const SPACES: &str = " \t\u{3000}";

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
const SPACE_MARK_CHAR: char = '▁';

/// Places where texts are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cuts {
    /// What stands around a cut.
    borders: BTreeSet<(Kind, char)>,
    /// Letters are cut from digits.
    kinds: bool,
    /// The tokenizer puts a space before a text, so that a piece begins with a known character.
    with_known: bool,
    /// Ends of added tokens, which are no known characters: where one stands, it is no text.
    ends: BTreeSet<char>,
}

/// A piece of a text and what is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'t> {
    pub text: &'t str,
    /// Its first bytes that stand in the piece before too.
    pub known: usize,
    rest: &'t str,
    known_of_rest: usize,
}

impl<'t> Piece<'t> {
    /// Before the first piece.
    pub fn none_of(text: &'t str) -> Piece<'t> {
        Piece { text: "", known: 0, rest: text, known_of_rest: 0 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Letter,
    Digit,
    /// ASCII's punctuation.
    Sign,
    /// No space.
    Other,
}

const KINDS: [Kind; 4] = [Kind::Letter, Kind::Digit, Kind::Sign, Kind::Other];

/// What the steps before the model do to a text.
#[derive(Clone, Copy, Debug, Default)]
struct Steps {
    /// They split it by a known pattern.
    split: bool,
    /// They write spaces as [`SPACE_MARK`], which is none for a pattern.
    mark_spaces: bool,
    /// They put a space before it.
    put_space: bool,
}

impl Cuts {
    /// None for a tokenizer that has a step which is not known here. `vocabulary` is each token's bytes.
    pub fn of<'v>(
        tokenizer: &tokenizers::Tokenizer,
        vocabulary: impl Iterator<Item = &'v [u8]>,
    ) -> Option<Cuts> {
        let steps = steps(tokenizer)?;
        let pairs = |kind: Kind, chars: &'static str| chars.chars().map(move |c| (kind, c));
        let words = pairs(Kind::Letter, FOLLOWERS).chain(pairs(Kind::Digit, FOLLOWERS));
        let others = match steps {
            Steps { split: false, .. } => FOLLOWERS,
            Steps { mark_spaces: true, .. } => "",
            _ => SPACES,
        };
        let mut cuts = Cuts {
            borders: words
                .chain(pairs(Kind::Sign, others))
                .chain(pairs(Kind::Other, others))
                .collect(),
            kinds: steps.split && !steps.put_space,
            with_known: steps.put_space,
            ends: BTreeSet::new(),
        };
        if !steps.split {
            if !merges_alone(tokenizer) {
                return None;
            }
            vocabulary.for_each(|token| cuts.spare(&String::from_utf8_lossy(token)));
        }
        for token in tokenizer.get_added_tokens_decoder().values() {
            if token.lstrip || token.rstrip || token.single_word {
                return None;
            }
            cuts.spare(&token.content);
            cuts.ends.extend(token.content.chars().last().filter(|_| steps.put_space));
        }
        Some(cuts)
    }

    /// Never cut where this token would be.
    fn spare(&mut self, token: &str) {
        for (left, right) in token.chars().zip(token.chars().skip(1)) {
            // What is broken may be the end of a character of any kind, or the beginning of any that is not of one byte.
            let broken = left == char::REPLACEMENT_CHARACTER;
            let lefts = KINDS.into_iter().filter(|&of| broken || kind(left) == Some(of));
            for left in lefts {
                match right {
                    char::REPLACEMENT_CHARACTER => {
                        self.borders.retain(|(of, right)| *of != left || right.is_ascii());
                    }
                    _ => _ = self.borders.remove(&(left, right)),
                }
                self.kinds &= !different_words(left, kind(right));
            }
        }
        // Single bytes that were merged.
        if token.contains("<0x") {
            self.borders.retain(|(_, right)| right.is_ascii());
        }
    }

    /// Whether a text may be cut between these.
    fn between(&self, left: char, right: char) -> bool {
        let Some(of) = kind(left) else { return false };
        let borders =
            self.borders.contains(&(of, right)) || self.kinds && different_words(of, kind(right));
        borders && !self.ends.contains(&left)
    }

    /// The piece behind `piece`: of up to `piece_bytes`, or of more where nothing before may be cut. None at the end.
    pub fn next<'t>(&self, piece: Piece<'t>, piece_bytes: usize) -> Option<Piece<'t>> {
        let Piece { rest: text, known_of_rest: known, .. } = piece;
        if text.len() == known {
            return None;
        }
        let (at, last) = self.cut(text, known, piece_bytes);
        let from = if self.with_known { at - last.len_utf8() } else { at };
        let known_of_rest = at - from;
        Some(Piece { text: &text[..at], known, rest: &text[from..], known_of_rest })
    }

    /// Where the piece ends, and its last character.
    fn cut(&self, text: &str, known: usize, piece_bytes: usize) -> (usize, char) {
        let mut chars = text.char_indices();
        let (_, mut left) = chars.next().expect("something is left");
        let mut last = None;
        if text.len() > piece_bytes {
            for (at, right) in chars.by_ref() {
                if at > piece_bytes && last.is_some() {
                    break;
                }
                if at > known && self.between(left, right) {
                    last = Some((at, left));
                }
                left = right;
            }
        }
        let end = || (text.len(), text.chars().last().expect("something is left"));
        last.unwrap_or_else(end)
    }
}

fn different_words(left: Kind, right: Option<Kind>) -> bool {
    matches!((left, right), (Kind::Letter, Some(Kind::Digit)) | (Kind::Digit, Some(Kind::Letter)))
}

/// Letters of some scripts, in whole blocks that hold nothing else, and decimal digits. Of other scripts letters are like
/// marks and punctuation here: a text is cut behind them at spaces alone, which is where people put them. None for what is,
/// or was in some version of Unicode, a space, and for what stands for one.
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
        SPACE_MARK_CHAR | '\u{180e}' | '\u{200b}' | '\u{feff}' => None,
        c if c.is_whitespace() || c.is_control() => None,
        c if c.is_ascii() => Some(Kind::Sign),
        _ => Some(Kind::Other),
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
        "Replace" if step["pattern"]["String"] == " " && step["content"] == SPACE_MARK => {
            steps.mark_spaces = true;
        }
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
            steps.mark_spaces = true;
            steps.put_space |= step["prepend_scheme"] != "never";
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

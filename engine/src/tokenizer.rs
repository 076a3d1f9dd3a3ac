//! Between text and token ids. Enters: a checkpoint's tokenizer.json. Leaves: ids of a text, and for each id the bytes
//! it adds to a text, exact also where a character is spread over tokens. Loading and long texts take milliseconds to
//! seconds: callers on the runtime use a blocking thread. Tokenizing takes memory for a piece of a text; texts that cannot
//! be cut into pieces take turns.

mod pieces;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::batch::TokenId;
use crate::model::{TOKENIZER_FILE, files};
use crate::tokenizer::pieces::{Cuts, PIECE_BYTES, Piece};

/// Ten times as long as the longest known.
const FILE_BYTES_MAX: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The checkpoint has none.
    #[error("{} does not exist; the engine reads tokenizers in this format only", .0.display())]
    Missing(PathBuf),
    /// The file does not parse.
    #[error("{} is not a valid tokenizer: {reason}", path.display())]
    Malformed { path: PathBuf, reason: String },
    /// A decoder the engine has no byte table for.
    #[error("{} uses the decoder {kind}; supported are ByteLevel, ByteFallback and Metaspace", path.display())]
    UnsupportedDecoder { path: PathBuf, kind: String },
}

/// Why a text has no tokens.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("the text cannot be tokenized: {0}")]
    Failed(String),
    /// The caller wants no more.
    #[error("the text has more than {0} tokens")]
    TooManyTokens(usize),
}

/// How token strings stand for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alphabet {
    /// GPT-2's: every byte is one printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0xE2>` a single byte.
    Pieces,
}

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    table: ByteTable,
    special: BTreeSet<TokenId>,
    /// Around a whole text, as the checkpoint defines: BOS and the like.
    before: Vec<TokenId>,
    after: Vec<TokenId>,
    /// None: texts are tokenized whole.
    cuts: Option<Cuts>,
    /// Pieces of more than [`PIECE_BYTES`] take turns: each byte of them takes some hundreds for a moment.
    long_piece: Mutex<()>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir`.
    pub fn open(dir: &Path) -> Result<Tokenizer, TokenizerError> {
        let path = dir.join(TOKENIZER_FILE);
        if !path.exists() {
            return Err(TokenizerError::Missing(path));
        }
        let malformed = |reason: String| TokenizerError::Malformed { path: path.clone(), reason };
        let json = files::read(&path, FILE_BYTES_MAX).map_err(|e| malformed(e.to_string()))?;
        let inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|e| malformed(e.to_string()))?;
        Tokenizer::from_inner(inner, &path)
    }

    fn from_inner(
        mut inner: tokenizers::Tokenizer,
        path: &Path,
    ) -> Result<Tokenizer, TokenizerError> {
        // A training-time cut or filling would change prompts silently.
        let malformed = |e: tokenizers::Error| TokenizerError::Malformed {
            path: path.to_owned(),
            reason: e.to_string(),
        };
        inner.with_truncation(None).map_err(malformed)?;
        inner.with_padding(None);
        // Every thread would keep 10,000 words of its own, of up to 8 KiB each, and gains nothing by it (docs/perf.md).
        let mut model = inner.get_model().clone();
        model.resize_cache(0);
        inner.with_model(model);
        let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or(Value::Null);
        let alphabet = alphabet(&decoder).ok_or_else(|| TokenizerError::UnsupportedDecoder {
            path: path.to_owned(),
            kind: decoder["type"].as_str().unwrap_or("none").to_owned(),
        })?;
        let special = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .collect();
        let table = byte_table(&inner, alphabet);
        let ids = 0..table.starts.len() as TokenId - 1;
        let cuts = Cuts::of(&inner, ids.map(|id| table.bytes(id)));
        let (before, after) = around(&inner).map_err(malformed)?;
        Ok(Tokenizer { inner, table, special, before, after, cuts, long_piece: Mutex::new(()) })
    }

    /// `add_special_tokens`: put BOS and the like around the text, as the checkpoint defines. Ends at `tokens_max`.
    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        tokens_max: usize,
    ) -> Result<Vec<TokenId>, EncodeError> {
        let (before, after) = if add_special_tokens {
            (&self.before[..], &self.after[..])
        } else {
            (&[][..], &[][..])
        };
        let mut ids = before.to_vec();
        let mut take = |piece: &str, known: usize| {
            self.encode_piece(piece, known, &mut ids)?;
            if ids.len() + after.len() > tokens_max {
                return Err(EncodeError::TooManyTokens(tokens_max));
            }
            Ok(())
        };
        match &self.cuts {
            None => take(text, 0)?,
            Some(cuts) => {
                let mut piece = Piece::none_of(text);
                while let Some(next) = cuts.next(piece, PIECE_BYTES) {
                    take(next.text, next.known)?;
                    piece = next;
                }
            }
        }
        ids.extend(after);
        Ok(ids)
    }

    /// Adds the tokens of a piece behind its first bytes, which are `known`.
    fn encode_piece(
        &self,
        piece: &str,
        known: usize,
        ids: &mut Vec<TokenId>,
    ) -> Result<(), EncodeError> {
        let _turn = (piece.len() > PIECE_BYTES)
            .then(|| self.long_piece.lock().unwrap_or_else(PoisonError::into_inner));
        let encode = |text: &str| {
            self.inner.encode_fast(text, false).map_err(|e| EncodeError::Failed(e.to_string()))
        };
        let known = if known == 0 { 0 } else { encode(&piece[..known])?.len() };
        ids.extend(&encode(piece)?.get_ids()[known..]);
        Ok(())
    }

    /// The bytes a token adds to a text; those of a special token are its name. Empty for an id without a token.
    pub fn bytes(&self, id: TokenId) -> &[u8] {
        self.table.bytes(id)
    }

    /// Special tokens (BOS, end of turn) shape the conversation and are no text of it.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.contains(&id)
    }

    /// What a generated token adds to the visible text.
    pub fn visible_bytes(&self, id: TokenId) -> &[u8] {
        if self.is_special(id) { &[] } else { self.bytes(id) }
    }

    /// The text of whole sequences, special tokens included as `with_special` says.
    pub fn text(&self, ids: &[TokenId], with_special: bool) -> String {
        let bytes =
            |&id: &TokenId| if with_special { self.bytes(id) } else { self.visible_bytes(id) };
        let all: Vec<u8> = ids.iter().flat_map(bytes).copied().collect();
        String::from_utf8_lossy(&all).into_owned()
    }

    /// All ids are below this number.
    pub fn ids(&self) -> usize {
        self.table.starts.len() - 1
    }
}

/// The tokens that the checkpoint puts before and behind a text.
fn around(inner: &tokenizers::Tokenizer) -> tokenizers::Result<(Vec<TokenId>, Vec<TokenId>)> {
    let text = "a";
    let bare = inner.encode_fast(text, false)?;
    let full = inner.encode_fast(text, true)?;
    let (bare, full) = (bare.get_ids(), full.get_ids());
    let at = full
        .windows(bare.len().max(1))
        .position(|window| window == bare)
        .ok_or("its post-processor does more than put tokens around a text")?;
    Ok((full[..at].to_vec(), full[at + bare.len()..].to_vec()))
}

/// Bytes of all tokens in one run, entry `i` between `starts[i]` and `starts[i + 1]`.
struct ByteTable {
    all: Vec<u8>,
    starts: Vec<u32>,
}

impl ByteTable {
    fn bytes(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        match (self.starts.get(id), self.starts.get(id + 1)) {
            (Some(&from), Some(&to)) => &self.all[from as usize..to as usize],
            _ => &[],
        }
    }
}

fn byte_table(inner: &tokenizers::Tokenizer, alphabet: Alphabet) -> ByteTable {
    let added = inner.get_added_tokens_decoder();
    let vocabulary = inner.get_vocab(true);
    let mut by_id: Vec<(TokenId, String)> =
        vocabulary.into_iter().map(|(token, id)| (id, token)).collect();
    by_id.sort_unstable_by_key(|(id, _)| *id);
    let mut table = ByteTable { all: Vec::new(), starts: vec![0] };
    let end =
        |table: &ByteTable| u32::try_from(table.all.len()).expect("vocabularies stay below 4 GiB");
    for (id, token) in by_id {
        // Ids without a token are empty entries.
        while table.starts.len() <= id as usize {
            table.starts.push(end(&table));
        }
        match added.get(&id) {
            Some(added) => table.all.extend_from_slice(added.content.as_bytes()),
            None => table.all.extend(token_bytes(&token, alphabet)),
        }
        table.starts.push(end(&table));
    }
    table
}

fn token_bytes(token: &str, alphabet: Alphabet) -> Vec<u8> {
    match alphabet {
        Alphabet::ByteLevel => {
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
            bytes.unwrap_or_else(|| token.as_bytes().to_vec())
        }
        Alphabet::Pieces => match single_byte(token) {
            Some(byte) => vec![byte],
            None => token.replace('▁', " ").into_bytes(),
        },
    }
}

/// `<0xE2>` → 0xE2.
fn single_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Inverse of GPT-2's byte alphabet: printable Latin-1 stands for itself, the other 68 bytes were moved, in order, to
/// U+0100 and up.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Which alphabet a decoder undoes; decoders nest.
fn alphabet(decoder: &Value) -> Option<Alphabet> {
    match decoder["type"].as_str()? {
        "ByteLevel" => Some(Alphabet::ByteLevel),
        "ByteFallback" | "Metaspace" => Some(Alphabet::Pieces),
        "Sequence" => decoder["decoders"].as_array()?.iter().find_map(alphabet),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(json: &str) -> Result<Tokenizer, TokenizerError> {
        let inner = tokenizers::Tokenizer::from_bytes(json.as_bytes()).unwrap();
        Tokenizer::from_inner(inner, Path::new("tokenizer.json"))
    }

    /// A byte-level vocabulary of single bytes, in the order of the alphabet.
    fn byte_level() -> String {
        let chars: Vec<char> = (0u32..0x180)
            .filter_map(char::from_u32)
            .filter(|&c| byte_of_char(c).is_some())
            .collect();
        let vocab: serde_json::Map<String, Value> =
            chars.iter().enumerate().map(|(i, c)| (c.to_string(), Value::from(i))).collect();
        serde_json::json!({
            "version": "1.0",
            "added_tokens": [{"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []}
        })
        .to_string()
    }

    #[test]
    fn every_byte_has_exactly_one_character_of_the_alphabet() {
        let mut bytes: Vec<u8> =
            (0..0x180).filter_map(char::from_u32).filter_map(byte_of_char).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn byte_level_tokens_give_back_the_text_that_made_them() {
        let tokenizer = load(&byte_level()).unwrap();
        let text = "Grüße, 世界 🌍\n\tok\u{7f}\u{ad}";
        let ids = tokenizer.encode(text, false, usize::MAX).unwrap();
        assert_eq!(ids.len(), text.len());
        assert_eq!(tokenizer.text(&ids, false), text);
    }

    #[test]
    fn a_text_that_cannot_be_cut_is_tokenized_whole_however_long_it_is() {
        let tokenizer = load(&byte_level()).unwrap();
        for stretch in ["x", "汉", "="] {
            let text = stretch.repeat(300_000 / stretch.len());
            let ids = tokenizer.encode(&text, false, usize::MAX).unwrap();
            assert!(tokenizer.text(&ids, false) == text, "{stretch}");
        }
        let refused = tokenizer.encode(&"x".repeat(300_000), false, 100_000).unwrap_err();
        assert!(matches!(refused, EncodeError::TooManyTokens(100_000)), "{refused}");
    }

    #[test]
    fn a_special_token_is_its_name_but_no_visible_text() {
        let tokenizer = load(&byte_level()).unwrap();
        let ids = tokenizer.encode("a<|end|>", false, usize::MAX).unwrap();
        assert_eq!(ids[1], 256);
        assert_eq!(tokenizer.text(&ids, true), "a<|end|>");
        assert_eq!(tokenizer.text(&ids, false), "a");
        assert_eq!(tokenizer.bytes(9999), b"");
    }

    #[test]
    fn sentencepiece_tokens_spell_spaces_and_single_bytes() {
        assert_eq!(token_bytes("▁the", Alphabet::Pieces), b" the");
        assert_eq!(token_bytes("<0xE2>", Alphabet::Pieces), [0xe2]);
        assert_eq!(token_bytes("<0xE>", Alphabet::Pieces), b"<0xE>");
        let llama2 = serde_json::json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]});
        assert_eq!(alphabet(&llama2), Some(Alphabet::Pieces));
    }

    #[test]
    fn an_unknown_decoder_is_refused_by_name() {
        let json = byte_level().replace(
            r#""decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#,
            r###""decoder":{"type":"WordPiece","prefix":"##","cleanup":true}"###,
        );
        let error = load(&json).err().unwrap();
        assert!(error.to_string().contains("WordPiece"), "{error}");
    }
}

use serde_json::json;

use super::*;

/// The bundled model's tokenizer, whose vocabulary was trained on words, with other steps before the model.
fn bundled(change: impl FnOnce(&mut Value)) -> tokenizers::Tokenizer {
    let named = std::env::var_os("PLIMSOLL_TESTS").map(std::path::PathBuf::from);
    let tests = named.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../tests").into());
    let json = std::fs::read(tests.join("model/tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_slice(&json).unwrap();
    change(&mut json);
    tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn bytes_only() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false})
}

/// A sequence of a pattern's step and bytes, as Llama 3 and Qwen have it.
fn by_pattern(pattern: &str) -> Value {
    let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    json!({"type": "Sequence", "pretokenizers": [split, bytes_only()]})
}

/// Every byte, some characters, and what follows from pairs of them: as Llama 2's, in small.
fn sentence_pieces(normalizer: &Value, pre_tokenizer: &Value) -> tokenizers::Tokenizer {
    let mut tokens: Vec<String> = vec!["<unk>".into(), "<s>".into()];
    tokens.extend((0..=255u8).map(|b| format!("<{b:#04X}>")));
    tokens.extend("▁abcdest,.'0123 é汉".chars().filter(|c| *c != ' ').map(String::from));
    let merges = [
        ("▁", "▁"),
        ("▁", "a"),
        ("a", "b"),
        ("▁", "t"),
        ("e", "s"),
        ("▁t", "es"),
        ("t", "s"),
        ("es", "t"),
        (",", "▁"),
        (".", "."),
        ("c", "."),
        ("1", "2"),
        ("▁", "1"),
        ("d", "'"),
    ];
    for (left, right) in merges {
        tokens.push(format!("{left}{right}"));
    }
    let vocabulary: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let added = json!([{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true}]);
    let json = json!({
        "version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": "<unk>", "fuse_unk": true,
            "byte_fallback": true},
    });
    tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap()
}

fn cuts(tokenizer: &tokenizers::Tokenizer) -> Option<Cuts> {
    let vocabulary = tokenizer.get_vocab(true);
    // Each as its bytes, of which those of the tests' tokens are plain.
    let bytes: Vec<Vec<u8>> = vocabulary
        .keys()
        .map(|token| token.replace(['▁', 'Ġ'], " ").replace('Ċ', "\n").into())
        .collect();
    Cuts::of(tokenizer, bytes.iter().map(Vec::as_slice))
}

fn llama_2() -> tokenizers::Tokenizer {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let normalizer = json!({"type": "Sequence", "normalizers": [prepend, replace]});
    sentence_pieces(&normalizer, &Value::Null)
}

fn metaspace(scheme: &str) -> tokenizers::Tokenizer {
    let step =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    sentence_pieces(&Value::Null, &step)
}

/// Every shape of tokenizer that is cut.
fn shapes() -> Vec<(&'static str, tokenizers::Tokenizer)> {
    let pattern =
        |index: usize| bundled(|json| json["pre_tokenizer"] = by_pattern(PATTERNS[index]));
    let composed = bundled(|json| {
        json["pre_tokenizer"] = by_pattern(PATTERNS[1]);
        json["normalizer"] = json!({"type": "NFC"});
    });
    vec![
        ("digits, then GPT-2's pattern", bundled(|_| ())),
        ("Llama 3", pattern(0)),
        ("Qwen", composed),
        ("Mistral Nemo", pattern(2)),
        ("no pattern", bundled(|json| json["pre_tokenizer"] = bytes_only())),
        ("Llama 2", llama_2()),
        ("Metaspace, first", metaspace("first")),
        ("Metaspace, never", metaspace("never")),
    ]
}

/// What a text is made of: kinds of characters, and what steps look at together.
const PARTS: [&str; 48] = [
    "a",
    "b",
    "test",
    "Some",
    "don't",
    "I'LL",
    "'",
    "''",
    "s",
    "é",
    "e\u{301}",
    "\u{301}",
    "ñ",
    "и",
    "ß",
    "汉",
    "字",
    "，",
    "。",
    "한",
    "\u{1112}\u{1161}",
    "\u{11ab}",
    "1",
    "23",
    "4567",
    "½",
    "²",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    ".",
    "...",
    ", ",
    "/",
    "_",
    "<",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "▁",
    "🌍",
    "👩‍🚀",
    "\u{a0}",
    "\u{2028}",
];

fn text(dice: &mut u64, parts: usize) -> String {
    let mut below = |n: usize| {
        *dice =
            dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*dice >> 33) as usize % n
    };
    (0..parts).map(|_| PARTS[below(PARTS.len())]).collect()
}

fn pieces<'t>(cuts: &Cuts, text: &'t str, piece_bytes: usize) -> Vec<&'t str> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let (piece, behind) = cuts.cut(rest, piece_bytes).unwrap();
        pieces.push(piece);
        rest = behind;
    }
    pieces
}

fn ids(tokenizer: &tokenizers::Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec()
}

#[test]
fn pieces_have_the_tokens_of_the_whole_for_every_shape_and_a_thousand_seeds() {
    for (shape, tokenizer) in shapes() {
        let cuts = cuts(&tokenizer).unwrap_or_else(|| panic!("{shape} is cut"));
        let mut most = 0;
        for seed in 0..1000 {
            let mut dice = seed;
            let text = text(&mut dice, 200);
            // At every place there is, then at some.
            for piece_bytes in [1, 40] {
                let pieces = pieces(&cuts, &text, piece_bytes);
                let together: Vec<u32> =
                    pieces.iter().flat_map(|piece| ids(&tokenizer, piece)).collect();
                assert_eq!(together, ids(&tokenizer, &text), "{shape}, seed {seed}: {pieces:?}");
                most = most.max(pieces.len());
            }
        }
        assert!(most >= 5, "{shape}: {most}");
    }
}

#[test]
fn a_long_text_of_words_falls_into_pieces_and_one_without_words_does_not() {
    let cuts = cuts(&bundled(|_| ())).unwrap();
    let lengths = |text: &str| pieces(&cuts, text, 2048).iter().map(|piece| piece.len()).max();
    for words in ["the cat sat. ", "{\"a\":1,", "deadbeef01", "人人生而自由，", "x\n", "0.25,"]
    {
        let most = lengths(&words.repeat(20_000 / words.len())).unwrap();
        assert!(most <= 2048, "{words:?}: {most}");
    }
    assert_eq!(lengths(&"x".repeat(STRETCH_BYTES_MAX)), Some(STRETCH_BYTES_MAX));
    assert_eq!(cuts.cut(&"x".repeat(STRETCH_BYTES_MAX + 1), 2048), None);
}

#[test]
fn a_token_is_never_cut() {
    let with = |content: &str| {
        bundled(|json| {
            let mut added = json["added_tokens"][3].clone();
            (added["id"], added["content"]) = (json!(4096), json!(content));
            json["added_tokens"].as_array_mut().unwrap().push(added);
        })
    };
    let plain = cuts(&bundled(|_| ())).unwrap();
    assert!(plain.followers.contains(&',') && plain.kinds);
    assert!(!plain.followers.contains(&'|'), "<|im_end|>");
    assert!(!cuts(&with("well, well")).unwrap().followers.contains(&','));
    assert!(!cuts(&with("<h1>")).unwrap().kinds);
    // Without a pattern the vocabulary counts: `c.` is a token of it.
    assert!(!cuts(&metaspace("never")).unwrap().followers.contains(&'.'));
    assert!(cuts(&metaspace("never")).unwrap().followers.contains(&','));
    assert_eq!(cuts(&llama_2()).unwrap().followers, [' '].into());
}

#[test]
fn a_tokenizer_with_a_step_that_is_not_known_is_never_cut() {
    let strips = |json: &mut Value| json["added_tokens"][0]["rstrip"] = json!(true);
    let prefixes = |json: &mut Value| {
        json["pre_tokenizer"] = bytes_only();
        json["pre_tokenizer"]["add_prefix_space"] = json!(true);
    };
    let looks_behind = |json: &mut Value| json["pre_tokenizer"] = by_pattern(r"(?<=a) b|\s+|\S+");
    let lowers = |json: &mut Value| json["normalizer"] = json!({"type": "Lowercase"});
    let takes_words = |json: &mut Value| {
        json["pre_tokenizer"] = bytes_only();
        json["model"]["ignore_merges"] = json!(true);
    };
    let changes: [&dyn Fn(&mut Value); 5] =
        [&strips, &prefixes, &looks_behind, &lowers, &takes_words];
    for (number, change) in changes.into_iter().enumerate() {
        assert_eq!(cuts(&bundled(change)), None, "{number}");
    }
}

#[test]
fn the_table_of_letters_holds_letters() {
    let letter = tokenizers::utils::SysRegex::new(r"^\p{L}$").unwrap();
    let digit = tokenizers::utils::SysRegex::new(r"^\p{N}$").unwrap();
    let other = tokenizers::utils::SysRegex::new(r"^[^\p{L}\p{N}\p{M}]$").unwrap();
    for c in char::MIN..=char::MAX {
        let class = match kind(c) {
            Some(Kind::Letter) => &letter,
            Some(Kind::Digit) => &digit,
            None if FOLLOWERS.contains(c) => &other,
            None => continue,
        };
        assert_eq!(class.find_iter(c.encode_utf8(&mut [0; 4])).count(), 1, "{c:?}");
    }
}

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
        .filter(|token| !(token.len() == 6 && token.starts_with("<0x")))
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
const PARTS: [&str; 54] = [
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
    "தமிழ்",
    "கி",
    "ქარ",
    "។",
    "\u{3000}",
    "\u{1361}",
];

fn text(dice: &mut u64, parts: usize) -> String {
    let mut below = |n: usize| {
        *dice =
            dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*dice >> 33) as usize % n
    };
    (0..parts).map(|_| PARTS[below(PARTS.len())]).collect()
}

fn pieces<'t>(cuts: &Cuts, text: &'t str, piece_bytes: usize) -> Vec<Piece<'t>> {
    let next = |piece: &Piece<'t>| cuts.next(*piece, piece_bytes);
    std::iter::successors(next(&Piece::none_of(text)), next).collect()
}

/// The tokens of pieces, one after the other.
fn together(tokenizer: &tokenizers::Tokenizer, pieces: &[Piece]) -> Vec<u32> {
    let of_piece = |piece: &Piece| {
        let known = ids(tokenizer, &piece.text[..piece.known]).len();
        ids(tokenizer, piece.text).split_off(known)
    };
    pieces.iter().flat_map(of_piece).collect()
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
                let together = together(&tokenizer, &pieces);
                assert_eq!(together, ids(&tokenizer, &text), "{shape}, seed {seed}: {pieces:?}");
                most = most.max(pieces.len());
            }
        }
        assert!(most >= 5, "{shape}: {most}");
    }
}

/// The bytes of the longest piece.
fn longest(cuts: &Cuts, text: &str) -> usize {
    pieces(cuts, text, PIECE_BYTES).iter().map(|piece| piece.text.len()).max().unwrap()
}

/// Texts as people and programs write them, by script.
const SCRIPTS: [(&str, &str); 24] = [
    ("Latin", "All human beings are born free and equal. "),
    ("Greek", "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι "),
    ("Cyrillic", "Все люди рождаются свободными и равными "),
    ("Hebrew", "כל בני האדם נולדו בני חורין "),
    ("Arabic", "يولد جميع الناس أحرارا متساوين "),
    ("Devanagari", "सभी मनुष्यों को गौरव और अधिकारों "),
    ("Bengali", "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা "),
    ("Tamil", "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே "),
    ("Telugu", "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును "),
    ("Kannada", "ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ "),
    ("Malayalam", "മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടും "),
    ("Gujarati", "પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ "),
    ("Gurmukhi", "ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ "),
    ("Sinhala", "සියලු මනුෂ්‍යයෝ නිදහස්ව උපත ලබා "),
    ("Georgian", "ყველა ადამიანი იბადება თავისუფალი "),
    ("Armenian", "Բոլոր մարդիկ ծնվում են ազատ "),
    ("Amharic", "የሰው ልጅ ሁሉ ሲወለድ ነጻና "),
    ("Khmer", "មនុស្សទាំងអស់ កើតមកមានសេរីភាព "),
    ("Burmese", "လူတိုင်းသည် တူညီ လွတ်လပ်သော "),
    ("Thai", "มนุษย์ทั้งหลายเกิดมามีอิสระ และเสมอภาคกัน "),
    ("Korean", "모든 인간은 태어날 때부터 자유로우며 "),
    ("Chinese", "人人生而自由，在尊严和权利上一律平等。"),
    ("Japanese", "すべての人間は、生まれながらにして自由であり、"),
    ("Emoji", "👩‍🚀🌍 🎉 "),
];

#[test]
fn long_texts_of_every_script_fall_into_pieces_with_the_tokens_of_the_whole() {
    let programs = [
        ("CSV", "0.25,17,abcde,"),
        ("JSON", r#"{"ab":12,"cd":[1,2]},"#),
        ("base64", "deadBEEF01+/"),
    ];
    for (shape, tokenizer) in shapes() {
        let cuts = cuts(&tokenizer).unwrap();
        for (script, text) in SCRIPTS.into_iter().chain(programs) {
            let text = text.repeat(20_000 / text.len());
            let most = longest(&cuts, &text);
            assert!(most <= PIECE_BYTES + 4, "{shape}, {script}: {most}");
            let pieces = pieces(&cuts, &text, PIECE_BYTES);
            assert_eq!(together(&tokenizer, &pieces), ids(&tokenizer, &text), "{shape}, {script}");
        }
    }
}

#[test]
fn what_cannot_be_cut_is_one_piece_and_what_stands_around_it_is_not() {
    let cuts = cuts(&bundled(|_| ())).unwrap();
    let word = "x".repeat(300_000);
    assert_eq!(longest(&cuts, &word), word.len());
    let text = format!("{0}{word} {0}", "the cat sat. ".repeat(1000));
    let lengths: Vec<usize> =
        pieces(&cuts, &text, PIECE_BYTES).iter().map(|p| p.text.len()).collect();
    assert_eq!(lengths.iter().sum::<usize>(), text.len());
    assert_eq!(lengths.iter().filter(|length| **length > PIECE_BYTES).count(), 1, "{lengths:?}");
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
    let has = |cuts: &Cuts, c| cuts.borders.contains(&(Kind::Letter, c));
    let plain = cuts(&bundled(|_| ())).unwrap();
    assert!(has(&plain, ',') && plain.kinds);
    assert!(!plain.borders.contains(&(Kind::Sign, ',')), "` ?[^\\s\\p{{L}}\\p{{N}}]+` goes on");
    assert!(!has(&cuts(&with("well, well")).unwrap(), ','));
    assert!(!has(&cuts(&with("<|im_end|>x")).unwrap(), '|'));
    assert!(!cuts(&with("<h1>")).unwrap().kinds);
    assert!(!cuts(&with("<|a |>")).unwrap().borders.contains(&(Kind::Letter, ' ')));
    assert!(!cuts(&with("<| a|>")).unwrap().borders.contains(&(Kind::Sign, ' ')));
    // Without a pattern the vocabulary counts: `c.` and `, ` are tokens of it.
    for shape in [metaspace("never"), metaspace("first"), llama_2()] {
        let cuts = cuts(&shape).unwrap();
        assert!(!has(&cuts, '.') && has(&cuts, ',') && has(&cuts, '，'));
        assert!(has(&cuts, ' ') && !cuts.borders.contains(&(Kind::Sign, ' ')));
    }
    // Bytes of a longer character could be merged with what stands before them.
    let broken = [b"a\xef".as_slice()];
    let bytes = bundled(|json| json["pre_tokenizer"] = bytes_only());
    let cuts = Cuts::of(&bytes, broken.into_iter()).unwrap();
    assert!(!has(&cuts, '，') && has(&cuts, ',') && cuts.borders.contains(&(Kind::Digit, '，')));
}

#[test]
fn behind_an_added_token_a_space_would_be_put_at_another_place() {
    let mut tokenizer = llama_2();
    let token =
        tokenizers::AddedToken { content: "test".into(), normalized: false, ..Default::default() };
    tokenizer.add_tokens([token]).unwrap();
    let cuts = cuts(&tokenizer).unwrap();
    for text in ["a, test, dab, test b", "atest b,test"] {
        let pieces = pieces(&cuts, text, 1);
        assert!(pieces.len() > 1);
        assert_eq!(together(&tokenizer, &pieces), ids(&tokenizer, text), "{text}: {pieces:?}");
    }
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
    let no_space = tokenizers::utils::SysRegex::new(r"^\S$").unwrap();
    for c in char::MIN..=char::MAX {
        let class = match kind(c) {
            Some(Kind::Letter) => &letter,
            Some(Kind::Digit) => &digit,
            _ if FOLLOWERS.contains(c) => &other,
            Some(Kind::Sign | Kind::Other) => &no_space,
            None => continue,
        };
        assert_eq!(class.find_iter(c.encode_utf8(&mut [0; 4])).count(), 1, "{c:?}");
    }
}

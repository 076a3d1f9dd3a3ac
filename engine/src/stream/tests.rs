//! Properties of the text stream: no cutting of the bytes changes the text, and nothing of a stop string escapes.

use proptest::prelude::*;

use super::*;

fn stops(list: &[&str]) -> Arc<[String]> {
    list.iter().map(|s| s.to_string()).collect()
}

fn report(token: u32) -> TokenLogprob {
    TokenLogprob { token, logprob: -1.0, rank: 1, top: Vec::new() }
}

/// Pushes `bytes` cut after each of `cuts` and returns the deltas.
fn run(stops: &Arc<[String]>, bytes: &[u8], cuts: &[usize]) -> Vec<Delta> {
    let mut stream = TextStream::new(stops.clone());
    let mut deltas = Vec::new();
    let mut from = 0;
    for (token, &to) in cuts.iter().chain([&bytes.len()]).enumerate() {
        deltas.push(stream.push(&bytes[from..to], Some(report(token as u32))));
        from = to;
    }
    deltas.push(stream.end());
    deltas
}

fn text(deltas: &[Delta]) -> String {
    deltas.iter().map(|d| d.text.as_str()).collect()
}

#[test]
fn a_character_cut_in_three_comes_out_whole() {
    let mut stream = TextStream::new(stops(&[]));
    assert_eq!(stream.push(&[0xe2], None).text, "");
    assert_eq!(stream.push(&[0x82], None).text, "");
    assert_eq!(stream.push(&[0xac, b'!'], None).text, "€!");
    assert_eq!(stream.end().text, "");
}

#[test]
fn an_unfinished_character_at_the_end_becomes_a_replacement_character() {
    let mut stream = TextStream::new(stops(&[]));
    assert_eq!(stream.push(&[b'a', 0xe2, 0x82], None).text, "a");
    assert_eq!(stream.end().text, "\u{fffd}");
}

#[test]
fn a_stop_string_across_three_tokens_never_shows() {
    let mut stream = TextStream::new(stops(&["<end>"]));
    assert_eq!(stream.push(b"yes <e", None).text, "yes ");
    assert_eq!(stream.push(b"n", None).text, "");
    let last = stream.push(b"d> more", None);
    assert!(last.stopped);
    assert_eq!(last.text, "");
    assert_eq!(stream.push(b"after", None).text, "");
    assert_eq!(stream.end().text, "");
}

#[test]
fn text_that_only_looked_like_a_stop_string_is_given_back() {
    let mut stream = TextStream::new(stops(&["<end>"]));
    assert_eq!(stream.push(b"<en", None).text, "");
    assert_eq!(stream.push(b"ough", None).text, "<enough");
    assert_eq!(stream.push(b"<en", None).text, "");
    assert_eq!(stream.end().text, "<en");
}

#[test]
fn the_stop_string_complete_first_wins_and_of_those_the_longest() {
    for cuts in [vec![], vec![1], vec![1, 2, 3]] {
        assert_eq!(text(&run(&stops(&["abcd", "bc"]), b"abcd", &cuts)), "a");
        assert_eq!(text(&run(&stops(&["bc", "abc"]), b"xabc", &cuts)), "x");
    }
}

#[test]
fn reports_wait_for_their_text_and_those_of_the_stop_string_are_dropped() {
    let mut stream = TextStream::new(stops(&["stop"]));
    assert_eq!(stream.push(b"go ", Some(report(0))).logprobs[0].logprob.token, 0);
    assert!(stream.push(b"st", Some(report(1))).logprobs.is_empty());
    let given = stream.push(b"ay s", Some(report(2)));
    assert_eq!(given.text, "stay ");
    assert_eq!(given.logprobs.iter().map(|p| p.logprob.token).collect::<Vec<_>>(), [1]);
    assert_eq!(given.logprobs[0].offset_chars, 3);
    let last = stream.push(b"top", Some(report(3)));
    // Token 2 made text before the stop string, token 3 did not.
    assert_eq!(last.logprobs.iter().map(|p| p.logprob.token).collect::<Vec<_>>(), [2]);
    assert_eq!(last.logprobs[0].offset_chars, 5);
}

#[test]
fn offsets_count_characters_not_bytes() {
    let deltas = run(&stops(&[]), "äöü".as_bytes(), &[2, 4]);
    let offsets: Vec<_> = deltas.iter().flat_map(|d| &d.logprobs).map(|p| p.offset_chars).collect();
    assert_eq!(offsets, [0, 1, 2]);
}

fn bytes_and_cuts() -> impl Strategy<Value = (Vec<u8>, Vec<usize>)> {
    let byte = prop_oneof![
        4 => prop::sample::select(b"abc".to_vec()),
        1 => prop::sample::select(vec![0xe2, 0x82, 0xac, 0xf0, 0x9f, 0x98, 0x80, 0xff, 0xc3, 0xa4]),
    ];
    let euro = Just("€".as_bytes().to_vec());
    let piece = prop_oneof![3 => byte.prop_map(|b| vec![b]), 1 => euro];
    prop::collection::vec(piece, 0..40).prop_map(|p| p.concat()).prop_flat_map(|bytes| {
        let cuts = prop::collection::vec(0..=bytes.len(), 0..12).prop_map(|mut cuts| {
            cuts.sort_unstable();
            cuts
        });
        (Just(bytes), cuts)
    })
}

/// The definition, on the whole text: the earliest end of any stop string, of those the earliest start.
fn expected(bytes: &[u8], stops: &[String]) -> (String, bool) {
    let whole = String::from_utf8_lossy(bytes).into_owned();
    for end in 1..=whole.len() {
        let ending = stops.iter().filter(|s| whole.as_bytes()[..end].ends_with(s.as_bytes()));
        if let Some(longest) = ending.map(String::len).max() {
            return (whole[..end - longest].to_owned(), true);
        }
    }
    (whole, false)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_cutting_changes_the_text(
        (bytes, cuts) in bytes_and_cuts(),
        list in prop::collection::vec("[ab€]{1,4}", 0..4),
    ) {
        let stops: Arc<[String]> = list.into();
        let deltas = run(&stops, &bytes, &cuts);
        let (whole, stopped) = expected(&bytes, &stops);
        prop_assert_eq!(text(&deltas), whole);
        prop_assert_eq!(deltas.last().unwrap().stopped, stopped);
    }

    #[test]
    fn without_a_stop_every_report_comes_once_and_in_order((bytes, cuts) in bytes_and_cuts()) {
        let deltas = run(&stops(&["aab", "€a"]), &bytes, &cuts);
        let tokens: Vec<u32> =
            deltas.iter().flat_map(|d| &d.logprobs).map(|p| p.logprob.token).collect();
        let all = deltas.last().unwrap().stopped || tokens.len() == cuts.len() + 1;
        prop_assert!(all);
        prop_assert!(tokens.iter().enumerate().all(|(i, &t)| i as u32 == t));
    }
}

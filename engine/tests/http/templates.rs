//! Chat templates that mean harm: whatever a checkpoint brings, rendering ends, soon, in text or in a named error.

use std::time::{Duration, Instant};

use plimsoll_engine::chat_template::{ChatTemplate, Rendering, SpecialTokens};
use serde_json::{Value, json};

use crate::dice::{Dice, fuzz_seed, fuzz_time};

/// The longest that one rendering may take; its fuel is the real bound.
const RENDER_TIME_MAX: Duration = Duration::from_secs(20);

/// Pieces that templates are made of, harmful ones among them.
const PIECES: [&str; 47] = [
    "{% for m in messages %}",
    "{% for i in range(100000) %}",
    "{% for i in range(9) %}",
    "{% endfor %}",
    "{% if m.role == 'user' %}",
    "{% if loop.first and not loop.last %}",
    "{% elif x is defined %}",
    "{% else %}",
    "{% endif %}",
    "{% set x = messages | length %}",
    "{% set ns = namespace(s='ab') %}",
    "{% set ns.s = ns.s + ns.s %}",
    "{% set ns.s = ns.s ~ ns.s | upper %}",
    "{% macro f(a) %}",
    "{% endmacro %}",
    "{{ f(f(1)) }}",
    "{{ f(messages) }}",
    "{% generation %}",
    "{%- endgeneration -%}",
    "{% break %}",
    "{% continue %}",
    "{{ m.content }}",
    "{{ messages[-1]['content'][:5] }}",
    "{{ messages | tojson(indent=4) }}",
    "{{ messages | map(attribute='content') | join(', ') }}",
    "{{ 'x' * 1000000 }}",
    "{{ 'x' * 99999999999 }}",
    "{{ [1] * 100000000 }}",
    "{{ range(1000000) | list | length }}",
    "{{ m.content.split(' ') | last | trim }}",
    "{{ m.content.replace('a', 'aaaa') }}",
    "{{ '%s' | format(1) }}",
    "{{ strftime_now('%Y-%m-%d %H %q') }}",
    "{{ raise_exception('no') }}",
    "{{ bos_token + eos_token }}",
    "{{ 1 / 0 }}",
    "{{ 9223372036854775807 + 1 }}",
    "{{ -9223372036854775808 // -1 }}",
    "{{ 2 ** 9999 }}",
    "{{ messages[0].role.unknown.deeper }}",
    "{{ m.content.encode('utf8') }}",
    "{% raw %}{{ x }}{% endraw %}",
    "{# note #}",
    "text €\u{0}\n",
    "{{ ((((((((1)))))))) }}",
    "{%",
    "{%}",
];

fn source(dice: &mut Dice) -> String {
    let pieces = 1 + dice.below(14);
    let mut source: String = (0..pieces).map(|_| *dice.of(&PIECES)).collect();
    // Half of the templates are closed as a person would, so that more than the parser is reached.
    if dice.below(2) == 0 {
        for (open, close) in
            [("{% for", "{% endfor %}"), ("{% if", "{% endif %}"), ("{% macro", "{% endmacro %}")]
        {
            let missing =
                source.matches(open).count().saturating_sub(source.matches(close).count());
            source.push_str(&close.repeat(missing));
        }
    }
    if dice.below(8) == 0 {
        let at = (0..=dice.below(source.len() + 1)).rev().find(|&at| source.is_char_boundary(at));
        source.insert(at.unwrap(), char::from(dice.next() as u8));
    }
    source
}

#[test]
fn fuzz_templates_end_in_text_or_in_a_named_error() {
    let mut dice = Dice(fuzz_seed());
    let message = |role: &str| json!({"role": role, "content": "a b ".repeat(role.len())});
    let messages: Vec<Value> = ["system", "user", "assistant"].map(message).into();
    let special = SpecialTokens { bos: Some("<s>".into()), ..SpecialTokens::default() };
    let (mut compiled, mut rendered) = (0u64, 0u64);
    let (end, mut slowest) = (Instant::now() + fuzz_time(), Duration::ZERO);
    while Instant::now() < end || compiled < 100 {
        let source = source(&mut dice);
        let Ok(template) = ChatTemplate::compile(&source, special.clone()) else { continue };
        compiled += 1;
        let began = Instant::now();
        let text = template.render(&Rendering {
            messages: &messages,
            add_generation_prompt: true,
            variables: json!({"x": 1}).as_object().unwrap(),
            now_unix_seconds: dice.next() as i64 >> 20,
        });
        slowest = slowest.max(began.elapsed());
        assert!(began.elapsed() < RENDER_TIME_MAX, "{source}");
        rendered += u64::from(text.is_ok());
    }
    println!("{compiled} templates compiled, {rendered} rendered, slowest {slowest:?}");
    assert!(compiled > 20 && rendered > 5, "the templates are too broken to test anything");
}

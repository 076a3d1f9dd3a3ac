//! Templates as checkpoints write them, and templates that mean harm.

use serde_json::json;

use super::*;

fn special() -> SpecialTokens {
    SpecialTokens { bos: Some("<s>".into()), eos: Some("</s>".into()), ..SpecialTokens::default() }
}

fn render_with(source: &str, messages: Json, variables: Json) -> Result<String, ChatTemplateError> {
    let template = ChatTemplate::compile(source, special())?;
    template.render(&Rendering {
        messages: messages.as_array().unwrap(),
        add_generation_prompt: true,
        variables: variables.as_object().unwrap(),
        now_unix_seconds: 1_709_210_096, // 2024-02-29 12:34:56 UTC
    })
}

fn render(source: &str, messages: Json) -> Result<String, ChatTemplateError> {
    render_with(source, messages, json!({}))
}

#[test]
fn a_chatml_template_renders_every_turn_and_opens_the_next() {
    let source = "{% for m in messages %}\n{{ '<|im_start|>' + m['role'] + '\\n' + m.content.strip() }}<|im_end|>\n{% endfor %}\n{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let text = render(source, json!([{"role": "user", "content": " hi "}])).unwrap();
    assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn special_tokens_dates_and_python_methods_are_there() {
    let source = "{{ bos_token }}{{ strftime_now('%d %b %Y, %A %H:%M:%S') }} {{ messages[0].content.split(' ')[-1].upper() }}{% if tools is none %} no tools{% endif %}";
    let text = render(source, json!([{"role": "user", "content": "a b"}])).unwrap();
    assert_eq!(text, "<s>29 Feb 2024, Thursday 12:34:56 B no tools");
}

#[test]
fn dates_are_right_on_both_sides_of_1970_and_at_ends_of_years() {
    let day = |days| civil(days);
    assert_eq!(day(0), (1970, 1, 1));
    assert_eq!(day(-1), (1969, 12, 31));
    assert_eq!(day(11_016), (2000, 2, 29));
    assert_eq!(day(20_088), (2024, 12, 31));
    assert_eq!(strftime("%q", 0), Err('q'));
}

#[test]
fn tojson_writes_what_python_writes() {
    let messages = json!([{"role": "user", "content": "x", "call": {"b": [1, "<ü>"], "a": null}}]);
    let text = render("{{ messages[0].call | tojson }}", messages.clone()).unwrap();
    assert_eq!(text, r#"{"b": [1, "<ü>"], "a": null}"#);
    let text = render("{{ messages[0].call | tojson(indent=2) }}", messages.clone()).unwrap();
    assert_eq!(text, "{\n  \"b\": [\n    1,\n    \"<ü>\"\n  ],\n  \"a\": null\n}");
    let text = render("{{ messages[0].call | tojson(sort_keys=true) }}", messages).unwrap();
    assert_eq!(text, r#"{"a": null, "b": [1, "<ü>"]}"#);
}

#[test]
fn generation_tags_leave_their_content_and_their_trimming() {
    let source =
        "a {%- generation -%} b {% endgeneration %}c{% set generation = 'd' %}{{ generation }}";
    assert_eq!(render(source, json!([])).unwrap(), "ab cd");
}

#[test]
fn a_tag_that_never_closes_is_refused_as_it_stands() {
    for source in ["{%}", "a {%}", "a {%", "{%%}", "b {% generation {%}"] {
        assert_eq!(without_generation_tags(source), source);
        assert!(
            matches!(render(source, json!([])), Err(ChatTemplateError::Invalid(_))),
            "{source}"
        );
    }
}

#[test]
fn the_clients_variables_reach_the_template_but_cannot_replace_the_messages() {
    let source = "{{ enable_thinking }} {{ messages | length }}";
    let variables = json!({"enable_thinking": false, "messages": [1, 2, 3]});
    let text = render_with(source, json!([{"role": "user", "content": "x"}]), variables).unwrap();
    assert_eq!(text, "False 1");
}

#[test]
fn a_template_that_raises_refuses_in_its_own_words() {
    let source = "{{ raise_exception('roles must alternate') }}";
    let error = render(source, json!([])).unwrap_err();
    assert!(matches!(error, ChatTemplateError::Refused(ref m) if m == "roles must alternate"));
}

#[test]
fn templates_that_loop_grow_or_nest_without_end_stop_at_a_limit() {
    let looping = "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(10000) %}{% endfor %}{% endfor %}{% endfor %}";
    assert!(matches!(render(looping, json!([])), Err(ChatTemplateError::Exceeded(_))));
    let growing = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}";
    assert!(matches!(render(growing, json!([])), Err(ChatTemplateError::Exceeded(_))));
    let writing = "{% set s = 'x' * 1000000 %}{% for a in range(10000) %}{{ s }}{% endfor %}";
    assert!(matches!(render(writing, json!([])), Err(ChatTemplateError::Exceeded(_))));
    let listing = "{{ [0] * 100000000 }}";
    assert!(matches!(render(listing, json!([])), Err(ChatTemplateError::Exceeded(_))));
    let nesting = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    assert!(render(nesting, json!([])).is_err());
}

#[test]
fn a_template_that_does_not_compile_is_named_at_load() {
    let error = ChatTemplate::compile("{% for %}", special()).unwrap_err();
    assert!(matches!(error, ChatTemplateError::Invalid(_)));
}

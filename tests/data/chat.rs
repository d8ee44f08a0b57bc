//! Chat templates against transformers (`chat_templates.json`).

use qlora_nb::prelude::*;
use qlora_nb_tests::*;
use serde_json::Value as Json;

fn poet() -> Tokenizer {
    AutoTokenizer::from_pretrained(root().join("notebooks/models/poet-bloom-zh")).unwrap()
}

#[test]
fn templates_render_as_in_transformers() {
    let cases: Vec<Json> = serde_json::from_slice(&std::fs::read(fixture("chat_templates.json")).unwrap()).unwrap();
    let poet = poet();
    for case in &cases {
        let what = format!("{}, {}", case["name"], case["case"]);
        let tokenizer = poet.with_chat_template(case["template"].as_str().unwrap()).expect(&what);
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        if let Some(words) = case["refused"].as_str() {
            let error = tokenizer.apply_chat_template(&messages, false).expect_err(&what).to_string();
            assert!(error.starts_with("messages = ") && error.contains(words), "{what}: {error}");
            continue;
        }
        for (key, add_generation_prompt) in [("rendered", false), ("prompt", true)] {
            let text = tokenizer.apply_chat_template(&messages, add_generation_prompt).expect(&what);
            assert_eq!(text, case[key].as_str().unwrap(), "{what}");
        }
    }
    assert_eq!(cases.len(), 24);
}

#[test]
fn a_template_is_found_where_transformers_looks() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::copy(root().join("notebooks/models/poet-bloom-zh/tokenizer.json"), path("tokenizer.json")).unwrap();
    let template = || AutoTokenizer::from_pretrained(folder.path()).unwrap().chat_template().map(String::from);
    assert_eq!(template(), None);
    std::fs::write(path("tokenizer_config.json"), r#"{"chat_template": "one"}"#).unwrap();
    assert_eq!(template().as_deref(), Some("one"));
    let several = r#"{"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]}"#;
    std::fs::write(path("tokenizer_config.json"), several).unwrap();
    assert_eq!(template().as_deref(), Some("b"));
    std::fs::write(path("chat_template.jinja"), "file").unwrap();
    assert_eq!(template().as_deref(), Some("file"));
}

/// `encode` adds the special tokens of the tokenizer's own; `encode_chat` adds none to those that
/// the template writes.
#[test]
fn a_conversation_does_not_begin_twice() {
    let folder = tempfile::tempdir().unwrap();
    let read = std::fs::read(root().join("notebooks/models/poet-bloom-zh/tokenizer.json")).unwrap();
    let mut json: Json = serde_json::from_slice(&read).unwrap();
    let bos = poet().bos_token_id().unwrap();
    json["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}}});
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>", "eos_token": "</s>"}"#)
        .unwrap();
    let template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}";
    let tokenizer = AutoTokenizer::from_pretrained(folder.path()).unwrap().with_chat_template(template).unwrap();
    let decode = |encoding: Encoding| tokenizer.decode(&encoding.input_ids, false).unwrap();
    assert_eq!(decode(tokenizer.encode("春").unwrap()), "<s>春");
    assert_eq!(decode(tokenizer.encode_without_special_tokens("春").unwrap()), "春");
    let chat = [Message::user("春"), Message::assistant("风")];
    assert_eq!(decode(tokenizer.encode_chat(&chat, false).unwrap()), "<s>春</s><s>风</s>");
}

/// A template may come from anywhere: it ends, and takes little.
#[test]
fn a_template_that_asks_for_too_much_is_stopped() {
    let (tokenizer, message) = (poet(), [Message::user("hi")]);
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}";
    for (template, named) in [
        (format!("{loops}{{% endfor %}}{{% endfor %}}"), "does not end"),
        ("{{ messages | tojson(indent=1000000000000000) }}".into(), "does not end"),
        ("{{ messages | tojson(indent=10000000000000000000) }}".into(), "does not end"),
        ("{{ messages | tojson(indent=6000000) }}".into(), "fuel"),
        ("{{ 'a\nb' | indent(1000000000000000) }}".into(), "does not end"),
        ("{{ 'x' * 1000000000000 }}".into(), "does not end"),
        ("{{ messages[0].content.replace('', 'x' * 9999999).replace('x', 'y' * 9999999) }}".into(), "does not end"),
        (format!("{}{{{{ v | tojson(indent=1) }}}}", "{% set v=[v] %}".repeat(90_000)), "fuel"),
    ] {
        let tokenizer = tokenizer.with_chat_template(&template).unwrap();
        let begin = std::time::Instant::now();
        let error = tokenizer.apply_chat_template(&message, true).unwrap_err().to_string();
        assert!(error.contains(named) && begin.elapsed().as_secs() < 20, "{template}: {error}");
    }
    // Values inside values end no process, whatever looks at them.
    for make in ["[v]", "{'a': v}"] {
        let deep = format!("{}{{% set w=[v] %}}", format!("{{% set v={make} %}}").repeat(240_000));
        for look in [
            "{{ v | tojson(indent=0) }}",
            "{{ v == w }}",
            "{{ v | string }}",
            "{{ [v, w] | sort }}",
            "{{ v | pprint }}",
        ] {
            let tokenizer = tokenizer.with_chat_template(&format!("{deep}{look}")).unwrap();
            let _ = tokenizer.apply_chat_template(&message, true);
        }
    }
    // A conversation of a megabyte is none of it.
    let turns = vec![Message::user(&"word ".repeat(500)); 400];
    let each = "{% for m in messages %}{{ m.role | trim }}: {{ m.content | trim }}\n{% endfor %}{{ messages | tojson(indent=4) }}";
    assert!(tokenizer.with_chat_template(each).unwrap().apply_chat_template(&turns, true).unwrap().len() > 2_000_000);
}

#[test]
fn what_is_wrong_with_a_template_is_said() {
    let tokenizer = poet();
    let message = [Message::user("hi")];
    let error = tokenizer.apply_chat_template(&message, true).unwrap_err().to_string();
    assert!(error.contains("with_chat_template"), "{error}");
    let error = tokenizer.with_chat_template("a\n{% for %}").unwrap_err().to_string();
    assert!(error.contains("line 2") && error.contains("what to do"), "{error}");
    let nested = tokenizer.with_chat_template("\n{{ messages[0].content.no_such_method() }}").unwrap();
    let error = nested.apply_chat_template(&message, true).unwrap_err().to_string();
    assert!(error.contains("line 2") && error.contains("no_such_method"), "{error}");
    assert!(
        tokenizer
            .with_chat_template("{{ messages | no_such_filter }}")
            .unwrap()
            .apply_chat_template(&message, true)
            .is_err()
    );
}

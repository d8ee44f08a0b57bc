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

/// `encode_chat` adds no special token to those that the template writes; `encode` may.
#[test]
fn a_conversation_is_tokenized_once() {
    let tokenizer = poet().with_chat_template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}").unwrap();
    let ids = tokenizer.encode_chat(&[Message::user("春"), Message::assistant("风")], false).unwrap().input_ids;
    let (bos, eos) = (tokenizer.bos_token_id().unwrap(), tokenizer.eos_token_id().unwrap());
    assert_eq!(ids.iter().filter(|id| **id == bos).count(), 2);
    assert_eq!((ids[0], ids[ids.len() - 1]), (bos, eos));
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<s>春</s><s>风</s>");
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

//! `map`, on the walkthrough's own function and data, against transformers and datasets.

use qlora_nb::prelude::*;
use qlora_nb_tests::*;

fn process(tok: &Tokenizer, ex: &Example, max_length: usize) -> Result<Features> {
    let question = format!("Human: {}\n{}", ex.text("instruction")?, ex.text("input")?);
    let prompt = tok.encode(&format!("{}\n\nAssistant: ", question.trim()))?;
    let answer = tok.encode(&format!("{}{}", ex.text("output")?, tok.eos_token()))?;
    Ok(Features::supervised(&prompt, &answer, max_length))
}

fn poems() -> Dataset {
    Dataset::load_from_disk(root().join("notebooks/data/poems_zh")).unwrap()
}

fn poet() -> Tokenizer {
    AutoTokenizer::from_pretrained(root().join("notebooks/models/poet-bloom-zh")).unwrap()
}

#[test]
fn the_walkthroughs_data_is_tokenized_and_collated_as_in_python() {
    let prints: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture("hf_prints.json")).unwrap()).unwrap();
    let print = |name: &str| prints[name].as_str().unwrap();
    let (ds, tokenizer) = (poems(), poet());
    assert_eq!(ds.to_string(), print("dataset"));
    assert_eq!(ds.slice(0..1).to_string(), print("dataset_slice"));
    let tokenized = ds.map(|ex| process(&tokenizer, ex, 256)).unwrap();
    assert_eq!(tokenized.to_string(), print("tokenized_dataset"));
    let theirs: Vec<Value> = prints["tokenized_rows"].as_array().unwrap().iter().cloned().map(Value::from).collect();
    let rows = tokenized.head(theirs.len());
    assert_eq!(rows.iter().map(|ex| Value::Struct(ex.fields())).collect::<Vec<_>>(), theirs);

    let features: Vec<Features> = rows.iter().map(|ex| ex.features().unwrap()).collect();
    let batch = DataCollatorForSeq2Seq::new(&tokenizer).collate(&features.iter().collect::<Vec<_>>()).unwrap();
    for (name, tensor) in
        [("input_ids", &batch.input_ids), ("attention_mask", &batch.attention_mask), ("labels", &batch.labels)]
    {
        let theirs: Vec<Vec<i64>> = serde_json::from_value(prints["collated"][name].clone()).unwrap();
        assert_eq!(tensor.to_dtype(DType::I64).unwrap().to_vec2::<i64>().unwrap(), theirs, "{name}");
    }
}

#[test]
fn cut_rows_are_counted_wherever_they_go() {
    let (ds, tokenizer) = (poems().head(20), poet());
    let whole = ds.map(|ex| process(&tokenizer, ex, 1024)).unwrap();
    assert_eq!(whole.truncated_rows(), 0);
    let lengths: Vec<usize> = whole.iter().map(|ex| ex.features().unwrap().len()).collect();
    let limit = (lengths.iter().min().unwrap() + lengths.iter().max().unwrap()) / 2;
    let cut = ds.map(|ex| process(&tokenizer, ex, limit)).unwrap();
    let too_long: Vec<usize> = (0..20).filter(|&i| lengths[i] > limit).collect();
    assert!(!too_long.is_empty() && too_long.len() < 20, "{lengths:?}");
    assert_eq!(cut.truncated_rows(), too_long.len());
    assert_eq!(cut.shuffle(1).truncated_rows(), too_long.len());
    assert_eq!(cut.select(&too_long[..1]).unwrap().truncated_rows(), 1);
    assert!(cut.iter().all(|ex| ex.features().unwrap().len() <= limit));
}

#[test]
fn a_failing_function_names_the_row_and_costs_nothing() {
    let ds = poems().head(5);
    let error = ds.map(|ex| ex.text("inptu").map(|_| Features::default())).unwrap_err();
    assert!(
        matches!(&error, Error::Row { row: 0, source } if matches!(**source, Error::MissingColumn { .. })),
        "{error}"
    );
    let mut seen = 0;
    let error = ds.filter(|ex| {
        seen += 1;
        if seen == 4 { ex.int("output").map(|_| true) } else { Ok(true) }
    });
    assert!(matches!(error.unwrap_err(), Error::Row { row: 3, .. }));
    let error = ds.shuffle(3).map_examples(|ex| Ok(ex.with("n", ex.int("output")?))).unwrap_err();
    assert!(matches!(error, Error::Row { row: 0, .. }), "{error}");
    assert_eq!(ds.len(), 5);
    assert!(ds.get(4).unwrap().text("output").is_ok());
}

#[test]
fn what_cannot_be_trained_on_is_refused_at_once() {
    let ds = Dataset::from_columns([("n", 0i64..3)]).unwrap();
    let row = |ids: usize, mask: usize, labels: usize| Features {
        input_ids: vec![5; ids],
        attention_mask: vec![1; mask],
        labels: vec![5; labels],
    };
    let map = |bad: &Features| ds.map(|ex| Ok(if ex.int("n")? == 2 { bad.clone() } else { row(2, 2, 2) })).unwrap_err();
    assert!(matches!(map(&row(0, 0, 0)), Error::EmptySequence { row: 2 }));
    let error = map(&row(2, 2, 3));
    assert!(matches!(error, Error::UnequalLengths { row: 2, field: "labels", expected: 2, got: 3 }), "{error}");
    let error = map(&Features { input_ids: vec![u32::MAX, 1], ..row(2, 2, 2) });
    assert!(matches!(error, Error::TokenId { row: 2, position: 0, .. }), "{error}");
    assert!(map(&Features { attention_mask: vec![1, 7], ..row(2, 2, 2) }).to_string().contains("attention_mask"));
}

#[test]
fn an_interrupt_stops_between_two_rows() {
    let ds = Dataset::from_columns([("n", 0i64..1000)]).unwrap();
    let mut seen = 0;
    let error = ds.filter(|_| {
        seen += 1;
        if seen == 10 {
            qlora_nb::interrupt::request();
        }
        Ok(true)
    });
    assert!(matches!(error.unwrap_err(), Error::Interrupted { .. }));
    assert_eq!(seen, 10);
    assert_eq!(ds.filter(|_| Ok(true)).unwrap().len(), 1000, "the next call is not stopped");
}

#[test]
fn text_is_made_from_text() {
    let ds = poems().head(3);
    let joined = ds
        .map_examples(|ex| {
            let text = format!("{}\n{}", ex.text("instruction")?, ex.text("output")?);
            Ok(ex.with("text", text).without("input").with("length", ex.text("output")?.chars().count()))
        })
        .unwrap();
    assert_eq!(joined.column_names(), ["instruction", "output", "text", "length"]);
    assert!(joined.get(0).unwrap().text("text").unwrap().starts_with(ds.get(0).unwrap().text("instruction").unwrap()));
    assert!(joined.get(2).unwrap().int("length").unwrap() > 10);
    let uneven = ds.map_examples(|ex| Ok(if ex.row() == Some(1) { ex.without("input") } else { ex.clone() }));
    let error = uneven.unwrap_err();
    assert!(matches!(error, Error::Row { row: 1, .. }) && error.to_string().contains("\"input\""), "{error}");
}

#[test]
fn tokens_are_shown_with_their_labels() {
    let tokenizer = poet();
    let prompt = tokenizer.encode("写诗<>").unwrap();
    let answer = tokenizer.encode("龘日</s>").unwrap();
    let features = Features::supervised(&prompt, &answer, 100);
    let shown = features.show(&tokenizer);
    let text = shown.to_string();
    let tokens = format!("\n{} tokens, {} of them learned [in brackets]", features.len(), answer.len());
    assert_eq!(text, format!("写|诗|<|>[龘][日][</s>]{tokens}"), "a character of several tokens is one piece");
    let html = shown.to_html();
    assert!(html.contains("&lt;/s&gt;") && html.contains("learned"), "{html}");
}

//! Generation with a model that is a table, so that every token can be worked out by hand.

use candle_core::Tensor;
use serde_json::{Value, json};

use super::*;
use crate::backend::kv_cache::KvCache;

const VOCAB: usize = 48;
const EOS: u32 = 2;

/// The logits depend on the last token and on how many there are, the latter as the cache counts
/// them: a row that is mixed up with another gives other text.
struct Table {
    defaults: Value,
    fault: f32,
}

impl Table {
    fn new() -> Self {
        Self { defaults: json!({"eos_token_id": EOS}), fault: 0.0 }
    }

    fn logits_after(&self, last: u32, length: usize) -> Vec<f32> {
        let mut rng = Rng::new(last.into(), length as u64);
        let mut row: Vec<f32> = (0..VOCAB).map(|_| 6.0 * rng.uniform() as f32).collect();
        row[5] += self.fault;
        row
    }
}

impl CausalLM for Table {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn generation_defaults(&self) -> &Value {
        &self.defaults
    }

    fn new_cache(&self, sequences: usize) -> Result<KvCache> {
        KvCache::new(1, sequences, 1, candle_core::DType::F32, &Device::Cpu)
    }

    fn next_token_logits(&self, new_tokens: &[&[u32]], cache: &mut KvCache) -> Result<Tensor> {
        let counts: Vec<usize> = new_tokens.iter().map(|new| new.len()).collect();
        cache.reserve(&counts)?;
        cache.advance(&counts);
        assert_eq!(cache.lengths().len(), new_tokens.len());
        let rows = new_tokens.iter().zip(cache.lengths());
        let rows: Vec<Vec<f32>> = rows.map(|(new, &length)| self.logits_after(*new.last().unwrap(), length)).collect();
        Ok(Tensor::new(rows, &Device::Cpu)?)
    }
}

fn run(model: &Table, prompts: &[Vec<u32>], config: &GenerationConfig) -> Result<Vec<Generated>> {
    let mut seen: Vec<Vec<u32>> = Vec::new();
    let out = generate(model, prompts, config, &mut |i, id| {
        seen.resize(seen.len().max(i + 1), Vec::new());
        seen[i].push(id);
    })?;
    assert_eq!(seen, out.iter().map(|g| g.ids.clone()).collect::<Vec<_>>(), "on_token sees what is returned");
    Ok(out)
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1, 7, 9], vec![11], vec![30, 31, 32, 33, 34], vec![11], vec![47, 0]]
}

#[test]
fn greedy_follows_the_highest_logit_to_the_end_token_or_the_limit() {
    let model = Table::new();
    let config = GenerationConfig { max_new_tokens: Some(60), ..Default::default() };
    let out = run(&model, &prompts(), &config).unwrap();
    for (prompt, generated) in prompts().into_iter().zip(&out) {
        let mut tokens = prompt.clone();
        for &id in &generated.ids {
            assert_ne!(*tokens.last().unwrap(), EOS, "nothing follows the end");
            assert_eq!(sampling::greedy(&model.logits_after(*tokens.last().unwrap(), tokens.len())), id);
            tokens.push(id);
        }
        let ended = generated.ids.last() == Some(&EOS);
        assert_eq!(generated.finish_reason, if ended { FinishReason::Eos } else { FinishReason::Length });
        assert!(ended || generated.ids.len() == 60);
    }
    assert!(out.iter().any(|g| g.finish_reason == FinishReason::Eos), "the batch must shrink in this test: {out:?}");
}

#[test]
fn a_prompt_becomes_the_same_text_alone_and_in_a_batch() {
    let model = Table::new();
    let config = GenerationConfig { max_new_tokens: Some(40), do_sample: true, seed: Some(3), ..Default::default() };
    let batch = run(&model, &prompts(), &config).unwrap();
    for (prompt, expected) in prompts().into_iter().zip(&batch) {
        assert_eq!(&run(&model, &[prompt], &config).unwrap()[0], expected);
    }
    let other_seed = run(&model, &prompts(), &GenerationConfig { seed: Some(4), ..config.clone() }).unwrap();
    assert_ne!(batch, other_seed);
    let chance = GenerationConfig { seed: None, ..config };
    assert_ne!(run(&model, &prompts(), &chance).unwrap(), run(&model, &prompts(), &chance).unwrap());
}

#[test]
fn several_sequences_of_a_prompt_differ_and_the_first_is_that_of_one() {
    let model = Table::new();
    let one = GenerationConfig { max_new_tokens: Some(30), do_sample: true, seed: Some(9), ..Default::default() };
    let three = GenerationConfig { num_return_sequences: Some(3), ..one.clone() };
    let out = run(&model, &prompts(), &three).unwrap();
    let single = run(&model, &prompts(), &one).unwrap();
    assert_eq!(out.len(), 15);
    for (copies, single) in out.chunks(3).zip(&single) {
        assert_eq!(&copies[0], single);
        assert!(copies[0] != copies[1] && copies[1] != copies[2] && copies[0] != copies[2]);
    }
    let greedy = GenerationConfig { do_sample: false, seed: None, ..three };
    assert!(run(&model, &prompts(), &greedy).unwrap_err().to_string().contains("num_return_sequences"));
}

#[test]
fn limits_count_as_in_transformers() {
    let mut model = Table::new();
    let lengths = |model: &Table, config: GenerationConfig| -> Result<Vec<usize>> {
        let config = GenerationConfig { eos_token_id: Some(vec![]), ..config };
        Ok(run(model, &prompts(), &config)?.iter().map(|g| g.ids.len()).collect())
    };
    let default = GenerationConfig::default;
    assert_eq!(lengths(&model, default()).unwrap(), [20; 5], "20 new tokens when nothing is said");
    let total = GenerationConfig { max_length: Some(8), ..default() };
    assert_eq!(lengths(&model, total.clone()).unwrap(), [5, 7, 3, 7, 6], "max_length counts the prompt");
    let both = GenerationConfig { max_new_tokens: Some(4), ..total.clone() };
    assert_eq!(lengths(&model, both).unwrap(), [4; 5], "max_new_tokens wins");
    model.defaults["max_new_tokens"] = 6.into();
    assert_eq!(lengths(&model, default()).unwrap(), [6; 5], "the checkpoint's limit");
    assert_eq!(lengths(&model, total).unwrap(), [5, 7, 3, 7, 6], "the caller's max_length overrules it");
    model.defaults = json!({"max_position_embeddings": 1000});
    assert_eq!(lengths(&model, default()).unwrap(), [20; 5], "many positions change nothing");
    model.defaults = json!({"max_position_embeddings": 12});
    assert_eq!(lengths(&model, default()).unwrap(), [9, 11, 7, 11, 10], "the default stays within the positions");

    for max_length in [4, 5] {
        let error = lengths(&model, GenerationConfig { max_length: Some(max_length), ..default() }).unwrap_err();
        assert!(matches!(&error, Error::InvalidArgument { name, .. } if name == "max_length"), "{error}");
        assert!(error.to_string().contains("5 tokens of prompt 2"), "{error}");
    }
}

#[test]
fn min_new_tokens_holds_the_end_back() {
    let model = Table::new();
    let config = GenerationConfig { max_new_tokens: Some(60), ..Default::default() };
    let free = run(&model, &prompts(), &config).unwrap();
    let mut ended = 0;
    for (prompt, free) in prompts().into_iter().zip(free).filter(|(_, g)| g.finish_reason == FinishReason::Eos) {
        // An end that comes as token n is held back by a minimum of n, and by no smaller one.
        let n = free.ids.len();
        let with_minimum = |minimum| {
            let config = GenerationConfig { min_new_tokens: Some(minimum), ..config.clone() };
            run(&model, std::slice::from_ref(&prompt), &config).unwrap().remove(0)
        };
        assert_eq!(with_minimum(n - 1), free);
        let held = with_minimum(n);
        assert_eq!(held.ids[..n - 1], free.ids[..n - 1]);
        assert!(held.ids.len() > n && held.ids[n - 1] != EOS, "{held:?}");
        ended += 1;
    }
    assert!(ended > 0, "the test needs an end that comes by itself");
}

#[test]
fn bad_arguments_are_typed_errors() {
    let model = Table::new();
    let sampling = GenerationConfig { do_sample: true, ..Default::default() };
    for (field, config) in [
        ("temperature", GenerationConfig { temperature: Some(0.0), ..sampling.clone() }),
        ("temperature", GenerationConfig { temperature: Some(f64::NAN), ..sampling.clone() }),
        ("top_p", GenerationConfig { top_p: Some(0.0), ..sampling.clone() }),
        ("top_p", GenerationConfig { top_p: Some(1.1), ..sampling.clone() }),
        ("repetition_penalty", GenerationConfig { repetition_penalty: Some(0.0), ..Default::default() }),
        ("max_new_tokens", GenerationConfig { max_new_tokens: Some(0), ..Default::default() }),
        ("num_return_sequences", GenerationConfig { num_return_sequences: Some(0), ..sampling.clone() }),
    ] {
        let error = run(&model, &prompts(), &config).unwrap_err();
        assert!(matches!(&error, Error::InvalidArgument { name, .. } if name == field), "{error}");
    }
    let zero = GenerationConfig { temperature: Some(0.0), ..Default::default() };
    run(&model, &prompts(), &zero).expect("without sampling the temperature is not looked at");
    assert!(run(&model, &[vec![1], vec![]], &sampling).unwrap_err().to_string().contains("prompt 1 = 0 tokens"));
    let error = run(&model, &[vec![1], vec![3, 48]], &sampling).unwrap_err();
    assert!(matches!(error, Error::TokenId { row: 1, position: 1, id: 48, vocab_size: 48 }), "{error}");
    assert_eq!(run(&model, &[], &sampling).unwrap(), []);
}

#[test]
fn logits_that_are_no_numbers_stop_with_their_place() {
    for fault in [f32::NAN, f32::INFINITY] {
        let error = run(&Table { fault, ..Table::new() }, &prompts(), &GenerationConfig::default()).unwrap_err();
        assert!(matches!(error, Error::LogitsNotFinite { prompt: 0, position: 3, .. }), "{error}");
    }
    let masked = Table { fault: f32::NEG_INFINITY, ..Table::new() };
    let out = run(&masked, &prompts(), &GenerationConfig::default()).unwrap();
    assert!(out.iter().all(|g| !g.ids.contains(&5)), "-inf is a token that never comes");
}

#[test]
fn an_interrupt_returns_what_there_is() {
    let config = GenerationConfig { max_new_tokens: Some(1000), eos_token_id: Some(vec![]), ..Default::default() };
    let mut count = 0;
    let out = generate(&Table::new(), &prompts(), &config, &mut |_, _| {
        count += 1;
        if count == 12 {
            interrupt::request();
        }
    })
    .unwrap();
    assert!(out.iter().all(|g| g.ids.len() == 3 && g.finish_reason == FinishReason::Interrupted), "{out:?}");
    assert_eq!(generate(&Table::new(), &prompts(), &config, &mut |_, _| {}).unwrap()[0].ids.len(), 1000);
}

#[test]
fn open_settings_come_from_the_checkpoint() {
    let defaults = json!({
        "do_sample": true, "temperature": 0.8, "top_p": 0.9, "top_k": 7, "eos_token_id": [2, 3],
        "repetition_penalty": 1.5, "max_new_tokens": 120, "num_beams": 4, "bad_words_ids": null, "min_p": 0.0,
    });
    let config = GenerationConfig { do_sample: true, top_p: Some(0.5), ..Default::default() };
    let settings = Settings::new(&config, &defaults).unwrap();
    assert_eq!(settings.sampling, Some((0.8, 7, 0.5)));
    assert_eq!((settings.repetition_penalty, settings.eos_token_id), (1.5, vec![2, 3]));
    assert!(Settings::new(&GenerationConfig::default(), &defaults).unwrap().sampling.is_none());
    assert!(GenerationConfig::from_checkpoint(&defaults).unwrap().do_sample);
    assert_eq!(Settings::new(&config, &json!({})).unwrap().sampling, Some((1.0, 50, 0.5)));

    let notices = config.notices(&defaults);
    assert!(notices.len() == 1 && notices[0].contains("num_beams = 4"), "{notices:?}");
    let unused = GenerationConfig { temperature: Some(0.5), seed: Some(1), ..Default::default() };
    assert_eq!(unused.notices(&json!({})).len(), 2);
    let both = GenerationConfig { max_length: Some(5), max_new_tokens: Some(3), ..Default::default() };
    assert!(both.notices(&json!({}))[0].contains("max_new_tokens wins"));

    for broken in [json!({"temperature": "hot"}), json!({"top_k": -1}), json!({"eos_token_id": "</s>"})] {
        let error = Settings::new(&config, &broken).unwrap_err();
        assert!(error.to_string().contains("in generation_config.json"), "{error}");
    }
}

#[test]
fn what_will_be_drawn_is_known_one_token_before() {
    let sampled = GenerationConfig {
        do_sample: true,
        seed: Some(3),
        min_new_tokens: Some(4),
        max_new_tokens: Some(9),
        ..Default::default()
    };
    let greedy = GenerationConfig { do_sample: false, ..sampled.clone() };
    for config in [sampled, greedy] {
        let settings = Settings::new(&config, &json!({"eos_token_id": EOS})).unwrap();
        let mut sequences = start_sequences(&prompts()[..2], &settings, VOCAB).unwrap();
        let chooser = Chooser { settings, logits: Vec::new(), scratch: Scratch::default() };
        let active = [(0, 0), (1, 1)];
        let mut expected = None;
        for step in 0..9 {
            let draws = chooser.draws(&active, &mut sequences);
            assert_eq!(expected.unwrap_or_else(|| draws.clone()), draws, "{config:?}, token {step}");
            // The end is forbidden before the fourth token: until then the host chooses.
            assert_eq!(draws.len(), if step < 4 { 0 } else { 2 });
            let after = chooser.draws_after(&active, &sequences);
            assert_eq!(after, chooser.draws_after(&active, &sequences), "looking changes nothing");
            sequences.iter_mut().for_each(|sequence| sequence.push(7, &chooser.settings));
            expected = Some(after);
        }
        assert_eq!(expected, Some(Vec::new()), "nothing follows the last token");
    }
}

mod reference {
    //! The processors against those of transformers; scripts/fixtures/generation.py made the numbers.

    use super::*;
    use crate::generation::processors::*;

    fn row(json: &Value) -> Vec<f32> {
        let number = |x: &Value| x.as_f64().map_or(f32::NEG_INFINITY, |x| x as f32);
        json.as_array().unwrap().iter().map(number).collect()
    }

    /// Equal token by token; where a row has equal logits, which of them top_p keeps is up to
    /// the reference's sort, so only the values that stay are compared.
    fn assert_close(mut got: Vec<f32>, mut expected: Vec<f32>, row: &Value, what: &str) {
        if row == "ties" || row == "equal" {
            got.sort_by(f32::total_cmp);
            expected.sort_by(f32::total_cmp);
        }
        for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
            assert!(g == e || (g - e).abs() <= 1e-6 * e.abs(), "{what}, token {i}: expected {e}, got {g}");
        }
    }

    fn fixture() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/generation/processors.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn sequence(fixture: &Value, settings: &Settings) -> Sequence {
        let prompt: Vec<u32> = serde_json::from_value(fixture["prompt"].clone()).unwrap();
        start_sequences(&[prompt], settings, VOCAB).unwrap().remove(0)
    }

    #[test]
    fn each_processor() {
        let fixture = fixture();
        let ids: Vec<u32> = serde_json::from_value(fixture["prompt"].clone()).unwrap();
        let eos: Vec<u32> = serde_json::from_value(fixture["eos_token_id"].clone()).unwrap();
        let mut seen = SeenTokens::new(VOCAB);
        ids.iter().for_each(|&id| seen.insert(id));
        let mut scratch = Scratch::default();
        for case in fixture["one_by_one"].as_array().unwrap() {
            let mut logits = row(&fixture["rows"][case["row"].as_str().unwrap()]);
            let argument = case["argument"].as_f64().unwrap();
            let what = format!("{} {argument} of {}", case["processor"], case["row"]);
            match case["processor"].as_str().unwrap() {
                "repetition_penalty" => repetition_penalty(&mut logits, &seen, argument),
                "min_new_tokens" => forbid(&mut logits, &eos),
                "temperature" => temperature(&mut logits, argument),
                "top_k" => top_k(&mut logits, argument as usize, &mut scratch),
                "top_p" => top_p(&mut logits, argument, &mut scratch),
                other => panic!("no processor {other}"),
            }
            assert_close(logits, row(&case["expected"]), &case["row"], &what);
        }
    }

    #[test]
    fn all_in_their_order() {
        let fixture = fixture();
        for case in fixture["lists"].as_array().unwrap() {
            let mut config = case["config"].clone();
            config["eos_token_id"] = fixture["eos_token_id"].clone();
            let config = GenerationConfig::from_checkpoint(&config).unwrap();
            let settings = Settings::new(&config, &json!({})).unwrap();
            let sequence = sequence(&fixture, &settings);
            let logits = row(&fixture["rows"][case["row"].as_str().unwrap()]);
            let mut chooser = Chooser { settings, logits, scratch: Scratch::default() };
            chooser.process(&sequence);
            assert_close(chooser.logits, row(&case["expected"]), &case["row"], &case["config"].to_string());
        }
    }
}

mod oracle {
    //! The selections against a full sort, and the draw against its definition.

    use proptest::prelude::*;

    use super::{Rng, sampling};
    use crate::{backend::cpu::math::max_of, generation::processors::*};

    fn naive_top_k(logits: &[f32], k: usize) -> Vec<f32> {
        let mut sorted = logits.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let last = if k == 0 || k > sorted.len() { f32::NEG_INFINITY } else { sorted[k - 1] };
        logits.iter().map(|&x| if x < last { f32::NEG_INFINITY } else { x }).collect()
    }

    fn naive_top_p(logits: &[f32], p: f64) -> Vec<f32> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
        let max = max_of(logits);
        let weight = |i: usize| f64::from((logits[i] - max).exp());
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let (mut out, mut sum) = (logits.to_vec(), 0.0);
        for &i in &order[..order.len() - 1] {
            sum += weight(i) / total;
            if sum <= 1.0 - p {
                out[i] = f32::NEG_INFINITY;
            }
        }
        out
    }

    /// Rows of up to `n` logits: some smooth, some with many equal values, some partly masked.
    fn rows(n: usize) -> impl Strategy<Value = Vec<f32>> {
        let smooth = prop::collection::vec(-20f32..20.0, 1..n);
        let ties = prop::collection::vec((-3i32..4).prop_map(|x| x as f32), 1..n);
        let masked = prop::collection::vec(prop_oneof![Just(f32::NEG_INFINITY), -5f32..5.0], 1..n)
            .prop_filter("a token must be possible", |row| row.iter().any(|x| x.is_finite()));
        prop_oneof![smooth, ties, masked]
    }

    proptest! {
        #[test]
        fn top_k_keeps_what_a_full_sort_keeps(row in rows(3000), k in 0usize..400) {
            let mut fast = row.clone();
            top_k(&mut fast, k, &mut Scratch::default());
            prop_assert_eq!(fast, naive_top_k(&row, k));
        }

        #[test]
        fn top_p_keeps_what_a_full_sort_keeps(row in rows(3000), p in 0.001f64..1.0) {
            let mut fast = row.clone();
            top_p(&mut fast, p, &mut Scratch::default());
            let naive = naive_top_p(&row, p);
            // The two sum in other orders: at most the token at the very edge may differ.
            let differ: Vec<usize> = (0..row.len()).filter(|&i| fast[i] != naive[i]).collect();
            if let [i] = differ[..] {
                let max = max_of(&row);
                let total: f64 = row.iter().map(|x| f64::from((x - max).exp())).sum();
                let below = |j: &usize| row[*j] < row[i] || row[*j] == row[i] && *j >= i;
                let sum: f64 = (0..row.len()).filter(below).map(|j| f64::from((row[j] - max).exp())).sum();
                prop_assert!((sum / total - (1.0 - p)).abs() < 1e-6, "token {} differs", i);
            } else {
                prop_assert!(differ.is_empty(), "{:?} differ", differ);
            }
        }

        #[test]
        fn the_draw_is_the_inverse_of_the_cumulative_softmax(row in rows(400), u in 0f64..1.0) {
            let id = sampling::sample(&row, u, &mut Scratch::default()) as usize;
            let max = max_of(&row);
            let weight = |x: &f32| f64::from((x - max).exp());
            let total: f64 = row.iter().map(weight).sum();
            let before: f64 = row[..id].iter().map(weight).sum::<f64>() / total;
            let after = before + weight(&row[id]) / total;
            prop_assert!(row[id].is_finite() && before - 1e-9 <= u && u <= after + 1e-9);
        }
    }

    #[test]
    fn tokens_come_as_often_as_their_probability_says() {
        let row: Vec<f32> = [0.1f32, 0.2, 0.0, 0.3, 0.4].iter().map(|p| p.ln()).collect();
        let (mut rng, mut scratch, mut counts) = (Rng::new(1, 0), Scratch::default(), [0u32; 5]);
        let n = 100_000;
        for _ in 0..n {
            counts[sampling::sample(&row, rng.uniform(), &mut scratch) as usize] += 1;
        }
        for (count, p) in counts.into_iter().zip([0.1, 0.2, 0.0, 0.3, 0.4]) {
            let sigma = (f64::from(n) * p * (1.0 - p)).sqrt();
            assert!((f64::from(count) - f64::from(n) * p).abs() <= 5.0 * sigma, "{counts:?}");
        }
    }

    #[test]
    fn streams_of_near_seeds_do_not_overlap() {
        let draws = |seed, stream| {
            let mut rng = Rng::new(seed, stream);
            (0..100).map(|_| rng.uniform().to_bits()).collect::<Vec<_>>()
        };
        let all: Vec<u64> = (0..10).flat_map(|seed| (0..10).flat_map(move |stream| draws(seed, stream))).collect();
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        assert_eq!(draws(7, 1), draws(7, 1));
    }
}

//! Step 8: text from a prompt, with the trained model.

use std::{fmt, ops::Deref, sync::Arc};

pub use crate::generation::{FinishReason, Generated, GenerationConfig, generate};
use crate::{
    display::{
        self, Forms, Live, Pace,
        format::escape_html,
        shown_by_forms,
        theme::{FAINT, TEXT},
    },
    error::{Error, Result, ensure},
    models::causal_lm::CausalLM,
    names::debug_as_display,
    py_repr::{commas, py_str},
    tokenizer::Tokenizer,
};

/// A pipeline for a task, as `transformers.pipeline`. The one task is `"text-generation"`; the
/// model is a base model or one with an adapter, and is shared, not copied.
///
/// ```no_run
/// # use qlora_nb::{error::Result, model::{AutoModelForCausalLM, ModelOptions}, pipeline::GenerationConfig,
/// #     pipeline::pipeline, tokenizer::AutoTokenizer};
/// # fn main() -> Result<()> {
/// let tokenizer = AutoTokenizer::from_pretrained("models/poet-bloom-zh")?;
/// let model = AutoModelForCausalLM::from_pretrained("models/poet-bloom-zh", ModelOptions::default())?;
/// let pipe = pipeline("text-generation", &model, &tokenizer)?;
/// let config = GenerationConfig { max_length: Some(500), do_sample: true, ..Default::default() };
/// println!("{}", pipe.generate("Human: 写一首七言绝句\n\nAssistant: ", &config)?.text());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// `Unsupported` for another task.
pub fn pipeline<M>(task: &str, model: &M, tokenizer: &Tokenizer) -> Result<TextGenerationPipeline>
where
    M: CausalLM + Clone + 'static,
{
    if task != TASK {
        let remedy = format!("use pipeline({TASK:?}, &model, &tokenizer)");
        return Err(Error::unsupported("the pipeline task", task, [TASK], &remedy));
    }
    Ok(TextGenerationPipeline { model: Arc::new(model.clone()), tokenizer: tokenizer.clone(), live: true })
}

const TASK: &str = "text-generation";

/// A model and its tokenizer, ready to write. Cloning is cheap.
#[derive(Clone)]
pub struct TextGenerationPipeline {
    model: Arc<dyn CausalLM>,
    tokenizer: Tokenizer,
    live: bool,
}

impl TextGenerationPipeline {
    /// Continues one prompt. In a notebook or a terminal the text appears as it is made, unless
    /// [`streaming(false)`](Self::streaming) was asked for or there are several sequences. In a
    /// cell of our kernel the result, when it is shown, takes the place of that text.
    ///
    /// Settings that `config` leaves open come from the checkpoint, then from the tokenizer
    /// (`eos_token_id`), then from the defaults of the reference's pipeline: 256 new tokens and,
    /// when sampling, temperature 0.7.
    ///
    /// An interrupt ends the text early and returns what there is.
    ///
    /// # Errors
    /// Those of [`generate`].
    pub fn generate(&self, prompt: impl AsRef<str>, config: &GenerationConfig) -> Result<Generations> {
        self.generate_one(prompt.as_ref(), config)
    }

    fn generate_one(&self, prompt: &str, config: &GenerationConfig) -> Result<Generations> {
        let config = self.complete(config)?;
        if self.live && config.num_return_sequences.unwrap_or(1) == 1 && display::interactive() {
            let mut screen = LiveText::new(prompt);
            let text = self.run_streaming(prompt, &config, &mut |piece| screen.push(piece))?;
            return Ok(Generations { texts: vec![text], live: screen.finish() });
        }
        let mut out = self.run(&[prompt], &config, &mut |_| {})?;
        Ok(out.pop().unwrap_or_default())
    }

    /// Continues several prompts as one batch; the result is in their order.
    pub fn generate_batch(&self, prompts: &[impl AsRef<str>], config: &GenerationConfig) -> Result<Vec<Generations>> {
        let prompts: Vec<&str> = prompts.iter().map(AsRef::as_ref).collect();
        self.run(&prompts, &self.complete(config)?, &mut |_| {})
    }

    /// Continues one prompt and hands each piece of new text over as soon as its characters are
    /// whole; the pieces together are the `new_text` of the result.
    ///
    /// ```no_run
    /// # use qlora_nb::{error::Result, pipeline::{GenerationConfig, TextGenerationPipeline}};
    /// # fn f(pipe: TextGenerationPipeline) -> Result<()> {
    /// pipe.stream("春眠不觉晓", &GenerationConfig::default(), |piece| print!("{piece}"))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn stream(
        &self,
        prompt: impl AsRef<str>,
        config: &GenerationConfig,
        mut on_text: impl FnMut(&str),
    ) -> Result<GeneratedText> {
        self.run_streaming(prompt.as_ref(), &self.complete(config)?, &mut on_text)
    }

    /// The same pipeline; whether `generate` shows text as it is made.
    pub fn streaming(&self, on: bool) -> Self {
        Self { live: on, ..self.clone() }
    }

    /// What the checkpoint's `generation_config.json` asks for, `do_sample` included:
    /// `GenerationConfig { max_new_tokens: Some(64), ..pipe.generation_config()? }`.
    pub fn generation_config(&self) -> Result<GenerationConfig> {
        GenerationConfig::from_checkpoint(self.model.generation_defaults())
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn complete(&self, config: &GenerationConfig) -> Result<GenerationConfig> {
        for notice in config.notices(self.model.generation_defaults()) {
            display::notice_once(&notice);
        }
        let pipeline_defaults = GenerationConfig {
            max_new_tokens: Some(256),
            temperature: Some(0.7),
            eos_token_id: self.tokenizer.eos_token_id().map(|id| vec![id]),
            ..Default::default()
        };
        Ok(config.or(&self.generation_config()?).or(&pipeline_defaults))
    }

    fn run(
        &self,
        prompts: &[&str],
        config: &GenerationConfig,
        on_token: &mut dyn FnMut(u32),
    ) -> Result<Vec<Generations>> {
        let ids: Vec<Vec<u32>> =
            prompts.iter().map(|p| Ok(self.tokenizer.encode(p)?.input_ids)).collect::<Result<_>>()?;
        let mut out = generate(self.model.as_ref(), &ids, config, &mut |_, id| on_token(id))?.into_iter();
        let copies = config.num_return_sequences.unwrap_or(1).max(1);
        let of_prompt = |prompt: &&str| {
            let texts = out.by_ref().take(copies).map(|g| {
                let new_text = self.tokenizer.decode(&g.ids, true)?;
                Ok(GeneratedText { prompt: (*prompt).into(), new_text, ids: g.ids, finish_reason: g.finish_reason })
            });
            Ok(Generations { texts: texts.collect::<Result<_>>()?, live: None })
        };
        let generations = prompts.iter().map(of_prompt).collect::<Result<Vec<_>>>()?;
        if generations.iter().flat_map(|g| g.iter()).any(|t| t.finish_reason == FinishReason::Interrupted) {
            display::notice("generation was interrupted; this is the text so far");
        }
        Ok(generations)
    }

    fn run_streaming(
        &self,
        prompt: &str,
        config: &GenerationConfig,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<GeneratedText> {
        let n = config.num_return_sequences.unwrap_or(1);
        ensure(n == 1, "num_return_sequences", n, "1 when streaming", "leave it out, or use generate")?;
        let mut decoder = self.tokenizer.decode_stream();
        let mut fault = None;
        let mut give = |piece: Result<Option<String>>| match piece {
            Ok(piece) => piece.iter().for_each(|piece| on_text(piece)),
            Err(e) => fault = Some(e),
        };
        let out = self.run(&[prompt], config, &mut |id| give(decoder.push(id)))?;
        give(decoder.finish());
        let nothing = || GeneratedText {
            prompt: prompt.into(),
            new_text: String::new(),
            ids: Vec::new(),
            finish_reason: FinishReason::Interrupted,
        };
        fault.map_or_else(|| Ok(out.into_iter().flatten().next().unwrap_or_else(nothing)), Err)
    }
}

impl fmt::Debug for TextGenerationPipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TextGenerationPipeline(tokenizer={})", py_str(self.tokenizer.name_or_path()))
    }
}

const TEXTS_PER_SECOND: u32 = 20;

/// Text on its way to the screen: an output that grows where outputs can change, else stdout.
struct LiveText {
    prompt: String,
    new_text: String,
    live: Option<Live>,
    pace: Pace,
}

impl LiveText {
    fn new(prompt: &str) -> Self {
        let live = Live::is_possible().then(|| Live::show(&text_forms(prompt, ""), false));
        if live.is_none() {
            display::stream(prompt);
        }
        Self { prompt: prompt.into(), new_text: String::new(), live, pace: Pace::per_second(TEXTS_PER_SECOND) }
    }

    fn push(&mut self, piece: &str) {
        self.new_text.push_str(piece);
        match &self.live {
            Some(live) if self.pace.is_due() => live.update(&text_forms(&self.prompt, &self.new_text)),
            Some(_) => {}
            None => display::stream(piece),
        }
    }

    /// The output that has the whole text, where there is one.
    fn finish(self) -> Option<Live> {
        self.live.clone()
    }
}

/// However the text ends, what there is of it is shown whole, and its line is finished: a front
/// end that reads whole lines would wait for the rest.
impl Drop for LiveText {
    fn drop(&mut self) {
        match &self.live {
            Some(live) => live.update(&text_forms(&self.prompt, &self.new_text)),
            None if !format!("{}{}", self.prompt, self.new_text).ends_with('\n') => display::stream("\n"),
            None => {}
        }
    }
}

/// A text as a notebook shows it: the prompt faint, what was written after it in full.
fn text_html(prompt: &str, new_text: &str) -> String {
    let (prompt, new_text) = (escape_html(prompt), escape_html(new_text));
    format!(
        "<div style=\"{TEXT};white-space:pre-wrap;overflow-wrap:anywhere\">\
         <span style=\"{FAINT}\">{prompt}</span>{new_text}</div>"
    )
}

fn text_forms(prompt: &str, new_text: &str) -> Forms {
    vec![("text/html", text_html(prompt, new_text)), ("text/plain", format!("{prompt}{new_text}"))]
}

/// One text that a pipeline wrote.
#[derive(Clone, PartialEq, Eq)]
pub struct GeneratedText {
    prompt: String,
    new_text: String,
    ids: Vec<u32>,
    finish_reason: FinishReason,
}

impl GeneratedText {
    /// The prompt and what was written after it, without special tokens.
    pub fn text(&self) -> String {
        format!("{}{}", self.prompt, self.new_text)
    }

    /// What was written, without the prompt and special tokens.
    pub fn new_text(&self) -> &str {
        &self.new_text
    }

    /// The prompt.
    pub fn prompt(&self) -> &str {
        &self.prompt
    }

    /// The tokens that were written, the end token included.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Why the text ends where it ends.
    pub fn finish_reason(&self) -> FinishReason {
        self.finish_reason
    }

    /// What a notebook shows: the text with its line breaks, the prompt faint.
    pub fn forms(&self) -> Forms {
        vec![("text/html", text_html(&self.prompt, &self.new_text)), ("text/plain", self.to_string())]
    }
}

/// As the reference's pipeline prints one: `{'generated_text': '...'}`.
impl fmt::Display for GeneratedText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{'generated_text': {}}}", py_str(&self.text()))
    }
}

debug_as_display!(GeneratedText, Generations);

/// What one prompt became: one text, or `num_return_sequences` of them. It is a slice of
/// [`GeneratedText`], and has the first one's texts as its own.
#[derive(Clone, Default)]
pub struct Generations {
    texts: Vec<GeneratedText>,
    /// The output in which the text appeared as it was made.
    live: Option<Live>,
}

impl PartialEq for Generations {
    fn eq(&self, other: &Self) -> bool {
        self.texts == other.texts
    }
}

impl Eq for Generations {}

shown_by_forms!(GeneratedText);

impl Generations {
    /// The prompt and what was written after it, of the first sequence.
    pub fn text(&self) -> String {
        self.texts.first().map(GeneratedText::text).unwrap_or_default()
    }

    /// What was written, of the first sequence.
    pub fn new_text(&self) -> &str {
        self.texts.first().map(GeneratedText::new_text).unwrap_or_default()
    }

    /// What a notebook shows: each text with its line breaks, the prompts faint.
    pub fn forms(&self) -> Forms {
        let one = |text: &GeneratedText| text_html(text.prompt(), text.new_text());
        let html: Vec<String> = self.texts.iter().map(one).collect();
        let rule = "<hr style=\"border:0;border-top:1px solid rgba(128,128,128,.35)\">";
        vec![("text/html", html.join(rule)), ("text/plain", self.to_string())]
    }

    /// Called by evcxr to show the value that ends a cell. It replaces the text that appeared as
    /// it was made, which would be there twice.
    pub fn evcxr_display(&self) {
        self.live.iter().for_each(Live::blank);
        display::emit_value(&self.forms());
    }

    /// Shows it now, in the middle of a cell; the same holds.
    pub fn show(&self) {
        self.live.iter().for_each(Live::blank);
        display::emit(&self.forms());
    }
}

impl Deref for Generations {
    type Target = [GeneratedText];

    fn deref(&self) -> &[GeneratedText] {
        &self.texts
    }
}

impl IntoIterator for Generations {
    type Item = GeneratedText;
    type IntoIter = std::vec::IntoIter<GeneratedText>;

    fn into_iter(self) -> Self::IntoIter {
        self.texts.into_iter()
    }
}

/// As the reference's pipeline prints it: `[{'generated_text': '...'}]`.
impl fmt::Display for Generations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}]", commas(&self.texts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::display::capture;

    fn generated(prompt: &str, new_text: &str) -> GeneratedText {
        let finish_reason = FinishReason::Interrupted;
        GeneratedText { prompt: prompt.into(), new_text: new_text.into(), ids: vec![7], finish_reason }
    }

    impl GeneratedText {
        pub(crate) fn example() -> Self {
            generated("Human: 写一首七言绝句\n\nAssistant: ", "江上秋夜月如霜，\n孤舟一夜梦潇湘。")
        }
    }

    #[test]
    fn text_grows_in_one_output_which_the_result_replaces() {
        let (result, sent) = capture::messages(|| {
            let mut screen = LiveText::new("Human: <a>\n");
            // Most of these come too soon to be drawn; the last state is drawn all the same.
            ["江", "上", "秋夜"].iter().for_each(|piece| screen.push(piece));
            Generations { texts: vec![generated("Human: <a>\n", "江上秋夜")], live: screen.finish() }
        });
        let last = sent.last().unwrap();
        assert!(sent.len() >= 2 && sent.iter().all(|m| m["id"] == sent[0]["id"]), "{sent:?}");
        assert_eq!((&sent[0]["op"], &last["op"]), (&"display".into(), &"update".into()));
        assert_eq!(last["data"]["text/plain"], "Human: <a>\n江上秋夜");
        assert_eq!(last["metadata"], serde_json::json!({}), "the text is the seed's");

        let ((), shown) = capture::messages(|| result.evcxr_display());
        assert_eq!(shown.len(), 1, "the value itself is evcxr's: {shown:?}");
        assert_eq!((&shown[0]["id"], &shown[0]["data"]["text/plain"]), (&sent[0]["id"], &"".into()));
    }

    #[test]
    fn an_error_leaves_the_text_so_far() {
        let ((), sent) = capture::messages(|| {
            let mut screen = LiveText::new("a");
            ["b", "c", "d"].iter().for_each(|piece| screen.push(piece));
        });
        assert_eq!(sent.last().unwrap()["data"]["text/plain"], "abcd");
    }

    #[test]
    fn texts_show_with_their_line_breaks_and_print_as_in_the_reference() {
        let texts = vec![generated("a\n", "<b>"), generated("a\n", "c")];
        let forms = Generations { texts, live: None }.forms();
        assert!(forms[0].1.contains("a\n</span>&lt;b&gt;</div><hr"), "{forms:?}");
        assert_eq!(forms[1].1, "[{'generated_text': 'a\\n<b>'}, {'generated_text': 'a\\nc'}]");
    }
}

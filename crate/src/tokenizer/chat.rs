//! Chat templates: a conversation as the text that a model was tuned on.
//!
//! A template is a Jinja program that comes with the tokenizer. It is rendered as transformers'
//! `apply_chat_template` renders it: `trim_blocks` and `lstrip_blocks`, Python's string methods,
//! `raise_exception`, `strftime_now`, `tojson`, and the special tokens by their names.

use std::{fmt::Write, io, sync::LazyLock};

use minijinja::{AutoEscape, Environment, ErrorKind, State, Value, syntax::SyntaxConfig, value::Serde};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use super::{Encoding, Tokenizer};
use crate::error::{Error, Result, ensure};

/// One turn of a conversation.
///
/// ```
/// use qlora_nb::prelude::*;
/// let chat = [Message::system("You answer in one word."), Message::user("What colour is snow?")];
/// assert_eq!(chat[1].role, "user");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// What the model is told before the conversation.
    pub fn system(content: &str) -> Self {
        Self::new("system", content)
    }

    /// What a person says.
    pub fn user(content: &str) -> Self {
        Self::new("user", content)
    }

    /// What the model answers.
    pub fn assistant(content: &str) -> Self {
        Self::new("assistant", content)
    }
}

impl Tokenizer {
    /// The Jinja source of the chat template, if the tokenizer has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.config.chat_template.as_deref()
    }

    /// The same tokenizer with another chat template.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with the line that is no Jinja.
    pub fn with_chat_template(&self, template: &str) -> Result<Self> {
        environment(template)?;
        Ok(self.with(|config| config.chat_template = Some(template.into())))
    }

    /// The conversation as the text that the model knows, as `apply_chat_template(messages,
    /// tokenize=False)` gives it in Python. `add_generation_prompt` ends it with the beginning of an
    /// answer, which the model is to continue.
    ///
    /// The text has its special tokens already: tokenize it by [`Tokenizer::encode_chat`], which
    /// adds no more.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is no template, when it is no Jinja, and for what the
    /// template itself refuses, in its own words.
    ///
    /// ```no_run
    /// # use qlora_nb::prelude::*;
    /// # fn f(tokenizer: Tokenizer) -> Result<()> {
    /// let prompt = tokenizer.apply_chat_template(&[Message::user("What colour is snow?")], true)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn apply_chat_template(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.chat_template().ok_or_else(|| {
            let remedy = "give it one: tokenizer.with_chat_template(\"{% for message in messages %}...\")?";
            Error::argument("chat_template", "none", "a tokenizer with a chat template", remedy)
        })?;
        let environment = environment(template)?;
        // transformers passes tools and documents, as None: templates ask for them by "is not none".
        let mut context = serde_json::json!({
            "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": null, "documents": null,
        });
        for (name, token) in &self.config.special {
            context[*name] = token.as_str().into();
        }
        let rendered = on_deep_stack(STACK, || environment.get_template(NAME)?.render(Value::from(Serde(context))))?;
        rendered.map_err(|e| match refusal(&e) {
            Some(words) => {
                let expected = format!("a conversation that the chat template takes; it says: {words}");
                Error::argument("messages", "this conversation", &expected, "change the order or roles of the messages")
            }
            None => bad_template(&e),
        })
    }

    /// The tokens of a conversation, as `apply_chat_template(messages)` gives them in Python: the
    /// template's text, to which no special token is added.
    ///
    /// # Errors
    /// Those of [`Tokenizer::apply_chat_template`].
    pub fn encode_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Encoding> {
        let text = self.apply_chat_template(messages, add_generation_prompt)?;
        self.encode_without_special_tokens(&text)
    }

    /// What `tokenizer(text, add_special_tokens=False)` gives in Python: special tokens that the
    /// text spells are tokens, none is added.
    pub fn encode_without_special_tokens(&self, text: &str) -> Result<Encoding> {
        self.encode_text(text, false)
    }
}

const NAME: &str = "chat_template";
/// Marks what a template refuses among minijinja's own errors.
const REFUSED: &str = "raise_exception: ";

/// What the template itself said by `raise_exception`.
fn refusal(e: &minijinja::Error) -> Option<&str> {
    e.detail().and_then(|detail| detail.strip_prefix(REFUSED))
}

fn bad_template(e: &minijinja::Error) -> Error {
    let line = e.line().map(|line| format!("line {line}")).unwrap_or_else(|| "somewhere".into());
    let said = match (e.kind(), e.detail()) {
        (ErrorKind::OutOfFuel, _) => "it does not end, or makes more text than any conversation has".into(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    let expected = format!("a Jinja template; {said}");
    let remedy = "correct the template, or give another one: tokenizer.with_chat_template(...)?";
    Error::argument("chat_template", line, &expected, remedy)
}

/// What a template from anywhere may cost: so many instructions, or bytes made, [`BYTES_A_FUEL`] for one. Less than a
/// second's work, and more text than any model reads.
const FUEL: u64 = 500_000;
/// minijinja's rate for the text that a template prints.
const BYTES_A_FUEL: usize = 64;
/// The rate of `tojson`: its text exists twice while it grows, and a third time where it goes on.
const JSON_BYTES_A_FUEL: usize = BYTES_A_FUEL / 4;

/// Enough for values inside values, as many as the fuel makes; memory only where it is used.
const STACK: usize = 512 << 20;
/// Enough for a template that nests with each of its bytes: so much for each.
const STACK_A_BYTE: usize = 2 << 10;
/// In bytes; a model's own has a few thousand.
const LONGEST: usize = 8 << 20;

/// Runs `f` on a stack of `bytes`.
fn on_deep_stack<T: Send>(bytes: usize, f: impl FnOnce() -> T + Send) -> Result<T> {
    let failed = |why: String| {
        let expected = "a Jinja template that can be rendered";
        Error::argument("chat_template", why, expected, "free some memory, or give another template")
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(bytes).spawn_scoped(scope, f);
        let ended = thread.map_err(|e| failed(format!("no thread for it: {e}")))?.join();
        ended.map_err(|_| failed("a panic of the Jinja engine".into()))
    })
}

/// transformers' Jinja with the template compiled.
fn environment(template: &str) -> Result<Environment<'static>> {
    let (length, expected) = (template.len(), format!("a template of at most {LONGEST} bytes"));
    ensure(length <= LONGEST, "chat_template", format!("{length} bytes"), &expected, "give another template")?;
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    // Their time grows with the square of what they print, and costs no fuel.
    environment.remove_filter("pprint");
    environment.remove_global("debug");
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| bad_template(&e))?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> std::result::Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{REFUSED}{message}")))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    // `{% generation %}` marks the answers for training; what it encloses is rendered as it is.
    static GENERATION: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").ok());
    let plain = |found: &regex::Captures| {
        let word = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {word} {}%}}", &found[1], &found[3])
    };
    let template = GENERATION.as_ref().map_or(template.into(), |regex| regex.replace_all(template, plain));
    let template = template.into_owned();
    let stack = (1 << 20) + STACK_A_BYTE * template.len();
    let compiled = on_deep_stack(stack, || environment.add_template_owned(NAME, template))?;
    compiled.map_err(|e| bad_template(&e))?;
    Ok(environment)
}

/// The local time now, as strftime(3) formats it.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    let mut text = String::new();
    let written = write!(text, "{}", chrono::Local::now().format(&format));
    written.map(|()| text).map_err(|_| {
        let why = format!("strftime_now: {format:?} is no format of a time");
        minijinja::Error::new(ErrorKind::InvalidOperation, why)
    })
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(
    state: &State,
    value: Value,
    options: minijinja::value::Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let bad = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    // What else json.dumps takes changes nothing here.
    for known in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = options.get(known)?;
    }
    options.assert_all_used()?;
    let mut out = Paid { state, text: Vec::new() };
    state.consume_fuel((indent.unwrap_or(0) / JSON_BYTES_A_FUEL) as u64)?;
    let spaces = " ".repeat(indent.unwrap_or(0));
    let pretty = PrettyFormatter::with_indent(spaces.as_bytes());
    let written = match indent {
        Some(_) => value.serialize(&mut Serializer::with_formatter(&mut out, pretty)),
        None => value.serialize(&mut Serializer::with_formatter(&mut out, PythonJson)),
    };
    written.map_err(bad)?;
    Ok(String::from_utf8_lossy(&out.text).into_owned())
}

/// Text that costs fuel before it is there, as the engine's own does.
struct Paid<'a, 't, 'e> {
    state: &'a State<'t, 'e>,
    text: Vec<u8>,
}

impl io::Write for Paid<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let paid = self.text.len() / JSON_BYTES_A_FUEL;
        let due = (self.text.len() + bytes.len()) / JSON_BYTES_A_FUEL;
        self.state.consume_fuel((due - paid) as u64).map_err(io::Error::other)?;
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// JSON with a space after commas and colons.
struct PythonJson;

impl Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

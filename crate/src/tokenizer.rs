//! Step 3: text to tokens and back, on Hugging Face's `tokenizers`.

mod chat;
mod config;
mod gguf;
mod save;
mod show;
mod stream;
mod unigram;

use std::{collections::HashSet, path::Path, sync::Arc};

use tokenizers::{AddedToken, ModelWrapper};

use self::config::Config;
pub use self::{chat::Message, show::LabelledTokens, stream::DecodeStream};
pub use crate::features::{Encoding, Features};
use crate::{
    display,
    error::{Error, Result, catch, ensure},
    hub::Snapshot,
    models::gguf::Gguf,
    names::named,
};

/// The side of a row that padding goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PaddingSide {
    Left,
    Right,
}

named!(PaddingSide { Left => "left", Right => "right" });

impl PaddingSide {
    /// `row` filled up to `length`, which is not below its own.
    pub(crate) fn pad<T: Copy>(self, row: &[T], length: usize, with: T) -> Vec<T> {
        let padding = vec![with; length - row.len()];
        match self {
            Self::Left => [&padding, row].concat(),
            Self::Right => [row, &padding].concat(),
        }
    }
}

/// Loads tokenizers: `AutoTokenizer::from_pretrained("models/poet-bloom-zh")`.
pub struct AutoTokenizer;

impl AutoTokenizer {
    /// A tokenizer from a folder or a hub id that has a tokenizer.json. Special tokens, padding
    /// side and limits come from tokenizer_config.json, special_tokens_map.json and, for what
    /// those do not name, the token ids in generation_config.json and config.json; the chat
    /// template from chat_template.jinja or tokenizer_config.json.
    ///
    /// The path of a GGUF file, or of a folder with one and no tokenizer.json, gives the byte-level
    /// BPE tokenizer that the file carries.
    ///
    /// Warns on stderr when there is no end token, or when it is also the padding token: in both
    /// cases a tuned model would not learn to stop.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a folder or file that is not there, [`Error::Hub`] for what the hub
    /// refused, [`Error::Malformed`], naming the file, for what cannot be read.
    pub fn from_pretrained(name_or_path: impl AsRef<Path>) -> Result<Tokenizer> {
        Self::from_pretrained_path(name_or_path.as_ref())
    }

    fn from_pretrained_path(name_or_path: &Path) -> Result<Tokenizer> {
        if let Some(path) = crate::models::gguf::find(name_or_path, "tokenizer.json")? {
            return Self::from_gguf(&Gguf::open(path)?, &name_or_path.to_string_lossy());
        }
        let snapshot = Snapshot::open(&name_or_path.to_string_lossy())?;
        let path = snapshot.file("tokenizer.json")?;
        let malformed =
            |detail: String| Error::malformed(&path, "tokenizer.json", detail, "copy or download this file again");
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        if bytes.is_empty() {
            return Err(malformed("the file is empty".into()));
        }
        let mut core = parse(&bytes).map_err(malformed)?;
        // Padding and truncation belong to each call, not to the file, as in transformers.
        core.with_padding(None);
        core.with_truncation(None).map_err(|e| malformed(e.to_string()))?;
        let config = Config::read(&snapshot, |id| core.id_to_token(id))?;
        catch(|| add_special_tokens(&mut core, &config)).map_err(malformed)?;
        Ok(Tokenizer::new(core, config))
    }

    fn from_gguf(file: &Gguf, name_or_path: &str) -> Result<Tokenizer> {
        let (json, config) = gguf::read(file, name_or_path)?;
        let core = parse(json.to_string().as_bytes()).map_err(|e| file.malformed(format!("tokenizer: {e}")))?;
        Ok(Tokenizer::new(core, config))
    }
}

/// `tokenizers` panics on some contents, when it reads them or when it comes to use them.
fn parse(json: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    unigram::check(json)?;
    catch(|| tokenizers::Tokenizer::from_bytes(json).map_err(|e| e.to_string()))
}

/// Special tokens that only the config names become tokens here too, as transformers does it.
fn add_special_tokens(core: &mut tokenizers::Tokenizer, config: &Config) -> Result<(), String> {
    let known: HashSet<String> = core.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
    let named = config.special.iter().map(|(_, token)| token).chain(&config.additional);
    let new: Vec<AddedToken> =
        named.filter(|token| !known.contains(*token)).map(|token| AddedToken::from(token.clone(), true)).collect();
    if !new.is_empty() {
        core.add_special_tokens(new).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Text to tokens and back. Cloning is cheap.
#[derive(Clone)]
pub struct Tokenizer {
    core: Arc<tokenizers::Tokenizer>,
    config: Arc<Config>,
}

impl Tokenizer {
    fn new(core: tokenizers::Tokenizer, config: Config) -> Self {
        let tokenizer = Self { core: Arc::new(core), config: Arc::new(config) };
        tokenizer.warn_about_end();
        tokenizer
    }

    /// The same tokenizer with another configuration.
    fn with(&self, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = (*self.config).clone();
        change(&mut config);
        Self { core: self.core.clone(), config: Arc::new(config) }
    }

    /// What `tokenizer(text)` gives in Python: the tokens, with the special tokens that the
    /// tokenizer's own post-processor adds.
    pub fn encode(&self, text: &str) -> Result<Encoding> {
        self.encode_text(text, true)
    }

    fn encode_text(&self, text: &str, add_special_tokens: bool) -> Result<Encoding> {
        let encoding = catch(|| self.core.encode_fast(text, add_special_tokens).map_err(|e| e.to_string()));
        let encoding = encoding.map_err(Error::Tokenizer)?;
        Ok(Encoding { input_ids: encoding.get_ids().to_vec(), attention_mask: encoding.get_attention_mask().to_vec() })
    }

    /// Several texts, padded to the longest on this tokenizer's side; padding has mask 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when padding is needed and there is no padding token.
    pub fn encode_batch(&self, texts: &[impl AsRef<str>]) -> Result<Vec<Encoding>> {
        let mut rows = texts.iter().map(|text| self.encode(text.as_ref())).collect::<Result<Vec<_>>>()?;
        let length = rows.iter().map(Encoding::len).max().unwrap_or(0);
        for row in rows.iter_mut().filter(|row| row.len() < length) {
            let pad = self.pad_token_id().ok_or_else(|| {
                let expected = "a padding token: the texts differ in length";
                Error::argument("pad_token", "none", expected, "give it one: tokenizer.with_pad_token(\"<pad>\")?")
            })?;
            row.input_ids = self.padding_side().pad(&row.input_ids, length, pad);
            row.attention_mask = self.padding_side().pad(&row.attention_mask, length, 0);
        }
        Ok(rows)
    }

    /// Tokens to text. As in Python, ids beyond the vocabulary are left out, and
    /// `clean_up_tokenization_spaces` is not applied to BPE tokenizers, whose text it would damage.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let text = catch(|| self.core.decode(ids, skip_special_tokens).map_err(|e| e.to_string()));
        let text = text.map_err(Error::Tokenizer)?;
        let is_bpe = matches!(self.core.get_model(), ModelWrapper::BPE(_));
        Ok(if self.config.clean_up_tokenization_spaces && !is_bpe { clean_up(&text) } else { text })
    }

    /// Decodes tokens one at a time, giving out only whole characters; special tokens are left out.
    pub fn decode_stream(&self) -> DecodeStream {
        DecodeStream::new(self)
    }

    /// The number of tokens of the model's own vocabulary, without added tokens.
    pub fn vocab_size(&self) -> usize {
        self.core.get_vocab_size(false)
    }

    /// The number of tokens, added ones included.
    #[allow(clippy::len_without_is_empty)] // a tokenizer without tokens does not load
    pub fn len(&self) -> usize {
        self.core.get_vocab_size(true)
    }

    /// The token that begins a text, or "" if there is none.
    pub fn bos_token(&self) -> &str {
        self.special("bos_token")
    }

    /// The token that ends a text, or "" if there is none (loading warns about that), so that it
    /// can always be appended to an answer.
    pub fn eos_token(&self) -> &str {
        self.special("eos_token")
    }

    /// The token for what the vocabulary does not have, or "".
    pub fn unk_token(&self) -> &str {
        self.special("unk_token")
    }

    /// The token that fills rows up, or "".
    pub fn pad_token(&self) -> &str {
        self.special("pad_token")
    }

    pub fn bos_token_id(&self) -> Option<u32> {
        self.special_id("bos_token")
    }

    pub fn eos_token_id(&self) -> Option<u32> {
        self.special_id("eos_token")
    }

    pub fn unk_token_id(&self) -> Option<u32> {
        self.special_id("unk_token")
    }

    pub fn pad_token_id(&self) -> Option<u32> {
        self.special_id("pad_token")
    }

    /// The ids of all special tokens, in ascending order.
    pub fn all_special_ids(&self) -> Vec<u32> {
        let added = self.core.get_added_tokens_decoder();
        let mut ids: Vec<u32> = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    fn special(&self, name: &str) -> &str {
        self.config.token(name).unwrap_or("")
    }

    fn special_id(&self, name: &str) -> Option<u32> {
        self.core.token_to_id(self.config.token(name)?)
    }

    /// The id of one token as the vocabulary spells it.
    pub fn convert_tokens_to_ids(&self, token: &str) -> Option<u32> {
        self.core.token_to_id(token)
    }

    /// A token as the vocabulary spells it (byte-level BPE spells bytes by letters of their own).
    pub fn convert_ids_to_tokens(&self, id: u32) -> Option<String> {
        self.core.id_to_token(id)
    }

    pub fn padding_side(&self) -> PaddingSide {
        self.config.padding_side
    }

    /// The longest row that the model takes, in tokens; none if the files set no limit.
    pub fn model_max_length(&self) -> Option<usize> {
        self.config.model_max_length
    }

    pub fn name_or_path(&self) -> &str {
        &self.config.name_or_path
    }

    pub fn clean_up_tokenization_spaces(&self) -> bool {
        self.config.clean_up_tokenization_spaces
    }

    /// The same tokenizer, padding on another side.
    pub fn with_padding_side(&self, padding_side: PaddingSide) -> Self {
        self.with(|config| config.padding_side = padding_side)
    }

    /// The same tokenizer with another padding token, which must be in the vocabulary: a new one
    /// would have no row in the model's embeddings.
    pub fn with_pad_token(&self, token: &str) -> Result<Self> {
        let is_known = self.core.token_to_id(token).is_some();
        let remedy = "use e.g. the unk_token";
        ensure(is_known, "pad_token", format!("{token:?}"), "a token of the vocabulary", remedy)?;
        let tokenizer = self.with(|config| {
            config.special.retain(|(name, _)| *name != "pad_token");
            config.special.push(("pad_token", token.into()));
            config.special.sort_by_key(|(name, _)| config::NAMES.iter().position(|n| n == name));
        });
        tokenizer.warn_about_end();
        Ok(tokenizer)
    }

    fn warn_about_end(&self) {
        let eos = self.eos_token();
        let warning = if eos.is_empty() {
            "the tokenizer has no eos_token; a tuned model will not learn to stop".into()
        } else if eos == self.pad_token() {
            let other = if self.unk_token().is_empty() { "a rare token" } else { self.unk_token() };
            format!(
                "pad_token and eos_token are both {eos:?}; what leaves out padding also leaves out the end, and the \
                 model never learns to stop. Give it another padding token: tokenizer.with_pad_token({other:?})?"
            )
        } else {
            return;
        };
        display::warning_once(&format!("{}: {warning}", self.name_or_path()));
    }
}

/// The spaces that `clean_up_tokenization` of transformers takes away, in its order.
fn clean_up(text: &str) -> String {
    let spaced = [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"];
    spaced.iter().fold(text.to_string(), |text, spaced| text.replace(spaced, spaced.trim()))
}

//! What the files beside tokenizer.json say: special tokens, padding, limits.

use serde_json::Value;

use super::PaddingSide;
use crate::{
    error::{Error, Result},
    hub::Snapshot,
    json_file::read_json,
};

/// The special tokens that have a name of their own, in the order in which they are printed.
pub(super) const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

#[derive(Clone, Debug)]
pub(super) struct Config {
    pub name_or_path: String,
    pub class: String,
    /// `(name, token)`, in the order of `NAMES`.
    pub special: Vec<(&'static str, String)>,
    /// Special tokens without a name of their own.
    pub additional: Vec<String>,
    pub padding_side: PaddingSide,
    pub model_max_length: Option<usize>,
    pub clean_up_tokenization_spaces: bool,
    /// Jinja.
    pub chat_template: Option<String>,
}

impl Config {
    /// Reads tokenizer_config.json, then special_tokens_map.json, then the ids in
    /// generation_config.json and config.json: the first that names a token wins.
    pub fn read(snapshot: &Snapshot, token_of: impl Fn(u32) -> Option<String>) -> Result<Self> {
        let optional = |name: &str| -> Result<Value> {
            snapshot.optional_file(name)?.map_or(Ok(Value::Null), |path| read_json(&path))
        };
        let config = optional("tokenizer_config.json")?;
        let map = optional("special_tokens_map.json")?;
        let model = optional("config.json")?;
        let generation = optional("generation_config.json")?;

        let by_id = |source: &Value, name: &str| {
            let id = &source[format!("{name}_id")];
            let id = id.as_u64().or_else(|| id.as_array()?.first()?.as_u64())?;
            token_of(u32::try_from(id).ok()?)
        };
        let find = |name: &&'static str| {
            let token = content(&config[*name]).or_else(|| content(&map[*name]));
            let token = token.or_else(|| by_id(&generation, name)).or_else(|| by_id(&model, name));
            token.map(|token| (*name, token))
        };
        let additional = [&config, &map].into_iter().find_map(|source| source["additional_special_tokens"].as_array());
        let model_type = model["model_type"].as_str().unwrap_or("");
        let class = class_name(config["tokenizer_class"].as_str(), model_type);
        let padding_side = match config["padding_side"].as_str() {
            Some(side) => PaddingSide::from_name(side).ok_or_else(|| {
                let remedy = "correct padding_side in tokenizer_config.json";
                Error::argument("padding_side", format!("{side:?}"), "\"left\" or \"right\"", remedy)
            })?,
            None => default_padding_side(&class),
        };
        Ok(Self {
            name_or_path: snapshot.name_or_path().into(),
            special: NAMES.iter().filter_map(find).collect(),
            additional: additional.into_iter().flatten().filter_map(content).collect(),
            padding_side,
            // transformers writes 1e30 for "no limit", which no usize holds.
            model_max_length: config["model_max_length"].as_u64().and_then(|n| usize::try_from(n).ok()),
            clean_up_tokenization_spaces: config["clean_up_tokenization_spaces"].as_bool().unwrap_or(false),
            chat_template: chat_template(snapshot, &config)?,
            class,
        })
    }

    pub fn token(&self, name: &str) -> Option<&str> {
        self.special.iter().find(|(n, _)| *n == name).map(|(_, token)| token.as_str())
    }
}

pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// chat_template.jinja, or tokenizer_config.json's own: one, or the one of several that is named
/// `default`.
fn chat_template(snapshot: &Snapshot, config: &Value) -> Result<Option<String>> {
    if let Some(path) = snapshot.optional_file(CHAT_TEMPLATE)? {
        return Ok(Some(std::fs::read_to_string(&path).map_err(Error::io("read", &path))?));
    }
    let template = match &config["chat_template"] {
        Value::Array(several) => &several.iter().find(|t| t["name"] == "default").unwrap_or(&Value::Null)["template"],
        one => one,
    };
    Ok(template.as_str().map(String::from))
}

/// A token is written as a string, or as an AddedToken object.
fn content(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token["content"].as_str()).map(String::from)
}

fn class_name(named: Option<&str>, model_type: &str) -> String {
    let name = named.unwrap_or(if model_type == "bloom" { "BloomTokenizer" } else { "PreTrainedTokenizer" });
    if name.ends_with("Fast") { name.into() } else { format!("{name}Fast") }
}

/// The side that each class of transformers pads on when its config does not say.
fn default_padding_side(class: &str) -> PaddingSide {
    const LEFT: [&str; 6] = ["Bloom", "Llama", "CodeLlama", "Gemma", "Cohere", "XLNet"];
    let family = class.trim_end_matches("Fast").trim_end_matches("Tokenizer");
    if LEFT.contains(&family) { PaddingSide::Left } else { PaddingSide::Right }
}

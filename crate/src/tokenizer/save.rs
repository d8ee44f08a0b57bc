//! A tokenizer's files, beside a model's.

use std::{io::ErrorKind, path::Path};

use serde_json::json;

use super::{
    Tokenizer,
    config::{CHAT_TEMPLATE, Config},
};
use crate::{
    error::{Error, Result, catch},
    safe_file::write_atomically,
};

impl Tokenizer {
    /// Writes `tokenizer.json`, `tokenizer_config.json` and, if there is a chat template, `chat_template.jinja` (one of an
    /// earlier save goes if there is none), as `save_pretrained` of transformers does; transformers and
    /// [`AutoTokenizer`](super::AutoTokenizer) read them. With [`with_pad_token`](Self::with_pad_token) and the like in
    /// them. Beside a model, the folder is whole:
    ///
    /// ```no_run
    /// # use qlora_nb::prelude::*;
    /// # fn f(merged: Model, tokenizer: Tokenizer) -> Result<()> {
    /// merged.save_pretrained("out/merged")?;
    /// tokenizer.save_pretrained("out/merged")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`] for what cannot be written. Each file is written beside its place and then renamed.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_pretrained_path(folder.as_ref())
    }

    fn save_pretrained_path(&self, folder: &Path) -> Result<()> {
        let core = catch(|| self.core.to_string(true).map_err(|e| e.to_string())).map_err(Error::Tokenizer)?;
        std::fs::create_dir_all(folder).map_err(Error::io("write", folder))?;
        let write = |name: &str, text: &str| write_atomically(&folder.join(name), text.as_bytes());
        write("tokenizer.json", &core)?;
        write("tokenizer_config.json", &self.config.to_json())?;
        match &self.config.chat_template {
            Some(template) => write(CHAT_TEMPLATE, template),
            None => {
                let path = folder.join(CHAT_TEMPLATE);
                match std::fs::remove_file(&path) {
                    Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", &path)(e)),
                    _ => Ok(()),
                }
            }
        }
    }
}

impl Config {
    /// `tokenizer_config.json`.
    fn to_json(&self) -> String {
        let mut json = json!({
            "tokenizer_class": self.class,
            "padding_side": self.padding_side.as_str(),
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
        });
        if let Some(length) = self.model_max_length {
            json["model_max_length"] = length.into();
        }
        if !self.additional.is_empty() {
            json["additional_special_tokens"] = self.additional.clone().into();
        }
        for (name, token) in &self.special {
            json[*name] = token.clone().into();
        }
        format!("{json:#}\n")
    }
}

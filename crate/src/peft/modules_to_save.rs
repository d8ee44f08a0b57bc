//! Which modules learn whole: PEFT's `modules_to_save`.

use super::config::LoraConfig;
use crate::{
    error::{Error, Result, near_names},
    models::decoder::Decoder,
};

impl LoraConfig {
    /// The paths of the modules that `modules_to_save` names: those whose path ends with one of the names, as in PEFT.
    ///
    /// # Errors
    /// A name that no path ends with, and a module other than the output head and the table of embeddings.
    pub(super) fn saved_modules(&self, base: &Decoder) -> Result<Vec<String>> {
        let can_learn = [base.embedding.name.clone(), base.head.name.clone()];
        let parameters = base.named_parameters();
        let module = |name: &str| name.rsplit_once('.').map(|(module, _)| module.to_string());
        let mut paths: Vec<String> = parameters.iter().filter_map(|(name, _)| module(name)).collect();
        paths.push(base.head.name.clone());
        let mut saved = Vec::new();
        for name in self.modules_to_save.iter().flatten() {
            let named: Vec<&String> = paths.iter().filter(|path| path.ends_with(name)).collect();
            if named.is_empty() {
                let near = near_names(name, &paths);
                let expected = format!("the end of a module's path; near it: {near:?}");
                let remedy = format!("use one of {can_learn:?}");
                return Err(Error::argument("modules_to_save", format!("{name:?}"), &expected, &remedy));
            }
            if let Some(other) = named.iter().find(|path| !can_learn.contains(path)) {
                let remedy = "adapt linear layers by target_modules; norms stay as they are";
                return Err(Error::unsupported("modules_to_save", other, can_learn, remedy));
            }
            saved.extend(named.into_iter().cloned());
        }
        Ok(saved)
    }
}

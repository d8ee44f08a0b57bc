//! What the trainer asks of a model beyond learning: to be saved, loaded and recognised.

use std::path::Path;

use serde_json::Value;

use crate::{
    error::Result,
    models::{
        causal_lm::Trainable,
        memory::{MemoryReport, StepShape},
    },
    peft::PeftModel,
};

pub(super) trait TrainedModel: Trainable {
    /// Writes the adapter's files into `folder`.
    fn save_adapter(&self, folder: &Path) -> Result<()>;

    /// Replaces the adapter's values by those in `folder`; all or none.
    fn load_adapter(&self, folder: &Path) -> Result<()>;

    /// What a checkpoint of another run may differ in, by name.
    fn identity(&self) -> Result<Vec<(String, Value)>>;

    /// Where the memory of the weights goes.
    fn memory_of_weights(&self) -> MemoryReport;

    /// What a micro-batch of this shape needs besides.
    fn memory_of_step(&self, shape: StepShape) -> Result<MemoryReport>;

    /// Bytes that `load_in_4bit` would save.
    fn memory_saved_by_4bit(&self) -> usize {
        0
    }
}

/// The fields of the adapter's configuration that change what is computed.
const LORA_FIELDS: [&str; 9] = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
];

impl TrainedModel for PeftModel {
    fn save_adapter(&self, folder: &Path) -> Result<()> {
        self.save_active_adapter(folder)
    }

    fn load_adapter(&self, folder: &Path) -> Result<()> {
        self.load_adapter_weights(folder)
    }

    fn identity(&self) -> Result<Vec<(String, Value)>> {
        let config: Value = serde_json::from_str(&self.config().to_json_string()).unwrap_or_default();
        let mut identity: Vec<_> =
            LORA_FIELDS.iter().map(|field| (format!("LoraConfig.{field}"), config[*field].clone())).collect();
        identity.push(("model".into(), self.fingerprint()?.into()));
        Ok(identity)
    }

    fn memory_of_weights(&self) -> MemoryReport {
        self.memory_report()
    }

    fn memory_of_step(&self, shape: StepShape) -> Result<MemoryReport> {
        MemoryReport::of_step(self.decoder(), shape)
    }

    fn memory_saved_by_4bit(&self) -> usize {
        MemoryReport::saved_by_4bit(self.decoder())
    }
}

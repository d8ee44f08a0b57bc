//! How well a model predicts a text.

use candle_core::{DType, Device, Tensor};

use super::decoder::Decoder;
use crate::{
    batch::Batch,
    error::{Result, ensure},
};

/// `exp` of the mean cross-entropy (nats) with which the network predicts each id from those before
/// it: among how many equally likely tokens it hesitates, on average. Less is better.
///
/// The ids are cut into windows of `window`, and each is read by itself; its first id is given, not
/// predicted, and a last window of one id is left out. Of two models only figures of the same
/// tokenizer, text and window compare.
///
/// # Errors
/// Fewer than two ids, a window of fewer than two, an id beyond the vocabulary.
///
/// ```no_run
/// use qlora_nb::{model::perplexity, prelude::*};
/// # fn main() -> Result<()> {
/// let path = "notebooks/models/SmolLM2-135M-Instruct";
/// let model = AutoModelForCausalLM::from_pretrained(path, ModelOptions::default())?;
/// let ids = AutoTokenizer::from_pretrained(path)?.encode("The sea was calm in the morning.")?.input_ids;
/// println!("{:.2}", perplexity(model.decoder(), &ids, 512)?);
/// # Ok(())
/// # }
/// ```
pub fn perplexity(decoder: &Decoder, input_ids: &[u32], window: usize) -> Result<f64> {
    ensure(window >= 2, "window", window, "at least 2 ids", "use 512, or the model's context length")?;
    let (n, remedy) = (input_ids.len(), "give a longer text: the first id is not predicted");
    ensure(n >= 2, "input_ids", n, "at least 2 ids", remedy)?;
    let (mut loss_sum, mut predicted) = (0.0, 0);
    for ids in input_ids.chunks(window).filter(|ids| ids.len() > 1) {
        let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?; // [1, T]
        let pass = decoder.loss(&Batch::new(ids.clone(), ids.ones_like()?, ids.to_dtype(DType::I64)?)?)?;
        loss_sum += pass.loss_sum;
        predicted += pass.num_label_tokens;
    }
    Ok((loss_sum / predicted as f64).exp())
}

//! A decoder-only transformer: embedding, blocks, norm, head. Architectures differ in their
//! blocks; the pass over them, gradient checkpointing and generation are here, once.

use std::{fmt, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::{
    causal_lm::{Draw, Next, Pass, PassOptions},
    memory::Needs,
    options::ModelOptions,
    weights::Weights,
};
use crate::{
    batch::Batch,
    error::{Error, Result},
    layers::{
        cross_entropy::head_and_loss,
        embedding::Embedding,
        kv_cache::KvCache,
        layer_norm::LayerNorm,
        linear::{Linear, Weight},
        norm::Norm,
        own_loss::{LossFn, head_and_own_loss},
        run::Run,
        sequences::{Packed, Sequences},
    },
    module_tree::ModuleNode,
};

/// Tokens of a pass with a cache that runs on the CPU as one of rayon's threads. Its products take some ten microseconds
/// each: a thread of another kind would go to sleep at each, and be woken when it is done. A larger pass stays on the
/// caller's thread, because a thread's heap keeps what was freed, and rayon's choice of a thread may differ each time.
const SHORT_PASS: usize = 16;

/// One layer of the stack.
pub trait Block: Send + Sync {
    /// `[M, C]` to `[M, C]`.
    fn forward(&self, x: &Tensor, run: &mut Run) -> Result<Tensor>;

    /// Saves again what [`Block::forward`] saves: gradient checkpointing's second pass, whose result
    /// nobody reads.
    fn recompute(&self, x: &Tensor, run: &mut Run) -> Result<()> {
        self.forward(x, run).map(drop)
    }

    /// dy to dx. With `need_dx` false nothing below learns, and dx is not computed.
    fn backward(&self, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>>;

    /// The linear layers, in the order of the modules.
    fn linears(&self) -> Vec<&Linear>;

    /// The same block with other linear layers, in the order of [`Block::linears`].
    fn with_linears(&self, linears: Vec<Linear>) -> Result<Arc<dyn Block>>;

    /// The parameters that are not a linear layer's, with the position they have among them:
    /// (how many linears come before, name, tensor).
    fn other_parameters(&self) -> Vec<(usize, String, Tensor)>;

    /// The modules as PyTorch prints them, each linear's node made by `linear`.
    fn module_tree(&self, name: &str, linear: &dyn Fn(&str, &Linear) -> ModuleNode) -> ModuleNode;

    /// What [`Block::forward`] saves for each token when there is a backward to come, and what that backward needs
    /// besides. `gpu`: the dtype that a GPU computes in, which keeps other things than the CPU (`None`).
    fn needs(&self, gpu: Option<DType>) -> Needs;
}

/// The dtype of a parameter; prints as PyTorch does: `torch.float16`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ParameterDType(pub DType);

impl fmt::Display for ParameterDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            DType::F32 => "torch.float32",
            DType::F16 => "torch.float16",
            DType::BF16 => "torch.bfloat16",
            DType::U8 => "torch.uint8",
            other => return f.write_str(other.as_str()),
        })
    }
}

impl fmt::Debug for ParameterDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PartialEq<DType> for ParameterDType {
    fn eq(&self, other: &DType) -> bool {
        self.0 == *other
    }
}

/// A parameter as it is stored: a quantized weight is its packed bytes.
#[derive(Clone, Debug)]
pub struct Parameter {
    tensor: Tensor,
    elements: usize,
    requires_grad: bool,
}

impl Parameter {
    pub fn new(tensor: &Tensor) -> Self {
        Self { tensor: tensor.clone(), elements: tensor.elem_count(), requires_grad: false }
    }

    fn of_weight(weight: &Weight) -> Self {
        match weight {
            Weight::Dense(t) => Self::new(t),
            Weight::Quantized(q) => {
                let elements = q.shape().iter().product();
                Self { tensor: q.packed().clone(), elements, requires_grad: false }
            }
        }
    }

    /// Prints as PyTorch does: `torch.float16`, `torch.uint8` for a quantized weight.
    pub fn dtype(&self) -> ParameterDType {
        ParameterDType(self.tensor.dtype())
    }

    /// The stored tensor; `[ceil(n / 2), 1]` uint8 for a quantized weight.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The stored tensor's dimensions.
    pub fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }

    /// Numbers that it stands for: a quantized weight counts its elements, not its bytes.
    pub fn numel(&self) -> usize {
        self.elements
    }

    /// Whether it learns.
    pub fn requires_grad(&self) -> bool {
        self.requires_grad
    }
}

/// The network of a causal language model. Cloning shares the weights.
#[derive(Clone)]
pub struct Decoder {
    /// `BloomForCausalLM`, as PyTorch prints it.
    pub architecture: &'static str,
    /// Names of the parts, as the checkpoint has them.
    pub names: DecoderNames,
    pub embedding: Embedding,
    /// The id whose embedding PyTorch marks as padding; printed in the module tree only.
    pub padding_idx: Option<usize>,
    pub embedding_norm: Option<LayerNorm>,
    pub blocks: Vec<Arc<dyn Block>>,
    pub final_norm: Norm,
    pub head: Linear,
    /// The head is the embedding table.
    pub tied: bool,
    /// Width of a key row: kv heads × head_dim.
    pub kv_width: usize,
    /// What the GPU keeps between passes.
    pub recorded: super::Recorded,
}

/// How an architecture names the parts around its blocks.
#[derive(Clone, Copy, Debug)]
pub struct DecoderNames {
    /// `transformer`
    pub model: &'static str,
    /// `BloomModel`
    pub model_class: &'static str,
    /// `word_embeddings`
    pub embedding: &'static str,
    /// `word_embeddings_layernorm`
    pub embedding_norm: &'static str,
    /// `h`
    pub blocks: &'static str,
    /// `ln_f`
    pub final_norm: &'static str,
    /// Modules without parameters behind the final norm: (name, what PyTorch prints).
    pub without_parameters: &'static [(&'static str, &'static str)],
}

impl Decoder {
    /// Rows of the embedding table.
    pub fn vocab_size(&self) -> usize {
        self.embedding.weight.dims()[0]
    }

    /// Hidden size C.
    pub fn hidden_size(&self) -> usize {
        self.embedding.weight.dims()[1]
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let x = self.embedding.forward(ids)?;
        match &self.embedding_norm {
            None => Ok(x),
            // The embeddings are frozen, so the norm above them has no backward.
            Some(norm) => norm.forward(&x, &mut Run::inference(&Sequences::new([ids.len()]))),
        }
    }

    /// The hidden state after the last block, `[M, C]`.
    fn run_blocks(&self, ids: &[u32], run: &mut Run) -> Result<Tensor> {
        let mut x = self.embed(ids)?;
        for (i, block) in self.blocks.iter().enumerate() {
            run.block = i;
            x = block.forward(&x, run)?;
        }
        Ok(x)
    }

    /// Logits of a padded batch: `[B, T]` ids (any integer dtype) to f32 `[B, T, vocab]`.
    /// Positions that `attention_mask` marks with 0 get zeros. The result is on the CPU.
    pub fn logits(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        let packed = Packed::new(input_ids, attention_mask, None, self.vocab_size())?;
        #[cfg(feature = "cuda")]
        if self.device().is_cuda() {
            return packed.unpack(&self.logits_on_gpu(&packed)?);
        }
        let mut run = Run::inference(&packed.sequences);
        let x = self.run_blocks(&packed.ids, &mut run)?;
        let x = self.final_norm.forward(&x, &mut run)?;
        packed.unpack(&self.head.forward(&x, None, &mut run)?)
    }

    /// The hidden states that transformers' `output_hidden_states` gives: the embeddings,
    /// then each block's output, the last one after the final norm; f32 `[B, T, C]` each.
    pub fn hidden_states(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let packed = Packed::new(input_ids, attention_mask, None, self.vocab_size())?;
        #[cfg(feature = "cuda")]
        if self.device().is_cuda() {
            return self.hidden_states_on_gpu(&packed)?.iter().map(|x| packed.unpack(x)).collect();
        }
        let mut run = Run::inference(&packed.sequences);
        let mut x = self.embed(&packed.ids)?;
        let mut states = vec![packed.unpack(&x)?];
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &mut run)?;
            if i + 1 == self.blocks.len() {
                x = self.final_norm.forward(&x, &mut run)?;
            }
            states.push(packed.unpack(&x)?);
        }
        Ok(states)
    }

    /// The summed loss of a batch, without dropout and without gradients.
    pub fn loss(&self, batch: &Batch) -> Result<Pass> {
        let packed = self.pack(batch)?;
        #[cfg(feature = "cuda")]
        if self.device().is_cuda() {
            return self.loss_on_gpu(&packed);
        }
        let mut run = Run::inference(&packed.sequences);
        let x = self.run_blocks(&packed.ids, &mut run)?;
        let x = self.final_norm.forward(&x, &mut run)?;
        let (loss_sum, num_label_tokens, _) = head_and_loss(&x, &self.head, &packed.targets, None, None)?;
        Ok(Pass { loss_sum, num_label_tokens })
    }

    fn pack(&self, batch: &Batch) -> Result<Packed> {
        Packed::new(&batch.input_ids, Some(&batch.attention_mask), Some(&batch.labels), self.vocab_size())
    }

    /// One micro-batch: adds to the gradient of every adapter.
    ///
    /// With gradient checkpointing only each block's input is kept and the block runs again
    /// on the way back (arXiv:1604.06174): the same operations on the same numbers, so the
    /// gradients are the same bit for bit.
    pub fn forward_backward(&self, batch: &Batch, options: &PassOptions) -> Result<Pass> {
        self.there_and_back(batch, options, None)
    }

    /// [`forward_backward`](Self::forward_backward) with `loss` in place of the cross-entropy.
    pub fn forward_backward_with(&self, batch: &Batch, options: &PassOptions, loss: &LossFn) -> Result<Pass> {
        self.there_and_back(batch, options, Some(loss))
    }

    fn there_and_back(&self, batch: &Batch, options: &PassOptions, loss: Option<&LossFn>) -> Result<Pass> {
        let packed = self.pack(batch)?;
        #[cfg(feature = "cuda")]
        if self.device().is_cuda() {
            if loss.is_some() {
                return Err(Error::Unsupported {
                    what: "device of a model that is trained with a loss of your own".into(),
                    got: "a GPU".into(),
                    supported: vec!["cpu".into()],
                    remedy: "load the model with DeviceMap::Cpu".into(),
                });
            }
            return self.with_room_to_record(|| self.forward_backward_on_gpu(&packed, options));
        }
        let key = Some(options.dropout_key);
        let run = |saves: bool| match saves {
            true => Run::training(&packed.sequences, key),
            false => Run { dropout_key: key, ..Run::inference(&packed.sequences) },
        };
        let mut pass = Pass::default();
        let scale = 1.0 / options.num_items;
        self.learn(self.embed(&packed.ids)?, options.gradient_checkpointing, &run, |x, _| {
            let (loss_sum, num_label_tokens, dx) = match loss {
                None => head_and_loss(x, &self.head, &packed.targets, Some(scale), key)?,
                Some(loss) => head_and_own_loss(x, &self.head, &packed.targets, scale, key, loss)?,
            };
            pass = Pass { loss_sum, num_label_tokens };
            Ok(dx.filter(|_| num_label_tokens > 0))
        })?;
        Ok(pass)
    }

    /// From the embeddings up to `head`, which takes the normed hidden state and gives its gradient (or
    /// nothing, and that is all), and down again to the lowest block that learns. `new_run` makes a run
    /// of this batch, one that saves or one that does not.
    pub(super) fn learn<'a>(
        &self,
        embedded: Tensor,
        gradient_checkpointing: bool,
        new_run: &dyn Fn(bool) -> Run<'a>,
        head: impl FnOnce(&Tensor, &Run<'a>) -> Result<Option<Tensor>>,
    ) -> Result<()> {
        let lowest = self.lowest_learning_block();
        let mut x = embedded;
        let mut run = new_run(true);
        let mut inputs = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            x = if i < lowest || gradient_checkpointing {
                let y = block.forward(&x, &mut new_run(false))?;
                if i >= lowest {
                    inputs.push(x);
                }
                y
            } else {
                block.forward(&x, &mut run)?
            };
        }
        x = self.final_norm.forward(&x, &mut run)?;
        let Some(dx) = head(&x, &run)?.filter(|_| lowest < self.blocks.len()) else { return Ok(()) };
        drop(x);
        let mut dx = self.final_norm.backward(&dx, None, &mut run)?;
        for (i, block) in self.blocks.iter().enumerate().skip(lowest).rev() {
            let need_dx = i > lowest;
            let below = if gradient_checkpointing {
                let mut again = new_run(true);
                if let Some(input) = inputs.pop() {
                    block.recompute(&input, &mut again)?;
                }
                block.backward(&dx, need_dx, &mut again)?
            } else {
                block.backward(&dx, need_dx, &mut run)?
            };
            match below {
                Some(below) => dx = below,
                None => break,
            }
        }
        Ok(())
    }

    /// Runs `pass`, and once more when there was no room to record it: a pass that was only launched before leaves
    /// memory that can be given back, and a recording that failed has changed nothing.
    #[cfg(feature = "cuda")]
    fn with_room_to_record<T>(&self, mut pass: impl FnMut() -> Result<T>) -> Result<T> {
        let done = pass();
        let gpu = crate::cuda::of(self.device())?;
        if matches!(done, Err(Error::OutOfDeviceMemory { .. })) && gpu.take_no_room_to_record() {
            gpu.trim()?;
            return pass();
        }
        done
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.embedding.weight.device()
    }

    /// Below this block nothing learns, so the backward ends there.
    fn lowest_learning_block(&self) -> usize {
        let learns = |block: &Arc<dyn Block>| block.linears().iter().any(|l| l.lora.is_some());
        self.blocks.iter().position(learns).unwrap_or(self.blocks.len())
    }

    /// See [`super::causal_lm::CausalLM::new_cache`].
    pub fn new_cache(&self, sequences: usize) -> Result<KvCache> {
        // The CPU computes in f32, a GPU in the model's dtype.
        let dtype = if self.device().is_cpu() { DType::F32 } else { self.embedding.weight.dtype() };
        KvCache::new(self.blocks.len(), sequences, self.kv_width, dtype, self.device())
    }

    /// See [`super::causal_lm::CausalLM::next_token_logits`].
    pub fn next_token_logits(&self, new_tokens: &[&[u32]], cache: &mut KvCache) -> Result<Tensor> {
        match self.next_tokens(new_tokens, cache, &[])? {
            Next::Logits(logits) => Ok(logits),
            Next::Ids(_) => Err(candle_core::Error::Msg("tokens without a draw".into()).bt().into()),
        }
    }

    /// See [`super::causal_lm::CausalLM::next_tokens`]: a GPU chooses, the CPU gives the logits.
    pub fn next_tokens(&self, new_tokens: &[&[u32]], cache: &mut KvCache, draws: &[Draw]) -> Result<Next> {
        if new_tokens.len() != cache.lengths().len() {
            return Err(Error::argument(
                "new_tokens",
                new_tokens.len(),
                &format!("one slice for each of the cache's {} sequences", cache.lengths().len()),
                "make the cache with new_cache(number of sequences)",
            ));
        }
        for (row, tokens) in new_tokens.iter().enumerate() {
            if tokens.is_empty() {
                return Err(Error::EmptySequence { row });
            }
            for (position, &id) in tokens.iter().enumerate() {
                if id as usize >= self.vocab_size() {
                    return Err(Error::TokenId { row, position, id: id.into(), vocab_size: self.vocab_size() });
                }
            }
        }
        let ids = new_tokens.concat();
        let lengths: Vec<usize> = new_tokens.iter().map(|t| t.len()).collect();
        cache.reserve(&lengths)?;
        #[cfg(feature = "cuda")]
        if self.device().is_cuda() {
            let sequences = Sequences::new(lengths.iter().copied());
            let next = self.with_room_to_record(|| self.next_tokens_on_gpu(&ids, &sequences, cache, draws))?;
            cache.advance(&lengths);
            return Ok(next);
        }
        let _ = draws;
        let mut pass = || self.next_tokens_on_cpu(&ids, &lengths, cache);
        if ids.len() <= SHORT_PASS { rayon::scope(|_| pass()) } else { pass() }
    }

    fn next_tokens_on_cpu(&self, ids: &[u32], lengths: &[usize], cache: &mut KvCache) -> Result<Next> {
        let sequences = Sequences::new(lengths.iter().copied());
        let x = {
            let mut run = Run { cache: Some(cache), ..Run::inference(&sequences) };
            self.run_blocks(ids, &mut run)?
        };
        cache.advance(lengths);
        let last: Vec<u32> = sequences.ranges().map(|r| r.end as u32 - 1).collect();
        let x = if last.len() == ids.len() { x } else { x.index_select(&Tensor::new(last, &Device::Cpu)?, 0)? };
        let sequences = Sequences::new([lengths.len()]);
        let mut run = Run::inference(&sequences);
        let x = self.final_norm.forward(&x, &mut run)?;
        self.head.forward(&x, None, &mut run).map(Next::Logits)
    }

    /// Every linear layer, in the order of the modules, the head last.
    pub fn linears(&self) -> Vec<&Linear> {
        self.blocks.iter().flat_map(|b| b.linears()).chain([&self.head]).collect()
    }

    /// The same network with other linear layers, in the order of [`Decoder::linears`].
    pub fn map_linears(&self, mut change: impl FnMut(&Linear) -> Result<Linear>) -> Result<Self> {
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let linears = block.linears().into_iter().map(&mut change).collect::<Result<Vec<_>>>()?;
            blocks.push(block.with_linears(linears)?);
        }
        Ok(Self { blocks, head: change(&self.head)?, recorded: Default::default(), ..self.clone() })
    }

    /// Every parameter with its name, in the reference's order. The tied head is not listed
    /// twice. Adapters are listed under PEFT's names.
    pub fn named_parameters(&self) -> Vec<(String, Parameter)> {
        let peft = self.linears().iter().any(|l| l.lora.is_some());
        let prefix = if peft { "base_model.model." } else { "" };
        let model = self.names.model;
        let mut all = Vec::new();
        let mut put = |name: String, tensor: &Tensor| all.push((format!("{prefix}{name}"), Parameter::new(tensor)));
        put(format!("{model}.{}.weight", self.names.embedding), &self.embedding.weight);
        if let Some(norm) = &self.embedding_norm {
            put(format!("{model}.{}.weight", self.names.embedding_norm), &norm.weight);
            put(format!("{model}.{}.bias", self.names.embedding_norm), &norm.bias);
        }
        for (i, block) in self.blocks.iter().enumerate() {
            let linears = block.linears();
            let mut others = block.other_parameters().into_iter().peekable();
            for before in 0..=linears.len() {
                while let Some((_, name, tensor)) = others.next_if(|(position, ..)| *position == before) {
                    let name = format!("{prefix}{model}.{}.{i}.{name}", self.names.blocks);
                    all.push((name, Parameter::new(&tensor)));
                }
                if let Some(linear) = linears.get(before) {
                    linear_parameters(prefix, linear, &mut all);
                }
            }
        }
        let final_norm = self.names.final_norm;
        for (part, tensor) in self.final_norm.parameters() {
            all.push((format!("{prefix}{model}.{final_norm}.{part}"), Parameter::new(tensor)));
        }
        if !self.tied || self.head.lora.is_some() {
            linear_parameters(prefix, &self.head, &mut all);
        }
        all
    }
}

/// The output head's weight `[vocab, C]`, and whether it is the embedding table: that is so when
/// the configuration says `tied`, unless the checkpoint has a head that differs from the table.
pub(super) fn head(
    weights: &mut Weights,
    table: &Tensor,
    tied: bool,
    options: &ModelOptions,
) -> Result<(Tensor, bool)> {
    const NAME: &str = "lm_head.weight";
    if tied && !weights.contains(NAME) {
        return Ok((table.clone(), true));
    }
    let (rows, width) = table.dims2()?;
    let own = weights.table(NAME, &[rows, width], options.torch_dtype)?;
    if !tied {
        return Ok((own, false));
    }
    // Some rows at a time: what the comparison makes is larger than what it compares.
    const COMPARED: usize = 4096;
    for begin in (0..rows).step_by(COMPARED) {
        let part = |t: &Tensor| t.narrow(0, begin, COMPARED.min(rows - begin));
        let different = part(&own)?.ne(&part(table)?)?.to_dtype(DType::F32)?.max_all()?.to_scalar::<f32>()? > 0.0;
        if different {
            crate::display::notice(
                "config.json ties the output head to the embeddings, but the checkpoint has a head of its own: it is used",
            );
            return Ok((own, false));
        }
    }
    Ok((table.clone(), true))
}

/// dx of a linear layer inside a block: always needed.
pub(super) fn through(linear: &Linear, dy: &Tensor, run: &mut Run) -> Result<Tensor> {
    let dx = linear.backward(dy, true, run)?;
    dx.ok_or_else(|| candle_core::Error::Msg(format!("{} gave no gradient", linear.name)).bt().into())
}

/// The linear layers that [`Block::with_linears`] was given, which must be N.
pub(super) fn exactly<const N: usize>(block: &str, linears: Vec<Linear>) -> Result<[Linear; N]> {
    linears.try_into().map_err(|l: Vec<Linear>| {
        candle_core::Error::Msg(format!("a {block} has {N} linears, not {}", l.len())).bt().into()
    })
}

fn linear_parameters(prefix: &str, linear: &Linear, all: &mut Vec<(String, Parameter)>) {
    let base = if linear.lora.is_some() { ".base_layer" } else { "" };
    all.push((format!("{prefix}{}{base}.weight", linear.name), Parameter::of_weight(&linear.weight)));
    if let Some(bias) = &linear.bias {
        all.push((format!("{prefix}{}{base}.bias", linear.name), Parameter::new(bias)));
    }
    if let Some(lora) = &linear.lora {
        for (part, param) in [("lora_A", &lora.a), ("lora_B", &lora.b)] {
            let parameter = Parameter { requires_grad: true, ..Parameter::new(param.value()) };
            all.push((format!("{prefix}{}.{part}.default.weight", linear.name), parameter));
        }
    }
}

//! A decoder-only transformer: embedding, blocks, norm, head. Architectures describe themselves and differ in how a block
//! computes; loading, the pass over the blocks, gradient checkpointing and generation are here, once, for every device.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};

use super::{
    needs::Needs,
    options::ModelOptions,
    parameter::Parameter,
    parts::{NormKind, Part, Parts},
    weights::Weights,
};
use crate::{
    backend::{
        self, Backend, Draw, Kept, Learning, Next,
        kv_cache::KvCache,
        operands::{Norm, Weight},
        param::Param,
        run::{Run, Saved},
        sequences::{Packed, Sequences},
    },
    batch::Batch,
    display::module_tree::ModuleNode,
    error::{Error, Result},
    layers::{
        Embedding, Linear,
        custom_loss::{LossFn, head_and_custom_loss},
        loss::head_and_loss,
    },
    models::causal_lm::{Pass, PassOptions},
};

/// How a block computes, given its parts.
pub trait BlockKind: Send + Sync {
    /// `[M, C]` to `[M, C]`.
    fn forward(&self, parts: &Parts, x: &Tensor, run: &mut Run) -> Result<Tensor>;

    /// Saves again what [`BlockKind::forward`] saves: gradient checkpointing's second pass, whose result nobody reads.
    fn recompute(&self, parts: &Parts, x: &Tensor, run: &mut Run) -> Result<()> {
        self.forward(parts, x, run).map(drop)
    }

    /// dy to dx. With `need_dx` false nothing below learns, and dx is not computed.
    fn backward(&self, parts: &Parts, dy: &Tensor, need_dx: bool, run: &mut Run) -> Result<Option<Tensor>>;

    /// Activations a token that exist at the widest point of the backward, besides what was saved.
    fn working(&self) -> usize;
}

/// A model as its family describes it.
pub struct Description {
    /// `Bloom`: classes are printed as `BloomModel`, `BloomForCausalLM`.
    pub class: &'static str,
    /// `transformer`: what the parts around the blocks are in. The checkpoint may leave it out.
    pub model: &'static str,
    /// `transformer.`
    pub prefix: &'static str,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_layers: usize,
    /// `word_embeddings`
    pub embedding: &'static str,
    /// The id whose embedding PyTorch marks as padding; printed in the module tree only.
    pub padding_idx: Option<usize>,
    pub embedding_norm: Option<(&'static str, NormKind)>,
    /// `h`
    pub blocks: &'static str,
    /// `BloomBlock`, and what it is made of.
    pub block: (String, Vec<Part>),
    pub kind: Arc<dyn BlockKind>,
    /// Buffers in a block that older checkpoints keep; they are computed.
    pub computed: &'static [&'static str],
    /// `ln_f`
    pub final_norm: (&'static str, NormKind),
    /// Modules without parameters behind the final norm: (name, what PyTorch prints).
    pub plain: Vec<(&'static str, String)>,
    /// The head is the embedding table.
    pub tied: bool,
    /// Width of a key row: kv heads × head_dim.
    pub kv_width: usize,
}

/// The network of a causal language model. Cloning shares the weights.
#[derive(Clone)]
pub struct Decoder {
    description: Arc<Description>,
    backend: &'static dyn Backend,
    pub(crate) embedding: Embedding,
    embedding_norm: Option<Norm>,
    pub(super) blocks: Vec<Parts>,
    final_norm: Norm,
    pub(crate) head: Linear,
    /// The head is the embedding table.
    pub(crate) tied: bool,
    /// What the device keeps between passes.
    kept: Kept,
    needs: Arc<OnceLock<Vec<Needs>>>,
}

impl Decoder {
    /// Reads the model that `description` describes.
    pub fn load(description: Description, weights: &mut Weights, options: &ModelOptions) -> Result<Self> {
        let (c, dtype) = (description.hidden_size, options.torch_dtype);
        let quantization = options.quantization_config.as_ref();
        let model = description.model;
        weights.optional_prefix(description.prefix);
        let name = format!("{model}.{}.weight", description.embedding);
        let embedding = weights.table(&name, &[description.vocab_size, c], dtype)?;
        let mut norm = |name: &str, kind: &NormKind| kind.load(&format!("{model}.{name}"), c, weights, dtype);
        let embedding_norm = description.embedding_norm.as_ref().map(|(name, kind)| norm(name, kind)).transpose()?;
        let block = Arc::new(description.block.clone());
        let mut blocks = Vec::new();
        // With more blocks than tensors some are missing, and that is enough to know.
        for i in 0..description.num_layers.min(weights.count() + 1) {
            let path = format!("{model}.{}.{i}", description.blocks);
            for buffer in description.computed {
                weights.ignore(&format!("{path}.{buffer}"));
            }
            blocks.push(Parts::load(&block, path, weights, dtype, quantization)?);
        }
        let (name, kind) = &description.final_norm;
        let final_norm = kind.load(&format!("{model}.{name}"), c, weights, dtype)?;
        let (head, tied) = head(weights, &embedding, &description, dtype)?;
        let mut head = Linear::new("lm_head", Weight::Dense(head), None);
        head.frozen.compute_dtype = quantization.map(|q| q.bnb_4bit_compute_dtype);
        Ok(Self {
            backend: backend::of(embedding.device())?,
            embedding: Embedding::new(format!("{model}.{}", description.embedding), embedding, description.padding_idx),
            embedding_norm,
            blocks,
            final_norm,
            head,
            tied,
            kept: Kept::default(),
            needs: Arc::default(),
            description: Arc::new(description),
        })
    }

    /// Rows of the embedding table.
    pub fn vocab_size(&self) -> usize {
        self.embedding.table.dims()[0]
    }

    /// Hidden size C.
    pub fn hidden_size(&self) -> usize {
        self.embedding.table.dims()[1]
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.embedding.table.device()
    }

    /// The dtype of activations.
    pub(crate) fn activations(&self) -> DType {
        self.backend.activations(self.embedding.table.dtype())
    }

    /// Whether the head is the embedding table.
    pub fn is_tied(&self) -> bool {
        self.tied
    }

    /// What keeps the scale of an f16 loss.
    pub(crate) fn kept(&self) -> &Kept {
        &self.kept
    }

    fn embed(&self, run: &mut Run) -> Result<Tensor> {
        let x = self.embedding.forward(run)?;
        match &self.embedding_norm {
            None => Ok(x),
            Some(norm) if self.embedding.learns() => norm.forward(&x, run),
            // The embeddings are frozen, so the norm above them has no backward.
            Some(norm) => run.with_saved(None, |run| norm.forward(&x, run)),
        }
    }

    /// The gradient of what [`Decoder::embed`] gave to that of the embeddings that learn.
    fn embed_backward(&self, dx: Tensor, run: &mut Run) -> Result<()> {
        let dx = match &self.embedding_norm {
            None => dx,
            Some(norm) => norm.backward(&dx, None, run)?,
        };
        self.embedding.backward(&dx, run)
    }

    /// The hidden state after the last block, `[M, C]`; `each` sees every block's output.
    fn run_blocks(&self, run: &mut Run, mut each: impl FnMut(&Tensor, &mut Run) -> Result<()>) -> Result<Tensor> {
        let mut x = self.embed(run)?;
        for (i, block) in self.blocks.iter().enumerate() {
            run.check_stop()?;
            each(&x, run)?;
            run.block = i;
            x = self.description.kind.forward(block, &x, run)?;
        }
        Ok(x)
    }

    /// The hidden state after the final norm, `[M, C]`.
    fn hidden(&self, run: &mut Run) -> Result<Tensor> {
        let x = self.run_blocks(run, |_, _| Ok(()))?;
        self.final_norm.forward(&x, run)
    }

    /// Logits of a padded batch: `[B, T]` ids (any integer dtype) to f32 `[B, T, vocab]`.
    /// Positions that `attention_mask` marks with 0 get zeros. The result is on the CPU.
    pub fn logits(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        let packed = Packed::new(input_ids, attention_mask, None, self.vocab_size())?;
        let mut logits = None;
        self.backend.pass(&packed.tokens(), &mut |run| {
            let x = self.hidden(run)?;
            let all = self.head.forward_logits(&x, run)?;
            logits = Some(self.backend.to_host(&all, self.vocab_size(), run)?);
            Ok(())
        })?;
        packed.unpack(&logits.ok_or_else(|| backend::internal("a pass without logits"))?)
    }

    /// The hidden states that transformers' `output_hidden_states` gives: the embeddings,
    /// then each block's output, the last one after the final norm; f32 `[B, T, C]` each.
    pub fn hidden_states(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let packed = Packed::new(input_ids, attention_mask, None, self.vocab_size())?;
        let mut states = Vec::new();
        self.backend.pass(&packed.tokens(), &mut |run| {
            let mut state = |x: &Tensor, run: &mut Run| {
                states.push(packed.unpack(&self.backend.to_host(x, self.hidden_size(), run)?)?);
                Ok(())
            };
            let x = self.run_blocks(run, &mut state)?;
            let x = self.final_norm.forward(&x, run)?;
            state(&x, run)
        })?;
        Ok(states)
    }

    /// The summed loss of a batch, without dropout and without gradients.
    pub fn loss(&self, batch: &Batch) -> Result<Pass> {
        let packed = self.pack(batch)?;
        let loss_sum = self.backend.pass(&packed.tokens(), &mut |run| {
            let x = self.hidden(run)?;
            head_and_loss(&x, &self.head, false, run).map(drop)
        })?;
        Ok(Pass { loss_sum, num_label_tokens: packed.num_label_tokens() })
    }

    fn pack(&self, batch: &Batch) -> Result<Packed> {
        Packed::new(&batch.input_ids, Some(&batch.attention_mask), Some(&batch.labels), self.vocab_size())
    }

    /// One micro-batch: adds to the gradient of every adapter, of the cross-entropy or of the caller's own `loss`.
    ///
    /// With gradient checkpointing only each block's input is kept and the block runs again
    /// on the way back (arXiv:1604.06174): the same operations on the same numbers, so the
    /// gradients are the same bit for bit.
    pub fn forward_backward(&self, batch: &Batch, options: &PassOptions, loss: Option<&LossFn>) -> Result<Pass> {
        let packed = self.pack(batch)?;
        if loss.is_some() && !self.device().is_cpu() {
            return Err(Error::Unsupported {
                what: "device of a model that is trained with a loss of your own".into(),
                got: "a GPU".into(),
                supported: vec!["cpu".into()],
                remedy: "load the model with DeviceMap::Cpu".into(),
            });
        }
        let learning = Learning {
            tokens: packed.tokens(),
            grad_scale: 1.0 / options.num_items,
            dropout_key: options.dropout_key,
            gradient_checkpointing: options.gradient_checkpointing,
            kept: &self.kept,
            params: &|| self.params(),
            largest_dequantized: self.largest_dequantized(),
            activations: self.activations(),
        };
        let loss_sum = self.backend.learn(&learning, &mut |run| {
            self.learn(options.gradient_checkpointing, run, &mut |x, run| match loss {
                None => head_and_loss(x, &self.head, true, run),
                Some(loss) => head_and_custom_loss(x, &self.head, loss, run),
            })
        })?;
        Ok(Pass { loss_sum, num_label_tokens: packed.num_label_tokens() })
    }

    /// From the embeddings up to `head`, which takes the normed hidden state and gives its gradient (or
    /// nothing, and that is all), and down again to the lowest block that learns.
    fn learn(
        &self,
        gradient_checkpointing: bool,
        run: &mut Run,
        head: &mut dyn FnMut(&Tensor, &mut Run) -> Result<Option<Tensor>>,
    ) -> Result<()> {
        let kind = &*self.description.kind;
        let embedding_learns = self.embedding.learns();
        let lowest = self.lowest_learning_block();
        let mut x = self.embed(run)?;
        let mut inputs = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            run.check_stop()?;
            run.block = i;
            x = if i < lowest || gradient_checkpointing {
                let y = run.with_saved(None, |run| kind.forward(block, &x, run))?;
                if i >= lowest {
                    inputs.push(x);
                }
                y
            } else {
                kind.forward(block, &x, run)?
            };
        }
        x = self.final_norm.forward(&x, run)?;
        let Some(dx) = head(&x, run)?.filter(|_| lowest < self.blocks.len()) else { return Ok(()) };
        drop(x);
        let mut dx = self.final_norm.backward(&dx, None, run)?;
        for (i, block) in self.blocks.iter().enumerate().skip(lowest).rev() {
            run.check_stop()?;
            run.block = i;
            let need_dx = i > lowest || embedding_learns;
            let below = if gradient_checkpointing {
                let input = inputs.pop();
                run.with_saved(Some(Saved::default()), |run| {
                    if let Some(input) = input {
                        kind.recompute(block, &input, run)?;
                    }
                    kind.backward(block, &dx, need_dx, run)
                })?
            } else {
                kind.backward(block, &dx, need_dx, run)?
            };
            match below {
                Some(below) => dx = below,
                None => break,
            }
        }
        if embedding_learns { self.embed_backward(dx, run) } else { Ok(()) }
    }

    /// Below this block nothing learns, so the backward ends there.
    fn lowest_learning_block(&self) -> usize {
        if self.embedding.learns() {
            return 0;
        }
        let learns = |block: &Parts| block.linears().any(|l| l.adapter().is_some());
        self.blocks.iter().position(learns).unwrap_or(self.blocks.len())
    }

    /// What each block that learns keeps for a token, and needs besides: seen in a pass of a few tokens.
    pub(super) fn needs(&self) -> Result<&[Needs]> {
        if let Some(needs) = self.needs.get() {
            return Ok(needs);
        }
        let (ids, sequences) = ([0; Needs::TOKENS], Sequences::new([Needs::TOKENS]));
        let tokens = backend::Tokens { ids: &ids, targets: &[], sequences: &sequences };
        let kind = &*self.description.kind;
        let mut needs = Vec::new();
        self.backend.pass(&tokens, &mut |run| {
            let mut x = self.embed(run)?;
            for (i, block) in self.blocks.iter().enumerate().skip(self.lowest_learning_block()) {
                run.block = i;
                run.saved = Some(Saved::default());
                x = kind.forward(block, &x, run)?;
                needs.extend(run.saved.take().map(|saved| Needs::of(&saved, kind.working())));
            }
            Ok(())
        })?;
        Ok(self.needs.get_or_init(|| needs))
    }

    /// See [`super::causal_lm::CausalLM::new_cache`].
    pub fn new_cache(&self, sequences: usize) -> Result<KvCache> {
        KvCache::new(self.blocks.len(), sequences, self.description.kv_width, self.activations(), self.device())
    }

    /// See [`super::causal_lm::CausalLM::next_token_logits`].
    pub fn next_token_logits(&self, new_tokens: &[&[u32]], cache: &mut KvCache) -> Result<Tensor> {
        match self.next_tokens(new_tokens, cache, &[])? {
            Next::Logits(logits) => Ok(logits),
            Next::Ids(_) => Err(backend::internal("tokens without a draw")),
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
        let sequences = Sequences::new(lengths.iter().copied());
        cache.reserve(&lengths)?;
        let tokens = backend::Tokens { ids: &ids, targets: &[], sequences: &sequences };
        let next = self.backend.next_tokens(&tokens, self.vocab_size(), cache, draws, &mut |run| {
            let x = self.run_blocks(run, |_, _| Ok(()))?;
            let x = self.backend.last_rows(&x, run)?; // (sequences, C)
            let x = self.final_norm.forward(&x, run)?;
            self.head.forward_logits(&x, run)
        })?;
        cache.advance(&lengths);
        Ok(next)
    }

    /// Every linear layer, in the order of the modules, the head last.
    pub fn linears(&self) -> Vec<&Linear> {
        self.blocks.iter().flat_map(Parts::linears).chain([&self.head]).collect()
    }

    /// The same network with other linear layers, in the order of [`Decoder::linears`].
    pub fn map_linears(&self, mut change: impl FnMut(&Linear) -> Result<Linear>) -> Result<Self> {
        let blocks = self.blocks.iter().map(|block| block.map_linears(&mut change)).collect::<Result<_>>()?;
        let head = change(&self.head)?;
        Ok(Self { blocks, head, kept: Kept::default(), needs: Arc::default(), ..self.clone() })
    }

    /// The same network with another embedding layer.
    pub fn with_embedding(&self, embedding: Embedding) -> Self {
        Self { embedding, kept: Kept::default(), needs: Arc::default(), ..self.clone() }
    }

    /// What learns, in the order of the modules.
    pub fn params(&self) -> Vec<Param> {
        let linears = self.linears().into_iter().flat_map(|linear| linear.trainable());
        self.embedding.copies.active().into_iter().chain(linears.map(|(_, param)| param)).cloned().collect()
    }

    /// Bytes of the largest weight once it is dequantized for a product.
    pub(super) fn largest_dequantized(&self) -> usize {
        let bytes = |linear: &&Linear| linear.frozen.dequantized_bytes(self.activations());
        self.linears().iter().map(bytes).max().unwrap_or(0)
    }

    /// The norms' tensors, inside the blocks and around them.
    pub(super) fn norms(&self) -> impl Iterator<Item = &Norm> {
        let inside = self.blocks.iter().flat_map(Parts::norms);
        inside.chain(&self.embedding_norm).chain([&self.final_norm])
    }

    /// Every parameter with its name, in the reference's order. The tied head is not listed
    /// twice. Adapters are listed under PEFT's names.
    pub fn named_parameters(&self) -> Vec<(String, Parameter)> {
        let Description { model, embedding_norm, final_norm, .. } = &*self.description;
        let adapted = self.linears().iter().any(|l| !l.adapters().is_empty());
        let prefix = if adapted { "base_model.model." } else { "" };
        let of_norm = |name: &str, norm: &Norm| Parameter::of_norm(&format!("{prefix}{model}.{name}"), norm);
        let mut all = Parameter::of_embedding(prefix, &self.embedding);
        if let (Some((name, _)), Some(norm)) = (embedding_norm, &self.embedding_norm) {
            all.extend(of_norm(name, norm));
        }
        all.extend(self.blocks.iter().flat_map(|block| block.named_parameters(prefix)));
        all.extend(of_norm(final_norm.0, &self.final_norm));
        // A tied head's own weight is listed already.
        all.extend(Parameter::of_linear(prefix, &self.head).into_iter().skip(self.tied.into()));
        all
    }

    /// The tree of modules as PyTorch prints it, adapters included.
    pub fn module_tree(&self) -> ModuleNode {
        let d = &*self.description;
        let width = self.hidden_size();
        let mut parts = vec![self.embedding.module_tree(d.embedding)];
        parts.extend(d.embedding_norm.as_ref().map(|(name, kind)| kind.module_tree(name, width)));
        parts.push(ModuleNode::list(d.blocks, self.blocks.iter().map(Parts::module_tree).collect()));
        parts.push(d.final_norm.1.module_tree(d.final_norm.0, width));
        parts.extend(d.plain.iter().map(|(name, label)| ModuleNode::leaf(*name, label)));
        let model = ModuleNode::new(d.model, format!("{}Model", d.class), parts);
        ModuleNode::new("", format!("{}ForCausalLM", d.class), vec![model, self.head.module_tree("lm_head")])
    }
}

/// The output head's weight `[vocab, C]`, and whether it is the embedding table: that is so when
/// the configuration says `tied`, unless the checkpoint has a head that differs from the table.
fn head(weights: &mut Weights, table: &Tensor, description: &Description, dtype: DType) -> Result<(Tensor, bool)> {
    const NAME: &str = "lm_head.weight";
    if description.tied && !weights.contains(NAME) {
        return Ok((table.clone(), true));
    }
    let rows = description.vocab_size;
    let own = weights.table(NAME, &[rows, description.hidden_size], dtype)?;
    if !description.tied || own.dims() != table.dims() {
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

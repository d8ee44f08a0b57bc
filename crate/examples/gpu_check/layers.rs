//! Every layer's forward and backward on the card against the CPU's, which computes in f32.
//!
//! Both get the same numbers, rounded to the card's dtype first. An error is a norm's share of the
//! whole; the tolerances are a few times the dtype's rounding.

use std::sync::Arc;

use qlora_nb::internals::{
    adapters::{DoraAdapter, LoraAdapter, SavedModule},
    backend::{
        Tokens,
        cpu::Cpu,
        cuda::{HostInputs, Inputs, OnCard, Scalars, uninit},
        operands::{Attention, HeadLayout, Lora, Norm, Rope, Weight},
        param::Param,
        run::{Run, Saved},
        sequences::Sequences,
    },
    layers::{Embedding, Linear, alibi_slopes, loss::head_and_loss},
};
use qlora_nb::{
    candle_core::{DType, Device, Tensor},
    error::Result,
    quant::{QuantType, QuantizedTensor},
};

use crate::check::Checks;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-5,
        DType::F16 => 3e-3,
        _ => 2e-2,
    }
}

pub fn run(checks: &mut Checks) -> Result<()> {
    for dtype in DTYPES {
        norms(checks, dtype)?;
        activations(checks, dtype)?;
        for (heads, kv_heads, d) in
            [(4, 4, 128), (2, 2, 64), (3, 1, 32), (4, 2, 128), (6, 6, 16), (2, 1, 48), (2, 2, 256)]
        {
            attention(checks, dtype, (heads, kv_heads, d))?;
        }
        for (m, k, n, r, dropout) in
            [(64, 128, 256, 8, 0.0), (100, 72, 200, 8, 0.0), (33, 256, 96, 16, 0.2), (130, 64, 64, 5, 0.5)]
        {
            linear(checks, dtype, (m, k, n), r, dropout)?;
        }
        for compute in DTYPES.into_iter().filter(|compute| *compute != dtype) {
            compute_dtype(checks, dtype, compute)?;
        }
        dora(checks, dtype)?;
        saved_modules(checks, dtype)?;
        sums(checks, dtype)?;
        loss(checks, dtype)?;
        rope(checks, dtype)?;
    }
    Ok(())
}

/// The same random numbers on the CPU, in f32, and on the card, in `dtype`.
fn pair(checks: &mut Checks, shape: &[usize], dtype: DType, scale: f32) -> Result<(Tensor, Tensor)> {
    let n = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| checks.rng.normal() * scale).collect();
    let rounded = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?;
    Ok((rounded.to_dtype(DType::F32)?, rounded.to_device(&checks.device)?))
}

/// A batch of random lengths, on the CPU and on the card.
struct Batch {
    sequences: Sequences,
    ids: Vec<u32>,
    /// Labels on about half.
    targets: Vec<i64>,
    inputs: Inputs,
    losses: Tensor,
    dtype: DType,
    scalars: Scalars,
}

const ONE: Scalars = Scalars { dropout_key: 77, grad_scale: 1.0, loss_scale: 1.0 };

impl Batch {
    /// `m` tokens in all.
    fn new(checks: &mut Checks, m: usize, vocab: usize, dtype: DType, scalars: Scalars) -> Result<Self> {
        let mut lengths = Vec::new();
        let mut left = m;
        while left > 0 {
            let n = (1 + checks.rng.below(150)).min(left);
            lengths.push(n);
            left -= n;
        }
        let mut target = |_| if checks.rng.below(2) == 0 { -100 } else { checks.rng.below(vocab) as i64 };
        let targets: Vec<i64> = (0..m).map(&mut target).collect();
        let (sequences, ids) = (Sequences::new(lengths), vec![0u32; m]);
        let host = HostInputs { ids: &ids, targets: &targets, sequences: &sequences, cache: None, scalars, draws: &[] };
        let inputs = Inputs::new(checks.gpu, host.shape(false))?;
        inputs.fill(checks.gpu, &host)?;
        let losses = uninit(checks.gpu, inputs.shape.labels.max(1), DType::F32)?;
        Ok(Self { sequences, ids, targets, inputs, losses, dtype, scalars })
    }

    /// Random token ids in place of zeros.
    fn set_ids(&mut self, checks: &mut Checks, vocab: usize) -> Result<()> {
        self.ids = (0..self.ids.len()).map(|_| checks.rng.below(vocab) as u32).collect();
        let (ids, targets, sequences) = (&self.ids, &self.targets, &self.sequences);
        let host = HostInputs { ids, targets, sequences, cache: None, scalars: self.scalars, draws: &[] };
        self.inputs.fill(checks.gpu, &host)
    }

    fn tokens(&self) -> Tokens<'_> {
        Tokens { ids: &self.ids, targets: &self.targets, sequences: &self.sequences }
    }

    /// A pass that learns on the CPU, and one on the card.
    fn runs(&self, checks: &Checks) -> (Run<'_>, Run<'_>) {
        let mut cpu = Run::new(&Cpu, &self.tokens());
        let mut gpu = Run::new(checks.gpu, &self.tokens());
        gpu.card = Some(OnCard { inputs: &self.inputs, weights: None, losses: &self.losses, activations: self.dtype });
        for run in [&mut cpu, &mut gpu] {
            (run.saved, run.dropout_key) = (Some(Saved::default()), Some(self.scalars.dropout_key));
            run.grad_scale = f64::from(self.scalars.loss_scale);
        }
        (cpu, gpu)
    }
}

fn norms(checks: &mut Checks, dtype: DType) -> Result<()> {
    for (m, c) in [(5, 64), (37, 2048), (3, 100), (2, 4104)] {
        let batch = Batch::new(checks, m, 9, dtype, ONE)?;
        let (x, gx) = pair(checks, &[m, c], dtype, 2.0)?;
        let (dy, gdy) = pair(checks, &[m, c], dtype, 1.0)?;
        let (r, gr) = pair(checks, &[m, c], dtype, 1.0)?;
        let (w, gw) = pair(checks, &[c], dtype, 1.0)?;
        let (b, gb) = pair(checks, &[c], dtype, 1.0)?;
        checks.poison(1 << 22)?;
        let (mut cpu, mut gpu) = batch.runs(checks);
        let (norm, gnorm) = (Norm::new(w.clone(), Some(b), 1e-5)?, Norm::new(gw.clone(), Some(gb), 1e-5)?);
        let what = format!("layer_norm {dtype:?} [{m}, {c}]");
        let t = tolerance(dtype);
        checks.close(&what, &gnorm.forward(&gx, &mut gpu)?, &norm.forward(&x, &mut cpu)?, t)?;
        let (got, want) = (gnorm.backward(&gdy, Some(&gr), &mut gpu)?, norm.backward(&dy, Some(&r), &mut cpu)?);
        checks.close(&format!("{what} backward"), &got, &want, t)?;
        let (norm, gnorm) = (Norm::new(w, None, 1e-5)?, Norm::new(gw, None, 1e-5)?);
        let what = format!("rms_norm {dtype:?} [{m}, {c}]");
        checks.close(&what, &gnorm.forward(&gx, &mut gpu)?, &norm.forward(&x, &mut cpu)?, t)?;
        let (got, want) = (gnorm.backward(&gdy, None, &mut gpu)?, norm.backward(&dy, None, &mut cpu)?);
        checks.close(&format!("{what} backward"), &got, &want, t)?;
    }
    Ok(())
}

fn activations(checks: &mut Checks, dtype: DType) -> Result<()> {
    let (m, c) = (19, 1000);
    let batch = Batch::new(checks, m, 9, dtype, ONE)?;
    let (x, gx) = pair(checks, &[m, c], dtype, 3.0)?;
    let (u, gu) = pair(checks, &[m, c], dtype, 1.0)?;
    let (dy, gdy) = pair(checks, &[m, c], dtype, 1.0)?;
    checks.poison(1 << 20)?;
    let t = tolerance(dtype);
    let (mut cpu, mut gpu) = batch.runs(checks);
    let (c, g) = (cpu.backend, gpu.backend);
    checks.close(&format!("gelu {dtype:?}"), &g.gelu(&gx, &mut gpu)?, &c.gelu(&x, &mut cpu)?, t)?;
    let (got, want) = (g.gelu_backward(&gdy, &mut gpu)?, c.gelu_backward(&dy, &mut cpu)?);
    checks.close(&format!("gelu {dtype:?} backward"), &got, &want, t)?;
    let (got, want) = (g.swiglu(&gx, &gu, &mut gpu)?, c.swiglu(&x, &u, &mut cpu)?);
    checks.close(&format!("swiglu {dtype:?}"), &got, &want, t)?;
    let (got, want) = (g.swiglu_backward(&gdy, &mut gpu)?, c.swiglu_backward(&dy, &mut cpu)?);
    checks.close(&format!("swiglu {dtype:?} backward, gate"), &got.0, &want.0, t)?;
    checks.close(&format!("swiglu {dtype:?} backward, up"), &got.1, &want.1, t)
}

/// a + b, of whole vectors and of others.
fn sums(checks: &mut Checks, dtype: DType) -> Result<()> {
    for shape in [[64, 128], [7, 33]] {
        let (a, ga) = pair(checks, &shape, dtype, 1.0)?;
        let (b, gb) = pair(checks, &shape, dtype, 1.0)?;
        checks.poison(1 << 20)?;
        let batch = Batch::new(checks, 5, 9, dtype, ONE)?;
        let (cpu, gpu) = batch.runs(checks);
        let (got, want) = (gpu.backend.add(&ga, &gb)?, cpu.backend.add(&a, &b)?);
        checks.close(&format!("sum {dtype:?} {shape:?}"), &got, &want, tolerance(dtype))?;
    }
    Ok(())
}

fn attention(checks: &mut Checks, dtype: DType, (heads, kv_heads, d): (usize, usize, usize)) -> Result<()> {
    for (alibi, m, window) in
        [(true, 300, None), (false, 77, None), (false, 400, Some(5)), (false, 400, Some(64)), (false, 400, Some(100))]
    {
        let layout = match heads == kv_heads && alibi {
            true => HeadLayout::interleaved(heads, d),
            false => HeadLayout::grouped(heads, kv_heads, d),
        };
        let slopes = if alibi { alibi_slopes(heads) } else { Vec::new() };
        let attention = Attention { layout, slopes, window };
        let batch = Batch::new(checks, m, 9, dtype, ONE)?;
        let (x, gx) = pair(checks, &[m, layout.row], dtype, 1.0)?;
        let (dy, gdy) = pair(checks, &[m, heads * d], dtype, 1.0)?;
        checks.poison(1 << 22)?;
        let (mut cpu, mut gpu) = batch.runs(checks);
        let what = format!("attention {dtype:?} {heads}/{kv_heads} heads of {d}, alibi {alibi}, window {window:?}");
        let (got, want) = (attention.forward(&gx, &mut gpu)?, attention.forward(&x, &mut cpu)?);
        checks.close(&what, &got, &want, tolerance(dtype))?;
        let (got, want) = (attention.backward(&gdy, &mut gpu)?, attention.backward(&dy, &mut cpu)?);
        checks.close(&format!("{what}, backward"), &got, &want, 2.0 * tolerance(dtype))?;
    }
    Ok(())
}

/// A weight on the CPU and on the card, in NF4.
fn nf4(checks: &Checks, weight: &Tensor, dtype: DType) -> Result<(Weight, Weight)> {
    let weight = weight.to_dtype(dtype)?;
    let quantize = |device: &Device| {
        QuantizedTensor::quantize(&weight.to_device(device)?, QuantType::Nf4, 64, true).map(Weight::Quantized)
    };
    Ok((quantize(&Device::Cpu)?, quantize(&checks.device)?))
}

/// The same adapter twice.
fn loras(checks: &mut Checks, (k, n, r): (usize, usize, usize), dropout: f64) -> Result<(Lora, Lora)> {
    let (a, _) = pair(checks, &[r, k], DType::F32, 0.1)?;
    let (b, _) = pair(checks, &[n, r], DType::F32, 0.1)?;
    let lora = |device: &Device| -> Result<Lora> {
        let param = |name: &str, t: &Tensor| Param::new(name, &t.to_device(device)?);
        Ok(Lora { a: param("a", &a)?, b: param("b", &b)?, scaling: 0.7, dropout, id: 5 })
    };
    Ok((lora(&Device::Cpu)?, lora(&checks.device)?))
}

fn linear(checks: &mut Checks, dtype: DType, (m, k, n): (usize, usize, usize), r: usize, dropout: f64) -> Result<()> {
    let scalars = Scalars { grad_scale: 0.5, ..ONE };
    let batch = Batch::new(checks, m, 9, dtype, scalars)?;
    let (x, gx) = pair(checks, &[m, k], dtype, 1.0)?;
    let (dy, gdy) = pair(checks, &[m, n], dtype, 1.0)?;
    let (res, gres) = pair(checks, &[m, n], dtype, 1.0)?;
    let (w, _) = pair(checks, &[n, k], dtype, 0.05)?;
    let (bias, gbias) = pair(checks, &[n], dtype, 1.0)?;
    let (weight, gweight) = nf4(checks, &w, dtype)?;
    let (lora, glora) = loras(checks, (k, n, r), dropout)?;
    let adapted = |weight, bias, lora: &Lora| {
        let linear = Linear::new("l", weight, Some(bias));
        linear.with_adapter("a", Arc::new(LoraAdapter(lora.clone()))).with_active(Some("a"))
    };
    let (linear, glinear) = (adapted(weight, bias, &lora), adapted(gweight, gbias, &glora));
    checks.poison(1 << 22)?;
    let (mut cpu, mut gpu) = batch.runs(checks);
    let what = format!("linear NF4 {dtype:?} [{m}, {k}] to {n}, rank {r}, dropout {dropout}");
    let t = tolerance(dtype);
    let (got, want) = (glinear.forward_onto(&gx, &gres, &mut gpu)?, linear.forward_onto(&x, &res, &mut cpu)?);
    checks.close(&what, &got, &want, t)?;
    let (got, want) = (glinear.backward(&gdy, true, &mut gpu)?, linear.backward(&dy, true, &mut cpu)?);
    if let (Some(got), Some(want)) = (got, want) {
        checks.close(&format!("{what}: dx"), &got, &want, t)?;
    }
    let half = |t: &Tensor| t * f64::from(scalars.grad_scale);
    checks.close(&format!("{what}: dA"), glora.a.grad(), &half(lora.a.grad())?, t)?;
    checks.close(&format!("{what}: dB"), glora.b.grad(), &half(lora.b.grad())?, t)
}

/// A product in another dtype than the activations': as one whose operands were rounded to it.
fn compute_dtype(checks: &mut Checks, dtype: DType, compute: DType) -> Result<()> {
    let (m, k, n, r) = (70, 128, 192, 8);
    let batch = Batch::new(checks, m, 9, dtype, ONE)?;
    let (x, gx) = pair(checks, &[m, k], dtype, 1.0)?;
    let (dy, gdy) = pair(checks, &[m, n], dtype, 1.0)?;
    let (w, _) = pair(checks, &[n, k], dtype, 0.05)?;
    let (bias, gbias) = pair(checks, &[n], dtype, 1.0)?;
    let (weight, gweight) = nf4(checks, &w, dtype)?;
    let (lora, glora) = loras(checks, (k, n, r), 0.0)?;
    // The reference, step by step: bitsandbytes' Linear4bit, then PEFT's adapter.
    let rounded = |t: &Tensor| -> Result<Tensor> { Ok(t.to_dtype(compute)?.to_dtype(DType::F32)?) };
    let wide = rounded(&weight.dequantize()?.to_dtype(DType::F32)?)?;
    let update = (lora.b.value().matmul(lora.a.value())? * lora.scaling)?;
    let own = rounded(&rounded(&x)?.matmul(&wide.t()?)?.broadcast_add(&bias)?)?;
    let want = (own + x.matmul(&update.t()?)?)?;
    let want_dx = (rounded(&rounded(&dy)?.matmul(&wide)?)? + dy.matmul(&update)?)?;
    let mut linear = Linear::new("l", gweight, Some(gbias));
    linear.frozen.compute_dtype = Some(compute);
    let linear = linear.with_adapter("a", Arc::new(LoraAdapter(glora))).with_active(Some("a"));
    checks.poison(1 << 22)?;
    let (_, mut gpu) = batch.runs(checks);
    let what = format!("linear NF4 {dtype:?}, products in {compute:?}");
    // Only the sums' order differs; they are rounded twice.
    let t = tolerance(dtype).max(tolerance(compute)) / 2.0;
    let got = linear.forward(&gx, &mut gpu)?;
    checks.equal(&format!("{what}: dtype"), &[(got.dtype() != dtype).then(|| format!("{:?}", got.dtype()))]);
    checks.close(&what, &got, &want, t)?;
    if let Some(dx) = linear.backward(&gdy, true, &mut gpu)? {
        checks.close(&format!("{what}: dx"), &dx, &want_dx, t)?;
    }
    Ok(())
}

fn dora(checks: &mut Checks, dtype: DType) -> Result<()> {
    let (m, k, n, r) = (90, 128, 200, 6);
    let scalars = Scalars { grad_scale: 0.5, ..ONE };
    let batch = Batch::new(checks, m, 9, dtype, scalars)?;
    let (x, gx) = pair(checks, &[m, k], dtype, 1.0)?;
    let (dy, gdy) = pair(checks, &[m, n], dtype, 1.0)?;
    let (res, gres) = pair(checks, &[m, n], dtype, 1.0)?;
    let (w, _) = pair(checks, &[n, k], dtype, 0.05)?;
    let (bias, gbias) = pair(checks, &[n], dtype, 1.0)?;
    let (weight, gweight) = nf4(checks, &w, dtype)?;
    let (lora, glora) = loras(checks, (k, n, r), 0.0)?;
    let adapter = DoraAdapter::new(lora.clone(), &weight, "m".into())?;
    let gadapter = DoraAdapter::new(glora.clone(), &gweight, "m".into())?;
    let adapted = |weight, bias, adapter: &DoraAdapter| {
        let linear = Linear::new("l", weight, Some(bias));
        linear.with_adapter("a", Arc::new(adapter.clone())).with_active(Some("a"))
    };
    let (linear, glinear) = (adapted(weight, bias, &adapter), adapted(gweight, gbias, &gadapter));
    checks.poison(1 << 22)?;
    let (mut cpu, mut gpu) = batch.runs(checks);
    let (what, t) = (format!("DoRA on NF4 {dtype:?}"), 2.0 * tolerance(dtype));
    let (got, want) = (glinear.forward_onto(&gx, &gres, &mut gpu)?, linear.forward_onto(&x, &res, &mut cpu)?);
    checks.close(&what, &got, &want, t)?;
    let (got, want) = (glinear.backward(&gdy, true, &mut gpu)?, linear.backward(&dy, true, &mut cpu)?);
    if let (Some(got), Some(want)) = (got, want) {
        checks.close(&format!("{what}: dx"), &got, &want, t)?;
    }
    let half = |t: &Tensor| t * f64::from(scalars.grad_scale);
    checks.close(&format!("{what}: dA"), glora.a.grad(), &half(lora.a.grad())?, t)?;
    checks.close(&format!("{what}: dB"), glora.b.grad(), &half(lora.b.grad())?, t)?;
    checks.close(&format!("{what}: dm"), gadapter.magnitude.grad(), &half(adapter.magnitude.grad())?, t)
}

/// A head and embeddings that learn whole: tokens that come again, padding, a table of an odd size.
fn saved_modules(checks: &mut Checks, dtype: DType) -> Result<()> {
    let (m, c, vocab) = (300, 136, 77);
    let scalars = Scalars { grad_scale: 0.5, ..ONE };
    let mut batch = Batch::new(checks, m, vocab, dtype, scalars)?;
    batch.set_ids(checks, vocab)?;
    let (x, gx) = pair(checks, &[m, c], dtype, 1.0)?;
    let (dy, gdy) = pair(checks, &[m, vocab], dtype, 1.0)?;
    let (w, gw) = pair(checks, &[vocab, c], dtype, 0.3)?;
    let (weight, gweight) = (Param::new("w", &w)?, Param::new("w", &gw)?);
    checks.poison(1 << 22)?;
    let (mut cpu, mut gpu) = batch.runs(checks);
    let (what, t) = (format!("saved modules {dtype:?}"), tolerance(dtype));
    let linear = |weight: &Tensor, copy: &Param| {
        let linear = Linear::new("l", Weight::Dense(weight.clone()), None);
        linear.with_adapter("a", Arc::new(SavedModule { weight: copy.clone() })).with_active(Some("a"))
    };
    let (head, ghead) = (linear(&w, &weight), linear(&gw, &gweight));
    checks.close(&what, &ghead.forward(&gx, &mut gpu)?, &head.forward(&x, &mut cpu)?, t)?;
    let (got, want) = (ghead.backward(&gdy, true, &mut gpu)?, head.backward(&dy, true, &mut cpu)?);
    if let (Some(got), Some(want)) = (got, want) {
        checks.close(&format!("{what}: dx"), &got, &want, t)?;
    }
    let half = |t: &Tensor| t * f64::from(scalars.grad_scale);
    checks.close(&format!("{what}: dW"), gweight.grad(), &half(weight.grad())?, t)?;

    let embedding = |table: &Tensor, copy: &Param| {
        let mut embedding = Embedding::new("e".into(), table.clone(), Some(3));
        embedding.copies.push("a", copy.clone());
        embedding.copies.activate(Some("a"));
        embedding
    };
    let (table, gtable) = (embedding(&w, &weight), embedding(&gw, &gweight));
    let (got, want) = (gtable.forward(&gpu)?, table.forward(&cpu)?);
    checks.close(&format!("{what}: embeddings"), &got.narrow(0, 0, m)?, &want, t)?;
    [&weight, &gweight].into_iter().try_for_each(|param| param.zero_grad())?;
    // As in a pass: rows that are padding have no gradient.
    let gdx = Tensor::zeros(got.dims(), dtype, &checks.device)?;
    gdx.slice_set(&gx, 0, 0)?;
    (table.backward(&x, &cpu)?, gtable.backward(&gdx, &gpu)?);
    checks.close(&format!("{what}: d embeddings"), gweight.grad(), &half(weight.grad())?, 1e-6)
}

fn loss(checks: &mut Checks, dtype: DType) -> Result<()> {
    for (m, c, vocab) in [(70, 64, 1000), (300, 128, 777), (700, 64, 200)] {
        let batch = Batch::new(checks, m, vocab, dtype, Scalars { loss_scale: 4.0, ..ONE })?;
        let (x, gx) = pair(checks, &[m, c], dtype, 1.0)?;
        let (w, gw) = pair(checks, &[vocab, c], dtype, 0.3)?;
        // As the loader does it: a table whose memory goes on with zeros.
        let padded = Tensor::zeros((vocab.next_multiple_of(64), c), dtype, &checks.device)?;
        padded.slice_set(&gw, 0, 0)?;
        let head = Linear::new("head", Weight::Dense(w), None);
        let ghead = Linear::new("head", Weight::Dense(padded.narrow(0, 0, vocab)?), None);
        checks.poison(1 << 22)?;
        let (mut cpu, mut gpu) = batch.runs(checks);
        let (got, want) = (head_and_loss(&gx, &ghead, true, &mut gpu)?, head_and_loss(&x, &head, true, &mut cpu)?);
        let sum = batch.losses.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
        let what = format!("cross_entropy {dtype:?} [{m}, {c}] to {vocab}");
        let scalar = |v: f64| Tensor::new(&[v], &Device::Cpu);
        checks.close(&what, &scalar(sum)?, &scalar(cpu.loss_sum)?, tolerance(dtype) / 4.0)?;
        match (got, want) {
            (Some(got), Some(want)) => checks.close(&format!("{what}, gradient"), &got, &want, tolerance(dtype))?,
            _ => checks.fail(&what, "no gradient"),
        }
    }
    Ok(())
}

fn rope(checks: &mut Checks, dtype: DType) -> Result<()> {
    let (layout, m) = (HeadLayout::grouped(4, 2, 64), 130);
    let rope = Rope::new(Rope::frequencies(10_000.0, 64));
    let batch = Batch::new(checks, m, 9, dtype, ONE)?;
    let (q, gq) = pair(checks, &[m, 256], dtype, 1.0)?;
    let (k, gk) = pair(checks, &[m, 128], dtype, 1.0)?;
    let (v, gv) = pair(checks, &[m, 128], dtype, 1.0)?;
    checks.poison(1 << 20)?;
    let (cpu, gpu) = batch.runs(checks);
    let got = rope.join([&gq, &gk, &gv], &layout, &gpu)?;
    let want = rope.join([&q, &k, &v], &layout, &cpu)?;
    checks.close(&format!("rope {dtype:?}"), &got, &want, tolerance(dtype))?;
    let back = rope.split(&got, &layout, &gpu)?;
    for (name, back, x) in [("q", &back[0], &q), ("k", &back[1], &k), ("v", &back[2], &v)] {
        checks.close(&format!("rope {dtype:?} and back, {name}"), back, x, tolerance(dtype))?;
    }
    Ok(())
}

//! Every layer's forward and backward on the card against the CPU's, which computes in f32.
//!
//! Both get the same numbers, rounded to the card's dtype first. An error is a norm's share of the
//! whole; the tolerances are a few times the dtype's rounding.

use qlora_nb::{
    candle_core::{DType, Device, Tensor},
    cuda::{self, HostInputs, Inputs, Scalars},
    error::Result,
    layers::{
        attention::{Attention, HeadLayout, alibi_slopes},
        cross_entropy::head_and_loss,
        gelu,
        layer_norm::LayerNorm,
        linear::{Linear, Lora, Weight},
        param::Param,
        rms_norm::RmsNorm,
        rope::Rope,
        run::Run,
        sequences::Sequences,
        swiglu,
    },
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

/// A batch of sequences of random lengths, `m` tokens in all, with labels on about half.
fn batch(checks: &mut Checks, m: usize, vocab: usize) -> (Sequences, Vec<i64>) {
    let mut lengths = Vec::new();
    let mut left = m;
    while left > 0 {
        let n = (1 + checks.rng.below(150)).min(left);
        lengths.push(n);
        left -= n;
    }
    let mut target = |_| if checks.rng.below(2) == 0 { -100 } else { checks.rng.below(vocab) as i64 };
    let targets = (0..m).map(&mut target).collect();
    (Sequences::new(lengths), targets)
}

fn inputs(checks: &Checks, sequences: &Sequences, targets: &[i64], scalars: Scalars) -> Result<Inputs> {
    let ids = vec![0u32; sequences.num_tokens()];
    let host = HostInputs { ids: &ids, targets, sequences, cache: None, scalars, draws: &[] };
    let inputs = Inputs::new(&checks.gpu, host.shape(false))?;
    inputs.fill(&checks.gpu, &host)?;
    Ok(inputs)
}

const ONE: Scalars = Scalars { dropout_key: 77, grad_scale: 1.0, loss_scale: 1.0 };

fn norms(checks: &mut Checks, dtype: DType) -> Result<()> {
    for (m, c) in [(5, 64), (37, 2048), (3, 100), (2, 4104)] {
        let (sequences, targets) = batch(checks, m, 9);
        let inputs = inputs(checks, &sequences, &targets, ONE)?;
        let (x, gx) = pair(checks, &[m, c], dtype, 2.0)?;
        let (dy, gdy) = pair(checks, &[m, c], dtype, 1.0)?;
        let (r, gr) = pair(checks, &[m, c], dtype, 1.0)?;
        let (w, gw) = pair(checks, &[c], dtype, 1.0)?;
        let (b, gb) = pair(checks, &[c], dtype, 1.0)?;
        checks.poison(1 << 22)?;
        let mut cpu = Run::training(&sequences, None);
        let mut gpu = Run { inputs: Some(&inputs), ..Run::training(&sequences, None) };
        let (norm, gnorm) = (LayerNorm::new(w.clone(), b, 1e-5)?, LayerNorm::new(gw.clone(), gb, 1e-5)?);
        let what = format!("layer_norm {dtype:?} [{m}, {c}]");
        let t = tolerance(dtype);
        checks.close(&what, &gnorm.forward(&gx, &mut gpu)?, &norm.forward(&x, &mut cpu)?, t)?;
        let (got, want) = (gnorm.backward(&gdy, Some(&gr), &mut gpu)?, norm.backward(&dy, Some(&r), &mut cpu)?);
        checks.close(&format!("{what} backward"), &got, &want, t)?;
        let (norm, gnorm) = (RmsNorm::new(w, 1e-5)?, RmsNorm::new(gw, 1e-5)?);
        let what = format!("rms_norm {dtype:?} [{m}, {c}]");
        checks.close(&what, &gnorm.forward(&gx, &mut gpu)?, &norm.forward(&x, &mut cpu)?, t)?;
        let (got, want) = (gnorm.backward(&gdy, None, &mut gpu)?, norm.backward(&dy, None, &mut cpu)?);
        checks.close(&format!("{what} backward"), &got, &want, t)?;
    }
    Ok(())
}

fn activations(checks: &mut Checks, dtype: DType) -> Result<()> {
    let (m, c) = (19, 1000);
    let (sequences, targets) = batch(checks, m, 9);
    let inputs = inputs(checks, &sequences, &targets, ONE)?;
    let (x, gx) = pair(checks, &[m, c], dtype, 3.0)?;
    let (u, gu) = pair(checks, &[m, c], dtype, 1.0)?;
    let (dy, gdy) = pair(checks, &[m, c], dtype, 1.0)?;
    checks.poison(1 << 20)?;
    let t = tolerance(dtype);
    let mut cpu = Run::training(&sequences, None);
    let mut gpu = Run { inputs: Some(&inputs), ..Run::training(&sequences, None) };
    checks.close(&format!("gelu {dtype:?}"), &gelu::forward(&gx, &mut gpu)?, &gelu::forward(&x, &mut cpu)?, t)?;
    let (got, want) = (gelu::backward(&gdy, &mut gpu)?, gelu::backward(&dy, &mut cpu)?);
    checks.close(&format!("gelu {dtype:?} backward"), &got, &want, t)?;
    let (got, want) = (swiglu::forward(&gx, &gu, &mut gpu)?, swiglu::forward(&x, &u, &mut cpu)?);
    checks.close(&format!("swiglu {dtype:?}"), &got, &want, t)?;
    let (got, want) = (swiglu::backward(&gdy, &mut gpu)?, swiglu::backward(&dy, &mut cpu)?);
    checks.close(&format!("swiglu {dtype:?} backward, gate"), &got.0, &want.0, t)?;
    checks.close(&format!("swiglu {dtype:?} backward, up"), &got.1, &want.1, t)
}

fn attention(checks: &mut Checks, dtype: DType, (heads, kv_heads, d): (usize, usize, usize)) -> Result<()> {
    for (alibi, m) in [(true, 300), (false, 77)] {
        let layout = match heads == kv_heads && alibi {
            true => HeadLayout::interleaved(heads, d),
            false => HeadLayout::grouped(heads, kv_heads, d),
        };
        let attention = Attention { layout, slopes: if alibi { alibi_slopes(heads) } else { Vec::new() } };
        let (sequences, targets) = batch(checks, m, 9);
        let inputs = inputs(checks, &sequences, &targets, ONE)?;
        let (x, gx) = pair(checks, &[m, layout.row], dtype, 1.0)?;
        let (dy, gdy) = pair(checks, &[m, heads * d], dtype, 1.0)?;
        checks.poison(1 << 22)?;
        let mut cpu = Run::training(&sequences, None);
        let mut gpu = Run { inputs: Some(&inputs), ..Run::training(&sequences, None) };
        let what = format!("attention {dtype:?} {heads}/{kv_heads} heads of {d}, alibi {alibi}");
        let (got, want) = (attention.forward(&gx, &mut gpu)?, attention.forward(&x, &mut cpu)?);
        checks.close(&what, &got, &want, tolerance(dtype))?;
        let (got, want) = (attention.backward(&gdy, &mut gpu)?, attention.backward(&dy, &mut cpu)?);
        checks.close(&format!("{what}, backward"), &got, &want, 2.0 * tolerance(dtype))?;
    }
    Ok(())
}

fn linear(checks: &mut Checks, dtype: DType, (m, k, n): (usize, usize, usize), r: usize, dropout: f64) -> Result<()> {
    let (sequences, targets) = batch(checks, m, 9);
    let scalars = Scalars { grad_scale: 0.5, ..ONE };
    let inputs = inputs(checks, &sequences, &targets, scalars)?;
    let (x, gx) = pair(checks, &[m, k], dtype, 1.0)?;
    let (dy, gdy) = pair(checks, &[m, n], dtype, 1.0)?;
    let (res, gres) = pair(checks, &[m, n], dtype, 1.0)?;
    let (w, _) = pair(checks, &[n, k], dtype, 0.05)?;
    let (bias, gbias) = pair(checks, &[n], dtype, 1.0)?;
    let (a, _) = pair(checks, &[r, k], DType::F32, 0.1)?;
    let (b, _) = pair(checks, &[n, r], DType::F32, 0.1)?;
    let quantized = QuantizedTensor::quantize(&w.to_dtype(dtype)?, QuantType::Nf4, 64, true)?;
    let on_card = QuantizedTensor::quantize(&w.to_dtype(dtype)?.to_device(&checks.device)?, QuantType::Nf4, 64, true)?;
    let lora = |device: &Device| -> Result<Lora> {
        let param = |name: &str, t: &Tensor| Param::new(name, &t.to_device(device)?);
        Ok(Lora { a: param("a", &a)?, b: param("b", &b)?, scaling: 0.7, dropout, id: 5 })
    };
    let cpu_linear = Linear::new("l", Weight::Quantized(quantized), Some(bias)).with_lora(lora(&Device::Cpu)?);
    let gpu_linear = Linear::new("l", Weight::Quantized(on_card), Some(gbias)).with_lora(lora(&checks.device)?);
    checks.poison(1 << 22)?;
    let key = Some(ONE.dropout_key);
    let mut cpu = Run::training(&sequences, key);
    let mut gpu = Run { inputs: Some(&inputs), ..Run::training(&sequences, key) };
    let what = format!("linear NF4 {dtype:?} [{m}, {k}] to {n}, rank {r}, dropout {dropout}");
    let t = tolerance(dtype);
    let (got, want) = (gpu_linear.forward(&gx, Some(&gres), &mut gpu)?, cpu_linear.forward(&x, Some(&res), &mut cpu)?);
    checks.close(&what, &got, &want, t)?;
    let (got, want) = (gpu_linear.backward(&gdy, true, &mut gpu)?, cpu_linear.backward(&dy, true, &mut cpu)?);
    if let (Some(got), Some(want)) = (got, want) {
        checks.close(&format!("{what}: dx"), &got, &want, t)?;
    }
    if let (Some(got), Some(want)) = (&gpu_linear.lora, &cpu_linear.lora) {
        let half = |t: &Tensor| t * f64::from(scalars.grad_scale);
        checks.close(&format!("{what}: dA"), got.a.grad(), &half(want.a.grad())?, t)?;
        checks.close(&format!("{what}: dB"), got.b.grad(), &half(want.b.grad())?, t)?;
    }
    Ok(())
}

fn loss(checks: &mut Checks, dtype: DType) -> Result<()> {
    for (m, c, vocab) in [(70, 64, 1000), (300, 128, 777)] {
        let (sequences, targets) = batch(checks, m, vocab);
        let inputs = inputs(checks, &sequences, &targets, Scalars { loss_scale: 4.0, ..ONE })?;
        let (x, gx) = pair(checks, &[m, c], dtype, 1.0)?;
        let (w, gw) = pair(checks, &[vocab, c], dtype, 0.3)?;
        // As the loader does it: a table whose memory goes on with zeros.
        let padded = Tensor::zeros((vocab.next_multiple_of(64), c), dtype, &checks.device)?;
        padded.slice_set(&gw, 0, 0)?;
        let head = Linear::new("head", Weight::Dense(w), None);
        let ghead = Linear::new("head", Weight::Dense(padded.narrow(0, 0, vocab)?), None);
        checks.poison(1 << 22)?;
        let (sum, count, want) = head_and_loss(&x, &head, &targets, Some(4.0), None)?;
        let outputs = cuda::Outputs::new(&checks.gpu)?;
        let run = Run { inputs: Some(&inputs), ..Run::training(&sequences, None) };
        let got = cuda_loss(&gx, &ghead, outputs.loss()?, &run)?;
        let (gsum, _) = outputs.read(&checks.gpu)?;
        let what = format!("cross_entropy {dtype:?} [{m}, {c}] to {vocab}, {count} labels");
        let scalar = |v: f64| Tensor::new(&[v], &Device::Cpu);
        checks.close(&what, &scalar(gsum)?, &scalar(sum)?, tolerance(dtype) / 4.0)?;
        if let Some(want) = want {
            checks.close(&format!("{what}, gradient"), &got, &want, tolerance(dtype))?;
        }
    }
    Ok(())
}

fn cuda_loss(x: &Tensor, head: &Linear, loss: u64, run: &Run) -> Result<Tensor> {
    let dx = qlora_nb::layers::cuda::head_and_loss(x, head, true, loss, run)?;
    Ok(dx.ok_or_else(|| qlora_nb::candle_core::Error::Msg("no gradient".into()))?)
}

fn rope(checks: &mut Checks, dtype: DType) -> Result<()> {
    let (layout, m) = (HeadLayout::grouped(4, 2, 64), 130);
    let rope = Rope::new(Rope::frequencies(10_000.0, 64));
    let (sequences, targets) = batch(checks, m, 9);
    let inputs = inputs(checks, &sequences, &targets, ONE)?;
    let (q, gq) = pair(checks, &[m, 256], dtype, 1.0)?;
    let (k, gk) = pair(checks, &[m, 128], dtype, 1.0)?;
    let (v, gv) = pair(checks, &[m, 128], dtype, 1.0)?;
    checks.poison(1 << 20)?;
    let cpu = Run::training(&sequences, None);
    let gpu = Run { inputs: Some(&inputs), ..Run::training(&sequences, None) };
    let got = rope.join(&gq, &gk, &gv, &layout, &gpu)?;
    let want = rope.join(&q, &k, &v, &layout, &cpu)?;
    checks.close(&format!("rope {dtype:?}"), &got, &want, tolerance(dtype))?;
    let back = rope.split(&got, &layout, &gpu)?;
    for (name, back, x) in [("q", &back[0], &q), ("k", &back[1], &k), ("v", &back[2], &v)] {
        checks.close(&format!("rope {dtype:?} and back, {name}"), back, x, tolerance(dtype))?;
    }
    Ok(())
}

//! The CPU's operations against the oracle, on random shapes and numbers.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::{
    Attends, Backend, Linears, Norms, Tokens,
    cpu::Cpu,
    kv_cache::KvCache,
    operands::{Around, Attention, Frozen, HeadLayout, Input, Lora, Norm, Rope, Weight},
    oracle::{self, Matrix},
    param::Param,
    run::{Run, Saved},
    sequences::Sequences,
};
use crate::quantized::{QuantType, QuantizedTensor};

/// Numbers that depend on `seed` alone, between -1 and 1.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn tensor(rows: usize, columns: usize, seed: u64) -> Tensor {
    Tensor::from_vec(numbers(rows * columns, seed), (rows, columns), &Device::Cpu).unwrap()
}

fn matrix(t: &Tensor) -> Matrix {
    let data: Vec<f32> = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    Matrix::new(*t.dims().last().unwrap(), &data)
}

/// Sums of `terms` products of f32 numbers that are about 1 at the most.
fn close(got: &Tensor, want: &Matrix, terms: usize, what: &str) -> Result<(), TestCaseError> {
    let got = matrix(got);
    prop_assert_eq!(got.data.len(), want.data.len(), "{}: its size", what);
    let bound = 1e-6 * (1.0 + terms as f64).sqrt();
    for (i, (got, want)) in got.data.iter().zip(&want.data).enumerate() {
        prop_assert!(
            (got - want).abs() <= bound * (1.0 + want.abs()),
            "{}, element {}: {} is not {}",
            what,
            i,
            got,
            want
        );
    }
    Ok(())
}

/// A run over packed sequences, and what `work` makes of it.
fn with_run<R>(lengths: &[usize], cache: Option<&mut KvCache>, work: impl FnOnce(&mut Run) -> R) -> R {
    let sequences = Sequences::new(lengths.iter().copied());
    let ids = vec![0; sequences.num_tokens()];
    let mut run = Run::new(&Cpu as &dyn Backend, &Tokens { ids: &ids, targets: &[], sequences: &sequences });
    (run.saved, run.cache) = (Some(Saved::default()), cache);
    work(&mut run)
}

fn ranges(lengths: &[usize]) -> Vec<Range<usize>> {
    Sequences::new(lengths.iter().copied()).ranges().collect()
}

prop_compose! {
    fn attentions()(
        (heads, kv_heads) in prop_oneof![Just((1, 1)), Just((4, 4)), Just((4, 2)), Just((6, 1))],
        head_dim in prop_oneof![Just(2usize), Just(8), Just(24)],
        interleaved in any::<bool>(),
        alibi in any::<bool>(),
        window in prop_oneof![Just(None), (1usize..150).prop_map(Some)],
    ) -> Attention {
        let layout = match interleaved && heads == kv_heads {
            true => HeadLayout::interleaved(heads, head_dim),
            false => HeadLayout::grouped(heads, kv_heads, head_dim),
        };
        let slopes = (0..if alibi { heads } else { 0 }).map(|h| 0.5f32.powi(h as i32 + 1)).collect();
        Attention { layout, slopes, window }
    }
}

fn norm_of(c: usize, bias: bool, seed: u64) -> Norm {
    let vector = |seed| Tensor::from_vec(numbers(c, seed), c, &Device::Cpu).unwrap();
    Norm::new(vector(seed), bias.then(|| vector(seed + 1)), 1e-5).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 64 }, failure_persistence: None, ..Default::default() })]

    #[test]
    fn attention_is_three_loops(
        attention in attentions(),
        lengths in proptest::collection::vec(1usize..201, 1..3),
        seed in any::<u64>(),
    ) {
        let m = lengths.iter().sum();
        let (x, dy) = (tensor(m, attention.layout.row, seed), tensor(m, attention.layout.width(), seed ^ 1));
        with_run(&lengths, None, |run| {
            let y = Cpu.attention(&attention, &x, run).unwrap();
            close(&y, &oracle::attention(&attention, &matrix(&x), &ranges(&lengths)), 400, "y")?;
            let dx = Cpu.attention_backward(&attention, &dy, run).unwrap();
            let want = oracle::attention_backward(&attention, &matrix(&x), &matrix(&dy), &ranges(&lengths));
            close(&dx, &want, 2000, "dx")
        })?;
    }

    /// However the tokens of two sequences are cut into passes, a cache gives what one pass gives.
    #[test]
    fn attention_with_a_cache_is_attention(
        attention in attentions(),
        parts in proptest::collection::vec((1usize..70, 1usize..40), 1..4),
        seed in any::<u64>(),
    ) {
        let l = attention.layout;
        let totals = [parts.iter().map(|p| p.0).sum::<usize>(), parts.iter().map(|p| p.1).sum()];
        let x = tensor(totals[0] + totals[1], l.row, seed);
        let want = oracle::attention(&attention, &matrix(&x), &ranges(&totals));
        let mut cache = KvCache::new(1, 2, l.kv_width(), DType::F32, &Device::Cpu).unwrap();
        let mut done = [0, totals[0]];
        for new in parts.iter().map(|p| [p.0, p.1]) {
            cache.reserve(&new).unwrap();
            let piece = |i: usize| x.narrow(0, done[i], new[i]).unwrap();
            let piece = Tensor::cat(&[piece(0), piece(1)], 0).unwrap();
            let y = with_run(&new, Some(&mut cache), |run| Cpu.attention(&attention, &piece, run).unwrap());
            let width = l.width();
            let rows = [done[0]..done[0] + new[0], done[1]..done[1] + new[1]];
            let data = rows.iter().flat_map(|r| want.data[r.start * width..r.end * width].to_vec()).collect();
            close(&y, &Matrix { columns: width, data }, 400, "y")?;
            cache.advance(&new);
            done = [done[0] + new[0], done[1] + new[1]];
        }
    }

    #[test]
    fn norms_are_their_formulas(
        (m, c) in (1usize..5, 1usize..200),
        bias in any::<bool>(),
        scale in prop_oneof![Just(1.0f64), Just(1e-3), Just(30.0)],
        seed in any::<u64>(),
    ) {
        let norm = norm_of(c, bias, seed);
        let x = (tensor(m, c, seed ^ 2) * scale).unwrap();
        let (dy, residual) = (tensor(m, c, seed ^ 3), tensor(m, c, seed ^ 4));
        let (weight, b) = (matrix(&norm.weight).data, norm.bias.as_ref().map(|b| matrix(b).data));
        with_run(&[m], None, |run| {
            let y = Cpu.norm(&norm, &x, run).unwrap();
            // Of one column, layer normalization is the noise of a difference.
            if c > 1 || !bias {
                close(&y, &oracle::norm(&matrix(&x), &weight, b.as_deref(), 1e-5), 100, "y")?;
            }
            let dx = Cpu.norm_backward(&norm, &dy, Some(&residual), run).unwrap();
            let want = oracle::norm_backward(&matrix(&x), &weight, bias, 1e-5, &matrix(&dy)).plus(1.0, &matrix(&residual));
            // Gradients grow as the rows shrink.
            let dx = (dx * scale.min(1.0)).unwrap();
            let want = Matrix { data: want.data.iter().map(|v| v * scale.min(1.0)).collect(), ..want };
            if c > 3 { close(&dx, &want, 2000, "dx") } else { Ok(()) }
        })?;
    }

    #[test]
    fn rope_turns_complex_numbers(
        lengths in proptest::collection::vec(1usize..90, 1..4),
        head_dim in (1usize..17).prop_map(|half| 2 * half),
        seed in any::<u64>(),
    ) {
        let (layout, m) = (HeadLayout::grouped(3, 1, head_dim), lengths.iter().sum());
        let rope = Rope::new(Rope::frequencies(10_000.0, head_dim));
        let positions: Vec<usize> = lengths.iter().flat_map(|n| 0..*n).collect();
        let qkv = [(3, 5), (1, 6), (1, 7)].map(|(heads, at)| tensor(m, heads * head_dim, seed ^ at));
        let mut want = Matrix::zeros(m, layout.row);
        for (i, (x, place)) in qkv.iter().zip([&layout.q, &layout.k, &layout.v]).enumerate() {
            let x = matrix(x);
            let turned = if i == 2 { x } else { oracle::rotated(&x, head_dim, &positions, &rope.inv_freq, 1.0) };
            oracle::put(&turned, &layout, place, &mut want);
        }
        with_run(&lengths, None, |run| {
            let joined = Cpu.rope(&rope, qkv.each_ref(), &layout, run).unwrap();
            close(&joined, &want, 1, "turned")?;
            let back = Cpu.rope_backward(&rope, &joined, &layout, run).unwrap();
            (0..3).try_for_each(|i| close(&back[i], &matrix(&qkv[i]), 4, "turned back"))
        })?;
    }

    /// A dense or quantized weight, with or without bias, LoRA, residual and gelu.
    #[test]
    fn linear_layers_are_products(
        (m, n, k) in (1usize..70, 1usize..100, 1usize..150),
        kind in 0usize..8,
        (bias, lora, residual, gelu) in any::<(bool, bool, bool, bool)>(),
        seed in any::<u64>(),
    ) {
        let dense = tensor(n, k, seed);
        let weight = match kind {
            0 => Weight::Dense(dense.clone()),
            1 => Weight::Dense(dense.to_dtype(DType::F16).unwrap()),
            2 => Weight::Dense(dense.to_dtype(DType::BF16).unwrap()),
            kind => {
                let quant_type = QuantType::ALL[kind % QuantType::ALL.len()];
                Weight::Quantized(QuantizedTensor::quantize(&dense, quant_type, 64, kind % 2 == 0).unwrap())
            }
        };
        let w = matrix(&weight.dequantize().unwrap());
        let bias = bias.then(|| Tensor::from_vec(numbers(n, seed ^ 8), n, &Device::Cpu).unwrap());
        let param = |name: &str, rows, columns, at| Param::new(name, &tensor(rows, columns, seed ^ at)).unwrap();
        let lora = lora.then(|| {
            Lora { a: param("a", 3, k, 9), b: param("b", n, 3, 10), scaling: 0.5, dropout: 0.0, id: 0 }
        });
        let (x, dy, r) = (tensor(m, k, seed ^ 11), tensor(m, n, seed ^ 12), tensor(m, n, seed ^ 13));
        let frozen = Frozen { weight, bias, compute_dtype: None };
        let around = Around { residual: residual.then_some(&r), gelu, logits: false };
        let [xm, dym] = [&x, &dy].map(matrix);
        let mut want = xm.times(&w.transposed());
        if let Some(bias) = &frozen.bias {
            let bias = matrix(bias);
            want.data.chunks_exact_mut(n).for_each(|row| row.iter_mut().zip(&bias.data).for_each(|(v, b)| *v += b));
        }
        let matrices = lora.as_ref().map(|l| (matrix(l.a.value()), matrix(l.b.value())));
        if let Some((a, b)) = &matrices {
            want = want.plus(0.5, &xm.times(&a.transposed()).times(&b.transposed()));
        }
        if residual {
            want = want.plus(1.0, &matrix(&r));
        }
        with_run(&[m], None, |run| {
            let y = Cpu.linear(&frozen, lora.as_ref(), &Input::Plain(&x), &around, run).unwrap();
            if gelu {
                want.data.iter_mut().for_each(|v| *v = oracle::gelu(*v));
                run.take("gelu: input").unwrap();
            }
            close(&y, &want, 4 * k, "y")?;
            let dx = Cpu.linear_backward(&frozen, lora.as_ref(), &dy, true, run).unwrap().unwrap();
            let mut want = dym.times(&w);
            if let (Some(lora), Some((a, b))) = (&lora, &matrices) {
                let through = dym.times(b);
                want = want.plus(0.5, &through.times(a));
                let zero = |t: &Tensor| Matrix::zeros(t.dims()[0], t.dims()[1]);
                let da = zero(lora.a.value()).plus(0.5, &through.transposed().times(&xm));
                let db = zero(lora.b.value()).plus(0.5, &dym.transposed().times(&xm.times(&a.transposed())));
                close(lora.a.grad(), &da, 4 * m * n, "the gradient of A")?;
                close(lora.b.grad(), &db, 4 * m * k, "the gradient of B")?;
            }
            close(&dx, &want, 4 * n, "dx")
        })?;
    }

    #[test]
    fn softmax_is_its_formula(n in 1usize..300, scale in 0.1f32..40.0, seed in any::<u64>()) {
        let mut x: Vec<f32> = numbers(n, seed).iter().map(|v| v * scale).collect();
        let want = oracle::softmax(&x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
        super::cpu::math::softmax(&mut x);
        for (got, want) in x.iter().zip(want) {
            prop_assert!((f64::from(*got) - want).abs() < 1e-6 * (want + 1e-3), "{} is not {}", got, want);
        }
    }
}

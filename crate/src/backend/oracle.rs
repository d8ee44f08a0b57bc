//! What operations are by their definition: plain loops in f64, one element at a time. The fast code is held to it.

use std::ops::Range;

use super::operands::{Attention, HeadLayout, Place};

/// A matrix `[rows, columns]`, row after row.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub columns: usize,
    pub data: Vec<f64>,
}

impl Matrix {
    pub fn new(columns: usize, data: &[f32]) -> Self {
        Self { columns, data: data.iter().map(|v| f64::from(*v)).collect() }
    }

    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self { columns, data: vec![0.0; rows * columns] }
    }

    pub fn rows(&self) -> usize {
        self.data.len() / self.columns
    }

    pub fn at(&self, row: usize, column: usize) -> f64 {
        self.data[row * self.columns + column]
    }

    pub fn at_mut(&mut self, row: usize, column: usize) -> &mut f64 {
        &mut self.data[row * self.columns + column]
    }

    pub fn transposed(&self) -> Self {
        let mut t = Self::zeros(self.columns, self.rows());
        (0..self.rows()).for_each(|i| (0..self.columns).for_each(|j| *t.at_mut(j, i) = self.at(i, j)));
        t
    }

    /// self times `other`, in three loops.
    pub fn times(&self, other: &Self) -> Self {
        let mut product = Self::zeros(self.rows(), other.columns);
        for i in 0..self.rows() {
            for j in 0..other.columns {
                *product.at_mut(i, j) = (0..self.columns).map(|k| self.at(i, k) * other.at(k, j)).sum();
            }
        }
        product
    }

    /// self + `factor` * `other`, of one shape.
    pub fn plus(mut self, factor: f64, other: &Self) -> Self {
        assert_eq!((self.rows(), self.columns), (other.rows(), other.columns), "shapes of a sum");
        self.data.iter_mut().zip(&other.data).for_each(|(a, b)| *a += factor * b);
        self
    }
}

pub fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = x.iter().map(|v| (v - max).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.iter().map(|e| e / sum).collect()
}

/// The keys that token `i` of a sequence sees, and with what weights.
fn seen(attention: &Attention, x: &Matrix, sequence: &Range<usize>, head: usize, i: usize) -> (Range<usize>, Vec<f64>) {
    let l = &attention.layout;
    let first = attention.window.map_or(0, |window| (i + 1).saturating_sub(window));
    let score = |j: usize| {
        let qk = |c: usize| {
            let (q, k) = (l.q.at(head) + c, l.k.at(head * l.kv_heads / l.heads) + c);
            x.at(sequence.start + i, q) * x.at(sequence.start + j, k)
        };
        let slope = attention.slopes.get(head).map_or(0.0, |slope| f64::from(*slope));
        (0..l.head_dim).map(qk).sum::<f64>() / (l.head_dim as f64).sqrt() + slope * j as f64
    };
    (first..i + 1, softmax(&(first..i + 1).map(score).collect::<Vec<_>>()))
}

/// Causal attention of packed sequences; x is the fused projection, `[M, row]`. Gives `[M, heads * head_dim]`.
pub fn attention(attention: &Attention, x: &Matrix, sequences: &[Range<usize>]) -> Matrix {
    let l = &attention.layout;
    let mut y = Matrix::zeros(x.rows(), l.width());
    for sequence in sequences {
        for head in 0..l.heads {
            let v = l.v.at(head * l.kv_heads / l.heads);
            for i in 0..sequence.len() {
                let (keys, weights) = seen(attention, x, sequence, head, i);
                for (j, weight) in keys.zip(weights) {
                    for c in 0..l.head_dim {
                        *y.at_mut(sequence.start + i, head * l.head_dim + c) +=
                            weight * x.at(sequence.start + j, v + c);
                    }
                }
            }
        }
    }
    y
}

/// dy to the gradient of x.
pub fn attention_backward(attention: &Attention, x: &Matrix, dy: &Matrix, sequences: &[Range<usize>]) -> Matrix {
    let l = &attention.layout;
    let scale = 1.0 / (l.head_dim as f64).sqrt();
    let mut dx = Matrix::zeros(x.rows(), x.columns);
    for sequence in sequences {
        for head in 0..l.heads {
            let kv = head * l.kv_heads / l.heads;
            let (q, k, v) = (l.q.at(head), l.k.at(kv), l.v.at(kv));
            for i in 0..sequence.len() {
                let row = sequence.start + i;
                let (keys, weights) = seen(attention, x, sequence, head, i);
                let dweight = |j: usize| {
                    (0..l.head_dim).map(|c| dy.at(row, head * l.head_dim + c) * x.at(sequence.start + j, v + c)).sum()
                };
                let dweights: Vec<f64> = keys.clone().map(dweight).collect();
                let mean: f64 = weights.iter().zip(&dweights).map(|(w, d)| w * d).sum();
                for ((j, weight), dweight) in keys.zip(&weights).zip(&dweights) {
                    let (other, dscore) = (sequence.start + j, weight * (dweight - mean) * scale);
                    for c in 0..l.head_dim {
                        *dx.at_mut(other, v + c) += weight * dy.at(row, head * l.head_dim + c);
                        *dx.at_mut(row, q + c) += dscore * x.at(other, k + c);
                        *dx.at_mut(other, k + c) += dscore * x.at(row, q + c);
                    }
                }
            }
        }
    }
    dx
}

/// Layer normalization with a bias, RMS normalization without.
pub fn norm(x: &Matrix, weight: &[f64], bias: Option<&[f64]>, eps: f64) -> Matrix {
    let mut y = x.clone();
    for row in y.data.chunks_exact_mut(x.columns) {
        let (centre, rstd) = statistics(row, bias.is_some(), eps);
        for (c, v) in row.iter_mut().enumerate() {
            *v = (*v - centre) * rstd * weight[c] + bias.map_or(0.0, |bias| bias[c]);
        }
    }
    y
}

/// What is taken away from a row, and what the rest is multiplied by.
fn statistics(row: &[f64], centres: bool, eps: f64) -> (f64, f64) {
    let n = row.len() as f64;
    let centre = if centres { row.iter().sum::<f64>() / n } else { 0.0 };
    let variance = row.iter().map(|v| (v - centre) * (v - centre)).sum::<f64>() / n;
    (centre, 1.0 / (variance + eps).sqrt())
}

/// dy to dx.
pub fn norm_backward(x: &Matrix, weight: &[f64], centres: bool, eps: f64, dy: &Matrix) -> Matrix {
    let (mut dx, n) = (x.clone(), x.columns as f64);
    for (row, dy) in dx.data.chunks_exact_mut(x.columns).zip(dy.data.chunks_exact(x.columns)) {
        let (centre, rstd) = statistics(row, centres, eps);
        let normed: Vec<f64> = row.iter().map(|v| (v - centre) * rstd).collect();
        let scaled: Vec<f64> = dy.iter().zip(weight).map(|(dy, w)| dy * w).collect();
        let along = scaled.iter().zip(&normed).map(|(s, v)| s * v).sum::<f64>() / n;
        let mean = if centres { scaled.iter().sum::<f64>() / n } else { 0.0 };
        for ((v, s), normed) in row.iter_mut().zip(&scaled).zip(&normed) {
            *v = rstd * (s - mean - normed * along);
        }
    }
    dx
}

/// The elements i and i + head_dim / 2 of each head are the parts of a complex number, which is turned by `angle(i)` a
/// position; back with `sign` -1.
pub fn rotated(x: &Matrix, head_dim: usize, positions: &[usize], inv_freq: &[f32], sign: f64) -> Matrix {
    let mut y = x.clone();
    for (row, position) in positions.iter().enumerate() {
        for head in 0..x.columns / head_dim {
            for (i, frequency) in inv_freq.iter().enumerate() {
                let (a, b) = (head * head_dim + i, head * head_dim + i + head_dim / 2);
                // The angle is rounded to f32, as in transformers.
                let (sin, cos) = f64::from(*position as f32 * frequency).sin_cos();
                let (re, im) = (x.at(row, a), x.at(row, b));
                (*y.at_mut(row, a), *y.at_mut(row, b)) = (re * cos - sign * im * sin, im * cos + sign * re * sin);
            }
        }
    }
    y
}

/// BLOOM's gelu, with the hyperbolic tangent.
pub fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + (0.797_884_56 * x * (1.0 + 0.044_715 * x * x)).tanh())
}

/// Copies the heads of one kind into the rows of a fused projection.
pub fn put(x: &Matrix, layout: &HeadLayout, place: &Place, into: &mut Matrix) {
    for row in 0..x.rows() {
        for c in 0..x.columns {
            *into.at_mut(row, place.at(c / layout.head_dim) + c % layout.head_dim) = x.at(row, c);
        }
    }
}

//! torch.optim.AdamW in a few plain lines, so that the engine's gradients are tested apart
//! from the library's own optimizer.

use candle_core::{Device, Tensor};
use qlora_nb::internals::backend::param::Param;
use qlora_nb_tests::values;

pub struct PlainAdamW {
    params: Vec<Param>,
    moments: Vec<(Vec<f64>, Vec<f64>)>,
    weight_decay: f64,
    t: i32,
}

impl PlainAdamW {
    pub fn new(params: &[Param], weight_decay: f64) -> Self {
        let zeros = |p: &Param| (vec![0.0; p.value().elem_count()], vec![0.0; p.value().elem_count()]);
        Self { moments: params.iter().map(zeros).collect(), params: params.to_vec(), weight_decay, t: 0 }
    }

    pub fn step(&mut self, lr: f64, grad_scale: f64) {
        self.t += 1;
        let (b1, b2, eps) = (0.9, 0.999, 1e-8);
        for (p, (m, v)) in self.params.iter().zip(&mut self.moments) {
            let mut w = values(p.value());
            for (i, g) in values(p.grad()).into_iter().map(|g| g * grad_scale).enumerate() {
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let m_hat = m[i] / (1.0 - b1.powi(self.t));
                let v_hat = v[i] / (1.0 - b2.powi(self.t));
                w[i] = w[i] * (1.0 - lr * self.weight_decay) - lr * m_hat / (v_hat.sqrt() + eps);
            }
            let w: Vec<f32> = w.into_iter().map(|w| w as f32).collect();
            p.set(&Tensor::from_vec(w, p.value().dims(), &Device::Cpu).unwrap()).unwrap();
        }
    }
}

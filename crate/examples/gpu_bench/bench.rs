//! Measuring: by the card's events around several launches, or by the host's clock until all is done.

use std::time::Instant;

use qlora_nb::{
    candle_core::{Device, Error as TensorError, cuda_backend::cudarc::driver::sys::CUevent_flags},
    error::Result,
    internals::backend::cuda::{self, Gpu},
};

const SAMPLES: usize = 31;
/// Launches between two events: their own cost, and the wait for the first launch, are shared among them.
const LAUNCHES: usize = 20;

pub struct Bench {
    pub gpu: &'static Gpu,
    pub device: Device,
}

/// Microseconds.
pub struct Time {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Time {
    fn new(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self { median: samples[samples.len() / 2], least: samples[0], most: samples[samples.len() - 1] }
    }

    /// One line; `bytes` are those that must move.
    pub fn print(&self, what: &str, bytes: usize) {
        let rate = bytes as f64 / self.median / 1e3;
        println!("{what:44} {:9.1} us ({:.1} to {:.1})  {rate:7.0} GB/s", self.median, self.least, self.most);
    }
}

impl Bench {
    pub fn new() -> Result<Self> {
        let device = cuda::device(0)?;
        Ok(Self { gpu: cuda::of(&device)?, device })
    }

    /// Time on the card of one call of `f`, which must not wait for it. `f` gets 0, 1, 2, ... to
    /// choose its buffers by.
    pub fn card(&self, mut f: impl FnMut(usize) -> Result<()>) -> Result<Time> {
        let event = || {
            let event = self.gpu.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            event.map_err(|e| TensorError::Msg(e.to_string()))
        };
        let mut samples = Vec::new();
        let mut call = 0;
        for sample in 0..SAMPLES + 3 {
            let begin = event()?;
            for _ in 0..LAUNCHES {
                f(call)?;
                call += 1;
            }
            let end = event()?;
            let ms = begin.elapsed_ms(&end).map_err(|e| TensorError::Msg(e.to_string()))?;
            if sample >= 3 {
                samples.push(f64::from(ms) * 1e3 / LAUNCHES as f64);
            }
        }
        Ok(Time::new(samples))
    }

    /// Time of one call of `f` and all that it launches, by the host's clock.
    pub fn host(&self, mut f: impl FnMut(usize) -> Result<()>) -> Result<Time> {
        let mut samples = Vec::new();
        for sample in 0..SAMPLES + 3 {
            self.gpu.synchronize()?;
            let started = Instant::now();
            f(sample)?;
            self.gpu.synchronize()?;
            if sample >= 3 {
                samples.push(started.elapsed().as_secs_f64() * 1e6);
            }
        }
        Ok(Time::new(samples))
    }
}

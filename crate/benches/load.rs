//! Seconds to load a model from a folder, beside reading its safetensors files by one thread:
//!
//!     QLORA_MODEL=FOLDER cargo bench -p qlora-nb --bench load
//!
//! One JSON line a measurement, the median of five; `scripts/bench` runs it when QLORA_MODEL is set, and the Python stack
//! on the same folder.
//!
//! Seen on 2 cores of an AMD EPYC (Zen 4), the shape of BLOOM-1b4 (2.6 GB in f16, in the page cache):
//! - NF4 with double quantization, a tensor read, converted and then quantized: 4.6 to 6.0 s, the process 50 MiB larger
//!   than the model.
//! - Read in pieces by all threads, each quantized while it is in the cache: 2.2 to 3.8 s, a third of it rounding f16 to
//!   f16 a number at a time. Without: 0.8 to 1.0 s, the process 5 MiB larger than the model.

use std::{fs::File, io::Read, path::PathBuf, time::Instant};

use candle_core::DType;
use qlora_nb::{
    error::{Error, Result},
    model::{AutoModelForCausalLM, BitsAndBytesConfig, DeviceMap, ModelOptions},
};

const REPEATS: usize = 5;

fn main() -> Result<()> {
    let Some(folder) = std::env::var_os("QLORA_MODEL").map(PathBuf::from) else {
        println!("load: skipped; QLORA_MODEL names no folder of a model");
        return Ok(());
    };
    let read = measure("read_by_one_thread", || {
        let entries = std::fs::read_dir(&folder).map_err(Error::io("read", &folder))?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut buffer = vec![0u8; 1 << 20];
        for path in paths.filter(|path| path.extension().is_some_and(|e| e == "safetensors")) {
            let mut file = File::open(&path).map_err(Error::io("read", &path))?;
            while file.read(&mut buffer).map_err(Error::io("read", &path))? > 0 {}
        }
        Ok(())
    })?;
    for (name, load_in_4bit) in [("load_nf4", true), ("load_f16", false)] {
        let loaded = measure(name, || {
            let quantization =
                BitsAndBytesConfig { load_in_4bit, bnb_4bit_use_double_quant: true, ..Default::default() };
            let options = ModelOptions {
                torch_dtype: DType::F16,
                device_map: DeviceMap::Cpu,
                quantization_config: Some(quantization),
                ..Default::default()
            };
            AutoModelForCausalLM::from_pretrained(&folder, options).map(drop)
        })?;
        println!("{name}: {:.2} of reading by one thread", loaded / read);
    }
    Ok(())
}

/// The median, in seconds.
fn measure(name: &str, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut seconds = Vec::new();
    for _ in 0..REPEATS {
        let begin = Instant::now();
        f()?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[REPEATS / 2];
    let spread = (seconds[REPEATS - 1] - seconds[0]) / median;
    println!("{{\"name\": \"{name}\", \"loads_per_s\": {:.4}, \"spread\": {spread:.3}}}", 1.0 / median);
    Ok(median)
}

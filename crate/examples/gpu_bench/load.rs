//! Loading the model in the folder that QLORA_MODEL names to NF4 on the card, beside reading its files.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    time::Instant,
};

use qlora_nb::{
    candle_core::DType,
    error::{Error, Result},
    internals::backend::cuda::Staging,
    model::{AutoModelForCausalLM, BitsAndBytesConfig, DeviceMap, ModelOptions},
};

use crate::bench::Bench;

const REPEATS: usize = 5;

pub fn run(bench: &Bench) -> Result<()> {
    let Some(folder) = std::env::var_os("QLORA_MODEL").map(PathBuf::from) else {
        println!("load: skipped; QLORA_MODEL names no folder of a model");
        return Ok(());
    };
    let entries = std::fs::read_dir(&folder).map_err(Error::io("read", &folder))?;
    let files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |m| m.len() as usize);
    let bytes: usize = files.iter().map(size).sum();
    let one = time("read by one thread", bytes, || files.iter().try_for_each(|path| read(path)))?;
    let staging = Staging::new(bench.gpu)?;
    time("read by many threads", bytes, || {
        files.iter().try_for_each(|path| staging.read(path, 0, size(path), false, &|_| Ok(())))
    })?;
    drop(staging);
    for (name, nf4) in [("f16 on the card", false), ("NF4 on the card", true)] {
        let loaded = time(name, bytes, || {
            let quantization =
                BitsAndBytesConfig { load_in_4bit: true, bnb_4bit_use_double_quant: true, ..Default::default() };
            let options = ModelOptions {
                torch_dtype: DType::F16,
                device_map: DeviceMap::Cuda(0),
                quantization_config: nf4.then_some(quantization),
                ..Default::default()
            };
            AutoModelForCausalLM::from_pretrained(&folder, options)?;
            bench.gpu.synchronize()
        })?;
        println!("{name}: {:.2} of reading by one thread", loaded / one);
    }
    Ok(())
}

/// The median, in seconds.
fn time(what: &str, bytes: usize, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut seconds = Vec::new();
    for _ in 0..REPEATS {
        let begin = Instant::now();
        f()?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let (median, least, most) = (seconds[REPEATS / 2], seconds[0], seconds[REPEATS - 1]);
    let rate = bytes as f64 / median / 1e9;
    println!("{what:44} {median:9.3} s ({least:.3} to {most:.3})  {rate:7.2} GB/s");
    Ok(median)
}

fn read(path: &Path) -> Result<()> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut buffer = vec![0u8; 8 << 20];
    while file.read(&mut buffer).map_err(Error::io("read", path))? > 0 {}
    Ok(())
}

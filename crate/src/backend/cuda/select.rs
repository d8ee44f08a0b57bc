//! Which GPU can be used, and why one cannot.

use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, sys};

use super::{Gpu, gpu};
use crate::error::{Error, Result};

/// The toolkit that this build was made with: `13.0`.
pub const TOOLKIT: &str = env!("QLORA_NB_CUDA_TOOLKIT");

/// The lowest compute capability that the kernels are written for.
const LOWEST: (i32, i32) = (8, 0);

pub(super) fn unusable(ordinal: usize, why: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::UnusableDevice { device: format!("cuda:{ordinal}"), why: why.into(), remedy: remedy.into() }
}

/// Number of GPUs that the driver shows; why there is none.
pub fn count() -> Result<usize> {
    // A binary of this build does not start where there is no driver at all.
    match CudaContext::device_count() {
        Ok(count) if count > 0 => Ok(count as usize),
        Ok(_) => Err(no_gpu()),
        Err(e) => Err(driver_failed(0, &e)),
    }
}

fn no_gpu() -> Error {
    let remedy = "check with nvidia-smi that the machine has a GPU, and that CUDA_VISIBLE_DEVICES does not hide it; or \
                  load the model with DeviceMap::Cpu";
    unusable(0, "the driver shows no GPU", remedy)
}

/// The driver's error before there is a device.
pub(super) fn driver_failed(ordinal: usize, e: &DriverError) -> Error {
    use sys::cudaError_enum as Code;
    match e.0 {
        Code::CUDA_ERROR_NO_DEVICE => no_gpu(),
        Code::CUDA_ERROR_OUT_OF_MEMORY => no_room(ordinal),
        _ => {
            let remedy = format!(
                "check with nvidia-smi that a driver for CUDA {TOOLKIT} is installed and runs; or load the model with \
                 DeviceMap::Cpu"
            );
            unusable(ordinal, e.to_string(), remedy)
        }
    }
}

/// The card has not even room for what every program needs on it.
pub(super) fn no_room(ordinal: usize) -> Error {
    let remedy = "another program holds its memory (nvidia-smi shows which): end it, choose another GPU, or load the \
                  model with DeviceMap::Cpu";
    unusable(ordinal, "it has too little free memory to start", remedy)
}

/// Fails for a GPU that is not there.
pub(super) fn check_ordinal(ordinal: usize, count: usize) -> Result<()> {
    if ordinal < count {
        return Ok(());
    }
    let remedy = match count {
        1 => "use DeviceMap::Cuda(0) or DeviceMap::Auto".to_string(),
        _ => format!("use DeviceMap::Cuda(0) to Cuda({}), or DeviceMap::Auto", count - 1),
    };
    Err(unusable(ordinal, format!("the driver shows {count} GPU{}", if count == 1 { "" } else { "s" }), remedy))
}

/// Fails for a driver that is older than the toolkit. `driver` as it says it: 13000 for CUDA 13.0.
pub fn check_driver(ordinal: usize, driver: i32) -> Result<()> {
    let (major, minor) = (driver / 1000, driver % 1000 / 10);
    let needed: i32 = TOOLKIT.split('.').next().and_then(|m| m.parse().ok()).unwrap_or(0);
    // Within a major version, what a newer toolkit compiled runs with an older driver.
    if major >= needed {
        return Ok(());
    }
    let why = format!("its driver is for CUDA {major}.{minor}, this build for CUDA {TOOLKIT}");
    let remedy = format!(
        "update the driver (CUDA 12 needs 525 or newer, CUDA 13 needs 580), build again with the toolkit of CUDA {major}, \
         or load the model with DeviceMap::Cpu"
    );
    Err(unusable(ordinal, why, remedy))
}

/// The version of CUDA that the driver is for.
pub(super) fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: a place for the result.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

/// Fails for a GPU that is older than the kernels.
pub fn check_capability(ordinal: usize, (major, minor): (i32, i32)) -> Result<()> {
    if (major, minor) >= LOWEST {
        return Ok(());
    }
    let (low_major, low_minor) = LOWEST;
    let why = format!("its compute capability is {major}.{minor}, the kernels need {low_major}.{low_minor}");
    let remedy = "use a GPU of the Ampere generation (A100, RTX 30) or newer, or load the model with DeviceMap::Cpu";
    Err(unusable(ordinal, why, remedy))
}

/// The kernels were compiled for another GPU.
pub(super) fn other_capability(ordinal: usize, (major, minor): (i32, i32), e: &DriverError) -> Error {
    let why = format!("this build's kernels do not run on compute capability {major}.{minor}: {e}");
    let remedy = format!("build again with CUDA_COMPUTE_CAP={major}{minor}, or load the model with DeviceMap::Cpu");
    unusable(ordinal, why, remedy)
}

/// The first GPU that this build can use, by its number; otherwise why there is none.
pub(crate) fn first() -> Result<(usize, &'static Gpu), String> {
    let short = |e: Error| match e {
        Error::UnusableDevice { device, why, .. } => (device, why),
        other => ("cuda".into(), other.to_string()),
    };
    let count = count().map_err(|e| short(e).1)?;
    let mut reasons = Vec::new();
    for ordinal in 0..count {
        match gpu(ordinal) {
            Ok(gpu) => return Ok((ordinal, gpu)),
            Err(e) => {
                let (device, why) = short(e);
                reasons.push(format!("{device}: {why}"));
            }
        }
    }
    Err(reasons.join("; "))
}

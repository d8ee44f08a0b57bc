//! Launches that were recorded once and are repeated as one.

use candle_core::cuda_backend::cudarc::driver::{
    CudaGraph,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};

use super::{Gpu, driver_error};
use crate::error::{Error, Result};

/// A recorded pass.
pub struct Graph {
    graph: CudaGraph,
    /// Memory that its tensors have at the most.
    bytes: usize,
}

// SAFETY: the driver's graph handles may be used by any thread; ours are behind a mutex.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` launches; nothing runs. Tensors that `work` makes it must also drop.
    pub fn record(gpu: &Gpu, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = gpu.stream();
        // Relaxed: what is done on other streams, giving memory above all, is not recorded and goes on.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        stream.begin_capture(mode).map_err(driver_error("beginning to record"))?;
        let done = gpu.with_recorded_memory(work);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).map_err(driver_error("recording a pass"));
        let (done, bytes) = done?;
        done?;
        match graph? {
            Some(graph) => Ok(Self { graph, bytes }),
            None => Err(Error::Tensor(candle_core::Error::Msg("CUDA recorded nothing".into()).bt())),
        }
    }

    /// Runs it.
    pub fn launch(&self, gpu: &Gpu) -> Result<()> {
        gpu.count_recorded(self.bytes);
        self.graph.launch().map_err(driver_error("running a recorded pass"))
    }
}

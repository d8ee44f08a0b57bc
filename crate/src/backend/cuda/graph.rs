//! Launches that are made again and again: recorded once, and from then on one launch.

use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaGraph, CudaStream, result,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};

use super::{Gpu, driver_error};
use crate::error::{Error, Result};

/// Work that is launched the first time, which also chooses algorithms and loads kernels, recorded the second time, and
/// repeated from then on.
#[derive(Default)]
pub struct Repeated {
    launched: bool,
    graph: Option<Graph>,
}

impl Repeated {
    /// Runs `work`, or what it launched before. Tensors that `work` makes it must also drop.
    pub fn run(&mut self, gpu: &Gpu, work: impl FnOnce() -> Result<()>) -> Result<()> {
        match &self.graph {
            Some(graph) => return graph.launch(gpu),
            None if !self.launched || !gpu.records => work()?,
            None => self.graph.insert(Graph::record(gpu, work)?).launch(gpu)?,
        }
        self.launched = true;
        Ok(())
    }
}

/// A recorded pass.
struct Graph {
    graph: CudaGraph,
    /// Memory that its tensors have at the most.
    bytes: usize,
}

// SAFETY: the driver's graph handles may be used by any thread; ours are behind a mutex.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` launches; nothing runs.
    fn record(gpu: &Gpu, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = &gpu.recording_stream;
        // Relaxed: what is done on other streams, giving memory above all, is not recorded and goes on.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        stream.begin_capture(mode).map_err(driver_error("beginning to record"))?;
        let done = gpu.with_recorded_memory(work);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
        let graph = stream.end_capture(flags).map_err(driver_error("recording a pass"));
        let (done, bytes) = done?;
        done?;
        match graph? {
            Some(graph) => Ok(Self { graph, bytes }),
            None => Err(Error::Tensor(candle_core::Error::Msg("CUDA recorded nothing".into()).bt())),
        }
    }

    /// Runs it, in the order of the GPU's stream.
    fn launch(&self, gpu: &Gpu) -> Result<()> {
        gpu.count_recorded(self.bytes);
        gpu.bind()?;
        // SAFETY: the graph lives; what it works on lives as long as the device or as `Repeated`'s owner.
        unsafe { result::graph::launch(self.graph.cu_graph_exec(), gpu.stream().cu_stream()) }
            .map_err(driver_error("running a recorded pass"))
    }
}

impl Gpu {
    /// In a pass that is recorded: what `work` launches, on the stream that it is given, may run as soon as `after`
    /// allows and beside what follows. Gives the event of its end.
    pub fn beside(&self, after: &CudaEvent, work: impl FnOnce(&CudaStream) -> Result<()>) -> Result<CudaEvent> {
        self.side_stream.wait(after).map_err(driver_error("recording a pass"))?;
        work(&self.side_stream)?;
        self.side_stream.record_event(None).map_err(driver_error("recording a pass"))
    }

    /// In a pass that is recorded: the event of all that was launched so far.
    pub fn mark(&self) -> Result<CudaEvent> {
        self.working_stream().record_event(None).map_err(driver_error("recording a pass"))
    }

    /// In a pass that is recorded: what is launched from now on comes after `event`.
    pub fn wait_for(&self, event: &CudaEvent) -> Result<()> {
        self.working_stream().wait(event).map_err(driver_error("recording a pass"))
    }
}

//! An NVIDIA GPU: its device, memory, passes and operations, by kernels of our own.
//!
//! candle gives the device, its stream and its memory; the kernels are those of `kernels/`,
//! compiled by build.rs and loaded here. Operations (`ops`) call [`Gpu::launch`] and [`Gpu::gemm`] with the
//! addresses of tensors. Everything runs in the order of one stream, so an address stays good
//! until what was launched with it is done, whoever drops the tensor.

mod backend;
mod gemm;
mod grads;
mod graph;
mod inputs;
mod load;
mod managed;
mod memory;
pub mod ops;
pub mod optim;
mod passes;
mod quant;
mod results;
mod select;
mod staging;
mod tensor;

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicUsize},
    },
    thread::ThreadId,
};

use candle_core::{
    CudaDevice, Device,
    cuda_backend::cudarc::{
        driver::{self, CudaContext, CudaFunction, CudaModule, CudaSlice, DevicePtr, result, sys},
        nvrtc::Ptx,
    },
};

use parking_lot::{ReentrantMutex, ReentrantMutexGuard};

use crate::error::{Error, Result};

pub use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
pub use gemm::{Gemm, Operand};
pub use grads::{Grads, Outputs};
pub use graph::Repeated;
pub use inputs::{HostInputs, InputDraw, InputShape, Inputs, Scalars};
pub use managed::{Managed, Place};
pub(crate) use passes::Decode;
pub use passes::OnCard;
pub use quant::{dequantize_into, dequantize_transposed_into};
pub use results::Results;
pub(crate) use select::first;
pub use select::{TOOLKIT, check_capability, check_driver, count};
pub use staging::{Piece, Staging};
pub use tensor::{address, alloc, copy_to_host, dtype_suffix, fill_zero, uninit, zeros};
pub(crate) use tensor::{copy_on_card, write};

// MODULES: the compiled files. EARLY: the kernels that wait themselves for the one in front of them, in order. told: what
// the files tell the host.
include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// Dequantized weights that exist at a time: one is multiplied while the next ones come.
pub const PLACES: usize = 3;

/// Bytes that cuBLAS may use beside its operands.
pub(crate) const WORKSPACE: usize = 32 << 20;

/// Free bytes below which it is the memory that keeps CUDA's libraries from starting.
const LIBRARIES: usize = 256 << 20;

/// One GPU, ready for the engine.
pub struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// What a pass launches while it is recorded: of the highest priority, which its kernels keep.
    recording_stream: Arc<CudaStream>,
    /// What a recorded pass may do beside that, where the card has room: of the lowest priority.
    side_stream: Arc<CudaStream>,
    /// Nothing runs here; it gives and takes memory while a pass is recorded, which would repeat the giving and taking
    /// if it were done on the stream that is recorded. What uses the memory is in the order of that one stream, so
    /// a piece may be given again as soon as its tensor is dropped. Never for tensors that others get to see: candle
    /// copies a tensor to the CPU in the order of the stream that gave its memory.
    memory_stream: Arc<CudaStream>,
    /// The thread whose launches are recorded now; others go on.
    recording: Mutex<Option<ThreadId>>,
    /// See [`super::Backend::lock`].
    busy: ReentrantMutex<()>,
    ordinal: usize,
    /// Where the memory of recorded passes comes from: nobody else gets it.
    recorded_memory: sys::CUmemoryPool,
    /// The most that a recorded pass held which ran since [`Gpu::reset_peak`].
    recorded_peak: AtomicUsize,
    modules: Vec<Arc<CudaModule>>,
    /// With the shared memory that each may have beyond what every kernel may.
    functions: Mutex<HashMap<String, (CudaFunction, usize)>>,
    blas: gemm::Handle,
    workspace: CudaSlice<u8>,
    /// Small tables that layers read, by their bits.
    constants: Mutex<HashMap<Vec<u32>, CudaSlice<f32>>>,
    /// See [`Gpu::scratch`]. What was outgrown stays: recorded passes have its address.
    scratch: Mutex<[Vec<CudaSlice<u8>>; PLACES]>,
    /// Whether a kernel may start before the one in front of it has ended.
    overlaps: bool,
    /// Whether passes are recorded at all; not with QLORA_NB_NO_GRAPHS in the environment, for tools that look at
    /// memory, which take that of a recorded pass for freed.
    records: bool,
    /// See [`Gpu::take_no_room_to_record`].
    no_room_to_record: AtomicBool,
    /// Multiprocessors.
    pub processors: usize,
    /// Bytes of shared memory that a block may have.
    pub shared_per_block: usize,
}

// SAFETY: the pool's handle may be used by any thread.
unsafe impl Send for Gpu {}
// SAFETY: as above; what changes is behind mutexes.
unsafe impl Sync for Gpu {}

/// A kernel's argument: a number or an address, passed as it is.
pub trait KernelArg {
    fn pointer(&self) -> *mut c_void;
}

macro_rules! kernel_arg {
    ($($t:ty),*) => {$(
        impl $crate::backend::cuda::KernelArg for $t {
            fn pointer(&self) -> *mut std::ffi::c_void {
                std::ptr::from_ref(self).cast_mut().cast()
            }
        }
    )*};
}

kernel_arg!(u64, i64, u32, i32, f32, f64, [f32; 16]);
pub(crate) use kernel_arg;

/// The device of that number; one for the whole process, so that all tensors share its stream.
pub fn device(ordinal: usize) -> Result<Device> {
    Ok(Device::Cuda(gpu(ordinal)?.device.clone()))
}

/// The GPU that a tensor's device is.
pub fn of(device: &Device) -> Result<&'static Gpu> {
    match device {
        Device::Cuda(cuda) => {
            let gpu = gpu(cuda.cuda_stream().context().ordinal())?;
            if gpu.device.id() == cuda.id() {
                return Ok(gpu);
            }
            // Nothing would order what runs on its stream and on ours.
            Err(Error::argument(
                "device of a tensor",
                "a device made by Device::new_cuda",
                "the device that all tensors of a GPU share",
                "make it with DeviceMap::Cuda, or take a model's own device",
            ))
        }
        other => Err(candle_core::Error::Msg(format!("not a CUDA device: {other:?}")).bt().into()),
    }
}

/// It lives as long as the process, as CUDA's own context does.
fn gpu(ordinal: usize) -> Result<&'static Gpu> {
    static GPUS: OnceLock<Mutex<HashMap<usize, &'static Gpu>>> = OnceLock::new();
    let mut gpus = GPUS.get_or_init(Default::default).lock().unwrap_or_else(|e| e.into_inner());
    if let Some(gpu) = gpus.get(&ordinal) {
        return Ok(gpu);
    }
    let gpu: &'static Gpu = Box::leak(Box::new(Gpu::new(ordinal)?));
    gpus.insert(ordinal, gpu);
    Ok(gpu)
}

/// A driver's error as ours.
pub(crate) fn driver_error(doing: &str) -> impl Fn(driver::DriverError) -> Error + '_ {
    move |e| {
        if memory::is_out_of_memory(&e) {
            return memory::out_of_memory(doing);
        }
        Error::Tensor(candle_core::Error::Msg(format!("CUDA, {doing}: {e}")).bt())
    }
}

impl Gpu {
    fn new(ordinal: usize) -> Result<Self> {
        select::check_ordinal(ordinal, count()?)?;
        let failed = |e| select::driver_failed(ordinal, &e);
        select::check_driver(ordinal, select::driver_version().map_err(failed)?)?;
        // Before the libraries, whose errors say less.
        let first = CudaContext::new(ordinal).map_err(failed)?;
        let capability = first.compute_capability().map_err(failed)?;
        select::check_capability(ordinal, capability)?;
        // A stream of our own: the default one cannot be captured into a graph.
        let device = CudaDevice::new_with_stream(ordinal).map_err(|e| match first.mem_get_info() {
            Ok((free, _)) if free < LIBRARIES => select::no_room(ordinal),
            _ => select::unusable(ordinal, e.to_string(), "reinstall CUDA's libraries, or load with DeviceMap::Cpu"),
        })?;
        // SAFETY: everything runs on one stream, so no two uses of a tensor need an event between them.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        let context = stream.context().clone();
        let load = |image: &&[u8]| {
            let loaded = context.load_module(Ptx::from_binary(image.to_vec()));
            loaded.map_err(|e| match memory::is_out_of_memory(&e) {
                true => select::no_room(ordinal),
                false => select::other_capability(ordinal, capability, &e),
            })
        };
        let modules = MODULES.iter().map(load).collect::<Result<_>>()?;
        let new_stream = |priority| context.new_stream_with_priority(priority).map_err(driver_error("making a stream"));
        let (lowest, highest) = result::stream::get_priority_range().map_err(driver_error("making a stream"))?;
        let recorded_memory = memory::pools(&context)?;
        let workspace = stream.alloc_zeros::<u8>(WORKSPACE).map_err(driver_error("making cuBLAS's workspace"))?;
        use sys::CUdevice_attribute_enum as Attribute;
        let number = |of| context.attribute(of).map(|n| n as usize).map_err(driver_error("asking what it has"));
        let processors = number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_per_block = number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let blas = gemm::Handle::new()?;
        let (functions, constants) = (Mutex::default(), Mutex::default());
        Ok(Self {
            device,
            stream,
            recording_stream: new_stream(highest)?,
            side_stream: new_stream(lowest)?,
            memory_stream: new_stream(lowest)?,
            recording: Mutex::default(),
            busy: ReentrantMutex::default(),
            ordinal,
            recorded_memory,
            recorded_peak: AtomicUsize::new(0),
            modules,
            functions,
            blas,
            workspace,
            constants,
            scratch: Mutex::default(),
            overlaps: capability.0 >= 9,
            records: std::env::var_os("QLORA_NB_NO_GRAPHS").is_none(),
            no_room_to_record: AtomicBool::new(false),
            processors,
            shared_per_block,
        })
    }

    /// One of [`PLACES`] places for a weight that is dequantized to be used once; the same for all weights of all models.
    pub fn scratch(&self, which: usize, bytes: usize) -> Result<u64> {
        let mut places = self.scratch.lock().unwrap_or_else(|e| e.into_inner());
        let places = &mut places[which % PLACES];
        if places.last().is_none_or(|place| place.len() < bytes) {
            // SAFETY: any bits are a number; it is written before it is read.
            let place = self.with_room(|| unsafe { self.stream.alloc::<u8>(bytes) });
            places.push(place.map_err(driver_error("asking for room for a dequantized weight"))?);
        }
        Ok(places[places.len() - 1].device_ptr(&self.stream).0)
    }

    /// The address of a table that never changes; copied to the device once.
    pub fn constant(&self, values: &[f32]) -> Result<u64> {
        let key: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        let mut constants = self.constants.lock().unwrap_or_else(|e| e.into_inner());
        if !constants.contains_key(&key) {
            let slice = self.stream.clone_htod(values).map_err(driver_error("copying a table"))?;
            constants.insert(key.clone(), slice);
        }
        Ok(constants[&key].device_ptr(&self.stream).0)
    }

    /// candle's device.
    pub fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Makes this GPU the calling thread's: what asks the driver directly needs that.
    pub(crate) fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(driver_error("choosing the GPU"))
    }

    /// `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> String {
        self.stream.context().name().unwrap_or_else(|_| "GPU".into())
    }

    /// Waits until all that was launched is done, and gives the error of what failed.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(driver_error("waiting for the kernels"))
    }

    /// The stream that what is launched now goes to.
    pub(crate) fn working_stream(&self) -> &Arc<CudaStream> {
        if self.is_recording() { &self.recording_stream } else { &self.stream }
    }

    /// Whether what this thread launches now is recorded, to be repeated later.
    pub fn is_recording(&self) -> bool {
        *self.recording.lock().unwrap_or_else(|e| e.into_inner()) == Some(std::thread::current().id())
    }

    /// The same GPU, for as long as the process lives.
    pub(crate) fn forever(&self) -> Result<&'static Gpu> {
        gpu(self.ordinal)
    }

    /// Holds off every other call that works on the card.
    pub(crate) fn hold(&self) -> ReentrantMutexGuard<'_, ()> {
        self.busy.lock()
    }

    /// Launches a kernel of `kernels/` by its name.
    ///
    /// The arguments must be those of the kernel in number, order and width; addresses must be of
    /// memory that is large enough. That is for the callers in this crate to keep.
    pub fn launch(
        &self,
        name: &str,
        grid: (usize, usize, usize),
        block: usize,
        shared_bytes: usize,
        args: &[&dyn KernelArg],
    ) -> Result<()> {
        self.launch_on(self.working_stream(), name, grid, block, shared_bytes, args)
    }

    /// [`Gpu::launch`] on a stream.
    pub fn launch_on(
        &self,
        stream: &CudaStream,
        name: &str,
        grid: (usize, usize, usize),
        block: usize,
        shared_bytes: usize,
        args: &[&dyn KernelArg],
    ) -> Result<()> {
        let function = self.function(name, shared_bytes)?;
        let mut params: Vec<*mut c_void> = args.iter().map(|a| a.pointer()).collect();
        let grid = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0,
            gridDimY: grid.1,
            gridDimZ: grid.2,
            blockDimX: block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: stream.cu_stream(),
            attrs: &mut overlap,
            numAttrs: (self.overlaps && EARLY.binary_search(&name).is_ok()).into(),
        };
        self.bind()?;
        // SAFETY: the callers keep what is said above; what is pointed to lives until the call returns, and the
        // driver copies it.
        unsafe {
            sys::cuLaunchKernelEx(&config, function.cu_function(), params.as_mut_ptr(), std::ptr::null_mut()).result()
        }
        .map_err(driver_error(name))
    }

    /// Blocks along z of a cluster of that kernel, as it was compiled; 1 where there are no clusters.
    pub fn cluster_depth(&self, name: &str) -> Result<usize> {
        let depth = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH;
        let depth = self.function(name, 0)?.get_attribute(depth).map_err(driver_error(name))?;
        Ok(depth.max(1) as usize)
    }

    fn function(&self, name: &str, shared_bytes: usize) -> Result<CudaFunction> {
        let mut functions = self.functions.lock().unwrap_or_else(|e| e.into_inner());
        let (function, allowed) = match functions.entry(name.into()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                self.stream.context().bind_to_thread().map_err(driver_error("choosing the GPU"))?;
                let function = self.modules.iter().find_map(|m| m.load_function(name).ok());
                let missing = || Error::Tensor(candle_core::Error::Msg(format!("no CUDA kernel {name}")).bt());
                entry.insert((function.ok_or_else(missing)?, 48 << 10))
            }
        };
        if shared_bytes > *allowed {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes as i32)
                .map_err(driver_error(name))?;
            *allowed = shared_bytes;
        }
        Ok(function.clone())
    }
}

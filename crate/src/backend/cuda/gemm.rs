//! Matrix products by cuBLASLt, with the epilogues that save a pass over the result.
//!
//! The library guesses which algorithm is best for a shape. Timing its sixteen best guesses instead was tried: the
//! winners, timed one after another with their operands in the cache, made the step 1 % slower.

use std::{collections::HashMap, ffi::c_void, sync::Mutex};

use candle_core::{
    DType,
    cuda_backend::cudarc::cublaslt::{result, result::CublasError, sys},
};

use super::{Gpu, WORKSPACE, driver_error};
use crate::error::{Error, Result};

/// A matrix in row-major order: where it is, and elements from one row to the next.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    pub address: u64,
    pub row: usize,
}

/// y `[m, n]` = x `[m, k]` W (+ c) (+ bias): W is `[n, k]`, or `[k, n]` when `transposed` is false.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub x: Operand,
    /// x is stored as `[k, m]`.
    pub x_transposed: bool,
    pub w: Operand,
    /// W is `[n, k]`: a forward's weight. Otherwise `[k, n]`: a backward's.
    pub transposed: bool,
    pub y: Operand,
    /// Added to the product, in y's dtype; may be y itself.
    pub c: Option<Operand>,
    /// `[n]` in y's dtype, added to each row.
    pub bias: Option<u64>,
    /// y goes through gelu; before that it is also written here, unless this is 0.
    pub gelu: Option<u64>,
    /// The product, without c, is multiplied by the f32 at this address.
    pub scale: Option<u64>,
    /// Of x and W; sums are in f32.
    pub dtype: DType,
    /// Of y, c and bias.
    pub out: DType,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    rows: [usize; 4],
    transposed: [bool; 2],
    scaled: bool,
    bias: bool,
    gelu: Option<bool>,
    add: bool,
    dtype: (u8, u8),
}

struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    c: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
}

/// The library's handle and the shapes met so far.
pub(super) struct Handle {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Key, Plan>>,
}

// SAFETY: cuBLASLt's handle may be used by any thread; the plans are behind a mutex.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

fn blas_error(doing: &'static str) -> impl Fn(CublasError) -> Error {
    move |e| Error::Tensor(candle_core::Error::Msg(format!("cuBLASLt, {doing}: {:?}", e.0)).bt())
}

fn data_type(dtype: DType) -> Result<(sys::cudaDataType, u8)> {
    match dtype {
        DType::F32 => Ok((sys::cudaDataType::CUDA_R_32F, 0)),
        DType::F16 => Ok((sys::cudaDataType::CUDA_R_16F, 1)),
        DType::BF16 => Ok((sys::cudaDataType::CUDA_R_16BF, 2)),
        other => Err(candle_core::Error::Msg(format!("no matrix product in {other:?}")).bt().into()),
    }
}

impl Handle {
    pub fn new() -> Result<Self> {
        let handle = result::create_handle().map_err(blas_error("starting"))?;
        Ok(Self { handle, plans: Mutex::default() })
    }
}

impl Gpu {
    /// Runs one product. A shape that was not met before is planned first.
    pub fn gemm(&self, g: &Gemm) -> Result<()> {
        if g.m == 0 || g.n == 0 {
            return Ok(());
        }
        let key = Key {
            sizes: [g.m, g.n, g.k],
            rows: [g.x.row, g.w.row, g.y.row, g.c.map_or(0, |c| c.row)],
            transposed: [g.x_transposed, g.transposed],
            scaled: g.scale.is_some(),
            bias: g.bias.is_some(),
            gelu: g.gelu.map(|before| before != 0),
            add: g.c.is_some(),
            dtype: (data_type(g.dtype)?.1, data_type(g.out)?.1),
        };
        self.stream.context().bind_to_thread().map_err(driver_error("choosing the GPU"))?;
        let mut plans = self.blas.plans.lock().unwrap_or_else(|e| e.into_inner());
        if let std::collections::hash_map::Entry::Vacant(place) = plans.entry(key) {
            place.insert(self.plan(g)?);
        }
        self.run(g, &plans[&key])
    }

    fn run(&self, g: &Gemm, plan: &Plan) -> Result<()> {
        let (one, beta) = (1f32, if g.c.is_some() { 1f32 } else { 0f32 });
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        if let Some(bias) = g.bias {
            set(plan.desc, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        if let Some(before) = g.gelu.filter(|&at| at != 0) {
            set(plan.desc, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &before)?;
        }
        let at = |address: u64| address as *const c_void;
        let (alpha, beta) = match g.scale {
            None => (std::ptr::from_ref(&one).cast(), std::ptr::from_ref(&beta).cast()),
            // Both are on the card or neither is.
            Some(scale) => (at(scale), at(self.constant(&[beta])?)),
        };
        // SAFETY: the plan's descriptors are alive as long as the handle; the callers give addresses of memory that
        // holds the shapes (see `Gpu::launch`).
        unsafe {
            result::matmul(
                self.blas.handle,
                plan.desc,
                alpha,
                beta,
                at(g.w.address),
                plan.a,
                at(g.x.address),
                plan.b,
                at(g.c.unwrap_or(g.y).address),
                plan.c,
                g.y.address as *mut c_void,
                plan.d,
                &plan.algo,
                self.workspace_address() as *mut c_void,
                WORKSPACE,
                self.working_stream().cu_stream().cast(),
            )
        }
        .map_err(blas_error("matmul"))
    }

    fn workspace_address(&self) -> u64 {
        use candle_core::cuda_backend::cudarc::driver::DevicePtr;
        self.workspace.device_ptr(&self.stream).0
    }

    fn plan(&self, g: &Gemm) -> Result<Plan> {
        let ((kind, _), (out, _)) = (data_type(g.dtype)?, data_type(g.out)?);
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F).map_err(blas_error("plan"))?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        // Row-major is column-major transposed: y^T = W x^T.
        let transpose = [i32::from(g.transposed), i32::from(g.x_transposed)];
        set(desc, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transpose[0])?;
        set(desc, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &transpose[1])?;
        if g.scale.is_some() {
            let on_card = sys::cublasLtPointerMode_t::CUBLASLT_POINTER_MODE_DEVICE as i32;
            set(desc, Attribute::CUBLASLT_MATMUL_DESC_POINTER_MODE, &on_card)?;
        }
        use sys::cublasLtEpilogue_t as Epilogue;
        let epilogue = match (g.bias.is_some(), g.gelu) {
            (false, None) => Epilogue::CUBLASLT_EPILOGUE_DEFAULT,
            (true, None) => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            (false, Some(0)) => Epilogue::CUBLASLT_EPILOGUE_GELU,
            (true, Some(0)) => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
            (false, Some(_)) => Epilogue::CUBLASLT_EPILOGUE_GELU_AUX,
            (true, Some(_)) => Epilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
        };
        set(desc, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if let Some(before) = g.gelu.filter(|&at| at != 0) {
            set(desc, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &before)?;
            set(desc, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &(g.y.row as i64))?;
        }
        if let Some(bias) = g.bias {
            set(desc, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
            set(desc, Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out)?;
        }
        let layout = |kind, rows: usize, columns: usize, ld: usize| {
            result::create_matrix_layout(kind, rows as u64, columns as u64, ld as i64).map_err(blas_error("plan"))
        };
        let (rows, columns) = if g.transposed { (g.k, g.n) } else { (g.n, g.k) };
        let (x_rows, x_columns) = if g.x_transposed { (g.m, g.k) } else { (g.k, g.m) };
        let mut plan = Plan {
            desc,
            a: layout(kind, rows, columns, g.w.row)?,
            b: layout(kind, x_rows, x_columns, g.x.row)?,
            c: layout(out, g.n, g.m, g.c.unwrap_or(g.y).row)?,
            d: layout(out, g.n, g.m, g.y.row)?,
            // SAFETY: plain data that `choose` fills.
            algo: unsafe { std::mem::zeroed() },
        };
        plan.algo = self.choose(&plan)?;
        Ok(plan)
    }

    /// The library's algorithm for a shape.
    fn choose(&self, plan: &Plan) -> Result<sys::cublasLtMatmulAlgo_t> {
        let preference = result::create_matmul_pref().map_err(blas_error("plan"))?;
        let bytes = WORKSPACE as u64;
        let what = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: valid descriptors; an attribute of 8 bytes.
        let found = unsafe {
            result::set_matmul_pref_attribute(preference, what, std::ptr::from_ref(&bytes).cast(), 8)
                .map_err(blas_error("plan"))?;
            let handle = self.blas.handle;
            let found =
                result::get_matmul_algo_heuristic(handle, plan.desc, plan.a, plan.b, plan.c, plan.d, preference);
            result::destroy_matmul_pref(preference).map_err(blas_error("plan"))?;
            found
        };
        Ok(found.map_err(blas_error("looking for an algorithm"))?.algo)
    }
}

fn set<T>(desc: sys::cublasLtMatmulDesc_t, what: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
    // SAFETY: a valid descriptor, and an attribute of T's size.
    unsafe { result::set_matmul_desc_attribute(desc, what, std::ptr::from_ref(value).cast(), size_of::<T>()) }
        .map_err(blas_error("plan"))
}

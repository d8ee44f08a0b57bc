//! What the checks share: random numbers, poison, and the comparison that prints a line.

use qlora_nb::{
    candle_core::{DType, Device, Tensor},
    error::Result,
    internals::backend::cuda::{self, Gpu},
};

pub struct Checks {
    pub gpu: &'static Gpu,
    pub device: Device,
    pub rng: Rng,
    pub count: usize,
    pub failed: usize,
}

impl Checks {
    pub fn new(seed: u64) -> Result<Self> {
        let device = cuda::device(0)?;
        Ok(Self { gpu: cuda::of(&device)?, device, rng: Rng(seed), count: 0, failed: 0 })
    }

    fn line(&mut self, good: bool, what: &str, detail: &str) {
        self.count += 1;
        self.failed += usize::from(!good);
        println!("{} {what}: {detail}", if good { "ok    " } else { "FAILED" });
    }

    pub fn fail(&mut self, what: &str, detail: &str) {
        self.line(false, what, detail);
    }

    /// `cases` outcomes of one check: what differs, if anything does.
    pub fn equal(&mut self, what: &str, cases: &[Option<String>]) {
        let different: Vec<&String> = cases.iter().flatten().collect();
        match different.first() {
            None => self.line(true, what, &format!("{} cases equal bit for bit", cases.len())),
            Some(first) => {
                let detail = format!("{} of {} cases differ; the first: {first}", different.len(), cases.len());
                self.line(false, what, &detail);
            }
        }
    }

    /// ||got - expected|| / ||expected|| against a tolerance; NaN fails.
    #[allow(dead_code)]
    pub fn close(&mut self, what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
        let values = |t: &Tensor| -> Result<Vec<f64>> {
            Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
        };
        let (got, expected) = (values(got)?, values(expected)?);
        if got.len() != expected.len() {
            self.fail(what, &format!("{} elements, expected {}", got.len(), expected.len()));
            return Ok(());
        }
        let square = |x: f64| x * x;
        let difference: f64 = got.iter().zip(&expected).map(|(g, e)| square(g - e)).sum();
        let size: f64 = expected.iter().map(|e| square(*e)).sum();
        let error = (difference / size.max(f64::MIN_POSITIVE)).sqrt();
        self.line(error <= tolerance, what, &format!("error {error:.2e}, tolerance {tolerance:.0e}"));
        Ok(())
    }

    /// Fills memory that is then free, so that what is allocated next begins as nonsense: NaN in
    /// every float type, a large number in the others.
    pub fn poison(&self, bytes: usize) -> Result<()> {
        let whole = Tensor::full(0xffu8, bytes.max(1), &self.device)?;
        let pieces = (0..8).map(|_| Tensor::full(0xffu8, bytes.div_ceil(8).max(1), &self.device));
        pieces.collect::<qlora_nb::candle_core::Result<Vec<_>>>()?;
        drop(whole);
        self.gpu.synchronize()
    }
}

/// The bytes of a tensor, wherever it is.
pub fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let t = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    fn of<T, const N: usize>(values: Vec<T>, f: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        values.into_iter().flat_map(f).collect()
    }
    Ok(match t.dtype() {
        DType::U8 => t.to_vec1::<u8>()?,
        DType::F16 => of(t.to_vec1::<half::f16>()?, |v| v.to_le_bytes()),
        DType::BF16 => of(t.to_vec1::<half::bf16>()?, |v| v.to_le_bytes()),
        _ => of(t.to_dtype(DType::F32)?.to_vec1::<f32>()?, |v| v.to_le_bytes()),
    })
}

/// None when two tensors have the same dtype, shape and bits.
pub fn difference(what: &str, got: &Tensor, expected: &Tensor) -> Result<Option<String>> {
    if (got.dtype(), got.dims()) != (expected.dtype(), expected.dims()) {
        let got = format!("{:?} {:?}", got.dtype(), got.dims());
        return Ok(Some(format!("{what} is {got}, expected {:?} {:?}", expected.dtype(), expected.dims())));
    }
    let (got, expected, width) = (bytes(got)?, bytes(expected)?, got.dtype().size_in_bytes());
    let differ = got.chunks(width).zip(expected.chunks(width)).enumerate().filter(|(_, (g, e))| g != e);
    let differ: Vec<_> = differ.collect();
    Ok(differ.first().map(|(i, (g, e))| {
        format!(
            "{what}: {} of {} elements, the first at {i}: {g:02x?}, expected {e:02x?}",
            differ.len(),
            got.len() / width
        )
    }))
}

/// splitmix64.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// Of variance 1, nearly normal: the sum of four uniform numbers.
    pub fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: i64 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as i64).sum();
        (sum - 131_070) as f32 / 37_837.0
    }
}

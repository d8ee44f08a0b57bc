//! Files read straight to the card: several threads read pieces into pinned memory, from which the card copies them
//! while the next ones are read.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
};

use candle_core::{
    DType, Tensor,
    cuda_backend::cudarc::driver::{CudaEvent, result},
};
use rayon::prelude::*;

use super::{Gpu, address, driver_error, uninit};
use crate::error::{Error, Result};

/// Bytes that are read at a time; a multiple of every kernel's vector.
const PIECE: usize = 2 << 20;
/// A thread reads into one buffer while the other is copied.
const BUFFERS: usize = 2;
/// More threads than this read no faster.
const MAX_THREADS: usize = 16;

/// Buffers for reading; they are made once for many reads.
pub struct Staging {
    gpu: &'static Gpu,
    /// `PIECE` bytes for each thread and each of its buffers.
    host: *mut u8,
    /// When the card has copied what is in each buffer; one row a thread.
    copied: Vec<Mutex<[Option<CudaEvent>; BUFFERS]>>,
    /// As many bytes on the card; only made for those who ask.
    card: Mutex<Option<Tensor>>,
}

// SAFETY: a buffer is used by the thread that holds its row's lock.
unsafe impl Send for Staging {}
// SAFETY: as above.
unsafe impl Sync for Staging {}

/// A piece of a file that has been read.
pub struct Piece<'a> {
    /// Byte of the whole at which it begins.
    pub at: usize,
    pub bytes: &'a [u8],
    /// Address of as many bytes on the card, the piece's own until the stream has come here again; 0 unless asked for.
    pub card: u64,
}

impl Staging {
    pub fn new(gpu: &'static Gpu) -> Result<Self> {
        let threads = rayon::current_num_threads().clamp(1, MAX_THREADS);
        let bytes = threads * BUFFERS * PIECE;
        gpu.bind()?;
        // SAFETY: plain memory of the host, filled before anything reads it.
        let host = unsafe { result::malloc_host(bytes, 0) }.map_err(driver_error("asking for pinned memory"))?;
        let host = host.cast::<u8>();
        // SAFETY: as long as was asked for.
        unsafe { host.write_bytes(0, bytes) };
        let copied = (0..threads).map(|_| Mutex::default()).collect();
        Ok(Self { gpu, host, copied, card: Mutex::default() })
    }

    /// Reads `count` bytes of the file from `begin` on and hands each piece, in any order and on several threads, to
    /// `send`, which launches what uses it on the GPU's stream and does not wait. `on_card`: pieces bring memory of
    /// the card for themselves.
    pub fn read(
        &self,
        path: &Path,
        begin: u64,
        count: usize,
        on_card: bool,
        send: &(dyn Fn(&Piece) -> Result<()> + Sync),
    ) -> Result<()> {
        let card = if on_card { self.card()? } else { 0 };
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let threads = self.copied.len().min(count.div_ceil(PIECE));
        let work = |thread: usize| -> Result<()> {
            let mut copied = self.copied[thread].lock().unwrap_or_else(|e| e.into_inner());
            let mut file = File::open(path).map_err(Error::io("read", path))?;
            self.gpu.bind()?;
            for turn in 0.. {
                let at = next.fetch_add(1, Relaxed) * PIECE;
                if at >= count || stop.load(Relaxed) {
                    break;
                }
                let (buffer, length) = (turn % BUFFERS, PIECE.min(count - at));
                if let Some(event) = copied[buffer].take() {
                    event.synchronize().map_err(driver_error("waiting for a copy"))?;
                }
                let offset = (thread * BUFFERS + buffer) * PIECE;
                // SAFETY: this thread's buffer, initialized, and no longer read by the card.
                let bytes = unsafe { std::slice::from_raw_parts_mut(self.host.add(offset), length) };
                file.seek(SeekFrom::Start(begin + at as u64)).map_err(Error::io("read", path))?;
                file.read_exact(bytes).map_err(Error::io("read", path))?;
                let sent = send(&Piece { at, bytes, card: if on_card { card + offset as u64 } else { 0 } });
                // Also after an error: a copy may have begun.
                copied[buffer] =
                    Some(self.gpu.stream().record_event(None).map_err(driver_error("waiting for a copy"))?);
                sent?;
            }
            Ok(())
        };
        let watched = |thread| work(thread).inspect_err(|_| stop.store(true, Relaxed));
        if threads <= 1 {
            return if count == 0 { Ok(()) } else { watched(0) };
        }
        (0..threads).into_par_iter().with_max_len(1).map(watched).collect::<Vec<_>>().into_iter().collect()
    }

    fn card(&self) -> Result<u64> {
        let mut card = self.card.lock().unwrap_or_else(|e| e.into_inner());
        let tensor = match &*card {
            Some(tensor) => tensor.clone(),
            None => card.insert(uninit(self.gpu, self.copied.len() * BUFFERS * PIECE, DType::U8)?).clone(),
        };
        address(&tensor)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Memory that the card might still read stays; an error here has nobody to go to.
        if self.gpu.bind().is_ok() && self.gpu.synchronize().is_ok() {
            // SAFETY: it was made by malloc_host, and nothing uses it any more.
            let _ = unsafe { result::free_host(self.host.cast()) };
        }
    }
}

//! Arrow IPC streams: the shards of a saved dataset.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::{self as ipc, MessageHeader, reader::StreamDecoder, writer::StreamWriter};
use arrow_schema::{ArrowError, SchemaRef};

use crate::{
    error::{Error, Result, catch},
    interrupt,
};

/// Reads a shard to its end mark: a stream that stops earlier has lost rows.
pub(super) fn read_shard(path: &Path) -> Result<(SchemaRef, Vec<RecordBatch>)> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let decoded = check(&bytes).and_then(|()| catch(|| decode(bytes)));
    decoded.map_err(|detail| Error::malformed(path, "Arrow IPC stream", detail, "copy or download this file again"))
}

fn decode(bytes: Vec<u8>) -> Result<(SchemaRef, Vec<RecordBatch>), String> {
    // The batches are views into this one buffer.
    let mut rest = Buffer::from_vec(bytes);
    let mut decoder = StreamDecoder::new();
    let mut batches = Vec::new();
    while !rest.is_empty() && !interrupt::requested() {
        batches.extend(decoder.decode(&mut rest).map_err(|e| e.to_string())?);
    }
    decoder.finish().map_err(|e| e.to_string())?;
    Ok((decoder.schema().ok_or("it has no schema")?, batches))
}

/// More rows than bytes to hold them, of which no byte is needed where all values are missing.
const ROWS_WITHOUT_BYTES: usize = 1 << 20;

/// Checks what the decoder assumes and would panic on: that every message, and every buffer of a message, lies inside
/// the file. And that there are not more rows than a file of this size can mean: whoever numbers them needs 8 bytes a row.
fn check(bytes: &[u8]) -> Result<(), String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    if bytes.starts_with(b"ARROW1") {
        return Err("it is in the Arrow file format; save_to_disk writes the stream format".into());
    }
    let (mut at, mut batches) = (0, 0);
    let mut values_left = 8 * bytes.len() + ROWS_WITHOUT_BYTES;
    loop {
        let cut_off = || format!("the file is cut off after {batches} whole batches, at byte {}", bytes.len());
        let word = |at: usize| {
            let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
            word.map(u32::from_le_bytes).ok_or_else(cut_off)
        };
        // Since Arrow 0.15 a length follows the mark 0xffffffff; before, it stood alone.
        at += if word(at)? == u32::MAX { 4 } else { 0 };
        let length = word(at)? as usize;
        at += 4;
        if length == 0 {
            return match bytes.len() - at {
                0 => Ok(()),
                more => Err(format!("{more} bytes follow the end mark at byte {at}")),
            };
        }
        let metadata = bytes.get(at..at.saturating_add(length)).ok_or_else(cut_off)?;
        let message = ipc::root_as_message(metadata).map_err(|e| format!("the message at byte {at}: {e}"))?;
        at += length;
        let body = usize::try_from(message.bodyLength()).unwrap_or(usize::MAX);
        if body > bytes.len() - at {
            return Err(cut_off());
        }
        at += body;
        let record_batch = match message.header_type() {
            MessageHeader::RecordBatch => message.header_as_record_batch(),
            MessageHeader::DictionaryBatch => message.header_as_dictionary_batch().and_then(|d| d.data()),
            _ => continue,
        };
        batches += 1;
        let inside = |buffer: &ipc::Buffer| {
            let (offset, length) = (usize::try_from(buffer.offset()), usize::try_from(buffer.length()));
            offset.ok().zip(length.ok()).is_some_and(|(offset, length)| offset.saturating_add(length) <= body)
        };
        if !record_batch.and_then(|batch| batch.buffers()).is_none_or(|buffers| buffers.iter().all(inside)) {
            return Err(format!("batch {batches} has a buffer that lies outside its message"));
        }
        let columns = record_batch.and_then(|batch| batch.nodes()).into_iter().flatten().map(|node| node.length());
        let longest = columns.chain(record_batch.map(|batch| batch.length())).max().unwrap_or(0);
        let left = usize::try_from(longest).ok().and_then(|rows| values_left.checked_sub(rows));
        values_left = left
            .ok_or_else(|| format!("batch {batches} is said to have {longest} values, more than the file has bits"))?;
    }
}

/// Writes batches as one stream. What goes to the file also goes to `hasher`.
pub(super) fn write_stream(
    path: &Path,
    schema: &SchemaRef,
    batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
    hasher: &mut impl std::hash::Hasher,
) -> Result<()> {
    let file = fs::File::create(path).map_err(Error::io("write", path))?;
    let mut out = Hashed { inner: io::BufWriter::new(file), hasher };
    let written = (|| {
        let mut writer = StreamWriter::try_new(&mut out, schema)?;
        for batch in batches {
            interrupt::check("saving the dataset").map_err(|e| ArrowError::ExternalError(e.into()))?;
            let columns = batch?.columns().to_vec();
            writer.write(&RecordBatch::try_new(schema.clone(), columns)?)?;
        }
        writer.finish()
    })();
    written.map_err(|e| match e {
        ArrowError::IoError(_, source) => Error::io("write", path)(source),
        other => {
            let remedy = "report this as a bug of qlora-nb: these columns cannot be written";
            Error::malformed(path, "Arrow IPC stream", other, remedy)
        }
    })?;
    out.inner.flush().map_err(Error::io("write", path))
}

struct Hashed<'a, W, H> {
    inner: W,
    hasher: &'a mut H,
}

impl<W: Write, H: std::hash::Hasher> Write for Hashed<'_, W, H> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hasher.write(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

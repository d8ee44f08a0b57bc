//! Rows from files of other programs: JSON, JSONL, Parquet and CSV.

use std::{
    fmt::{self, Display},
    fs::{self, File},
    path::Path,
    sync::Arc,
};

use arrow_csv::{ReaderBuilder, reader::Format};
use arrow_schema::{DataType, Field, Schema};
use candle_core::Device;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::de::{Deserializer, SeqAccess, Visitor};

use super::{
    Dataset, Value,
    table::{BATCH_ROWS, Table},
};
use crate::{
    backend,
    error::{Error, Result, catch},
    interrupt,
};

type JsonRow = serde_json::Map<String, serde_json::Value>;

/// The rows of a JSON array, until somebody asks to stop.
struct Rows;

impl<'de> Visitor<'de> for Rows {
    type Value = Vec<JsonRow>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a sequence")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<Vec<JsonRow>, A::Error> {
        let mut all = Vec::new();
        while !interrupt::requested()
            && let Some(row) = rows.next_element()?
        {
            all.push(row);
        }
        Ok(all)
    }
}

impl Dataset {
    /// Rows from a JSON file: an array of objects, or one object after another (JSONL). All rows
    /// must have the same keys; `null` stands for a value that is missing.
    ///
    /// # Errors
    /// [`Error::Malformed`], naming the file and the row.
    pub fn from_json(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_json_path(path.as_ref())
    }

    fn from_json_path(path: &Path) -> Result<Self> {
        interrupt::stoppable("reading the dataset", || Self::read_json(path))
    }

    fn read_json(path: &Path) -> Result<Self> {
        Room::for_file(path)?;
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        if text.iter().all(u8::is_ascii_whitespace) {
            return Err(malformed(path, "JSON file", "the file is empty"));
        }
        let is_array = text.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
        let rows = if is_array {
            let rows = serde_json::Deserializer::from_slice(text);
            let read = |mut rows: serde_json::Deserializer<_>| {
                let all = rows.deserialize_seq(Rows)?;
                rows.end().map(|()| all)
            };
            read(rows).map_err(|e| malformed(path, "JSON array of rows", e))?
        } else {
            let rows = serde_json::Deserializer::from_slice(text).into_iter::<JsonRow>().enumerate();
            let at_row = |i, e| malformed(path, "JSONL file", format!("row {i}: {e}"));
            let rows = rows.map(|(i, row)| {
                interrupt::check("reading the dataset")?;
                row.map_err(|e| at_row(i, e))
            });
            rows.collect::<Result<_>>()?
        };
        from_json_rows(rows).map_err(|detail| malformed(path, "JSON table", detail))
    }

    /// Rows from a Parquet file (uncompressed, snappy or zstd).
    ///
    /// # Errors
    /// [`Error::Malformed`], naming the file.
    pub fn from_parquet(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_parquet_path(path.as_ref())
    }

    fn from_parquet_path(path: &Path) -> Result<Self> {
        interrupt::stoppable("reading the dataset", || Self::read_parquet(path))
    }

    fn read_parquet(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        let mut room = Room::for_file(path)?;
        // A few bytes of the file may stand for any number of rows, or for one long text in each of them.
        let table = catch(|| {
            let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| e.to_string())?;
            let schema = builder.schema().clone();
            // The reader fills such a cell whether the file has it or not.
            let longest = schema.fields().iter().map(|field| fixed_length(field.data_type())).max().unwrap_or(0);
            if longest as u64 > size.max(1 << 16) {
                return Err(format!("{longest} elements in a cell are more than the file of {size} bytes can have"));
            }
            let rows = usize::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(usize::MAX);
            let a_row: usize = schema.fields().iter().filter_map(|field| field.data_type().primitive_width()).sum();
            if let Err(full) = room.check(rows.saturating_mul(a_row)) {
                return Ok(Err(full));
            }
            let reader = builder.with_batch_size(BATCH_ROWS).build().map_err(|e| e.to_string())?;
            let mut batches = Vec::new();
            for batch in reader.take_while(|_| !interrupt::requested()) {
                let batch = batch.map_err(|e| e.to_string())?;
                if let Err(full) = room.take(batch.get_array_memory_size()) {
                    return Ok(Err(full));
                }
                batches.push(batch);
            }
            Table::new(&schema, batches).map(Ok).map_err(|e| e.to_string())
        });
        Ok(Self::of(table.map_err(|detail| malformed(path, "Parquet file", detail))??))
    }

    /// Rows from a CSV file with a header. Columns of numbers and of true/false are recognised,
    /// all else is text; an empty cell is a missing value.
    ///
    /// # Errors
    /// [`Error::Malformed`], naming the file and the line.
    pub fn from_csv(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_csv_path(path.as_ref())
    }

    fn from_csv_path(path: &Path) -> Result<Self> {
        interrupt::stoppable("reading the dataset", || Self::read_csv(path))
    }

    fn read_csv(path: &Path) -> Result<Self> {
        Room::for_file(path)?;
        let open = || File::open(path).map(interrupt::Reader).map_err(Error::io("read", path));
        let wrong = |detail: String| malformed(path, "CSV file", detail);
        let format = Format::default().with_header(true);
        let (schema, _) = format.infer_schema(open()?, None).map_err(|e| wrong(e.to_string()))?;
        if schema.fields().is_empty() {
            return Err(wrong("the file is empty: it has no header".into()));
        }
        // Dates stay text: a training prompt wants them as they were written.
        let fields = schema.fields().iter().map(|f| {
            let dtype = match f.data_type() {
                kept @ (DataType::Int64 | DataType::Float64 | DataType::Boolean | DataType::Null) => kept.clone(),
                _ => DataType::Utf8,
            };
            Field::new(f.name(), dtype, true)
        });
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        // The reader has a place for each cell of a batch, whether the file has it or not.
        let rows = (BATCH_CELLS / schema.fields().len()).clamp(1, BATCH_ROWS);
        let reader = ReaderBuilder::new(schema.clone()).with_format(format).with_batch_size(rows).build(open()?);
        let batches = reader.and_then(Iterator::collect).map_err(|e| wrong(e.to_string()))?;
        Ok(Self::of(Table::new(&schema, batches).map_err(|e| wrong(e.to_string()))?))
    }
}

/// The cells of a batch of CSV, at most.
const BATCH_CELLS: usize = 100 * BATCH_ROWS;

/// The memory that a dataset may take: what is free when reading begins. More would end the process.
struct Room<'a> {
    path: &'a Path,
    available: usize,
    taken: usize,
}

impl<'a> Room<'a> {
    /// # Errors
    /// [`Error::OutOfMemory`] for a file that is larger than the memory.
    fn for_file(path: &'a Path) -> Result<Self> {
        let size = fs::metadata(path).map_err(Error::io("read", path))?.len();
        let available = backend::of(&Device::Cpu)?.available_bytes()?.unwrap_or(usize::MAX);
        let room = Self { path, available, taken: 0 };
        room.check(usize::try_from(size).unwrap_or(usize::MAX))?;
        Ok(room)
    }

    fn check(&self, bytes: usize) -> Result<()> {
        let Self { path, available, .. } = self;
        if bytes <= *available {
            return Ok(());
        }
        let at_least = format!("at least {} MiB, {} are free", bytes >> 20, available >> 20);
        let doing = format!("reading the rows of {}: {at_least}", path.display());
        let remedy = "split the file, and read a part of it; or free some memory".into();
        Err(Error::OutOfMemory { doing, remedy })
    }

    /// A batch is there. Another like it must have room: three times its bytes, while its buffers grow by doubling.
    fn take(&mut self, bytes: usize) -> Result<()> {
        self.taken = self.taken.saturating_add(bytes);
        self.check(self.taken.saturating_add(3 * bytes))
    }
}

/// The most elements, or bytes, that the type gives a cell of fixed length.
fn fixed_length(dtype: &DataType) -> usize {
    match dtype {
        DataType::FixedSizeBinary(n) => usize::try_from(*n).unwrap_or(0),
        DataType::FixedSizeList(item, n) => {
            let n = usize::try_from(*n).unwrap_or(0);
            n.saturating_mul(fixed_length(item.data_type()).max(1))
        }
        DataType::List(item) | DataType::LargeList(item) | DataType::Map(item, _) => fixed_length(item.data_type()),
        DataType::Struct(fields) => fields.iter().map(|field| fixed_length(field.data_type())).max().unwrap_or(0),
        _ => 0,
    }
}

fn from_json_rows(rows: Vec<JsonRow>) -> Result<Dataset, String> {
    let names: Vec<String> = rows.first().map(|row| row.keys().cloned().collect()).unwrap_or_default();
    let mut columns: Vec<Vec<Value>> = names.iter().map(|_| Vec::with_capacity(rows.len())).collect();
    for (i, mut row) in rows.into_iter().enumerate() {
        for (name, column) in names.iter().zip(&mut columns) {
            let value = row.remove(name).ok_or_else(|| format!("row {i} has no key {name:?}; row 0 has {names:?}"))?;
            column.push(value.into());
        }
        if let Some(extra) = row.keys().next() {
            return Err(format!("row {i} has a key {extra:?}; row 0 has only {names:?}"));
        }
    }
    let wrong = |(row, name, why)| format!("row {row}, key {name:?}: {why}");
    Ok(Dataset::of(Table::from_values(&names, &columns).map_err(wrong)?))
}

fn malformed(path: &Path, format: &'static str, detail: impl Display) -> Error {
    let remedy = match format {
        "JSON table" => "give every row the same keys and types, with null where a value is missing",
        "CSV file" => "check that line: every line needs as many cells as the header",
        _ => "check the file at that place, or download it again",
    };
    Error::malformed(path, format, detail, remedy)
}

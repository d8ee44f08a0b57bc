//! The columns beneath a dataset: Arrow record batches of one schema, shared and never changed.

use std::{collections::HashSet, ops::Range, sync::Arc};

use arrow_array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_cast::cast;
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use arrow_select::interleave::interleave_record_batch;

use super::value::{self, Value};
use crate::error::catch_as;

/// Rows a batch, when we make the batches: what `datasets` writes.
pub(super) const BATCH_ROWS: usize = 1000;

#[derive(Debug)]
pub(super) struct Table {
    pub schema: SchemaRef,
    batches: Vec<RecordBatch>,
    /// The first row of each batch, and at the end the number of rows.
    starts: Vec<usize>,
    /// The rows that lost tokens to `max_length` when `map` made them.
    pub cut: HashSet<usize>,
}

impl Table {
    /// Batches of one schema. Encodings that only save space (dictionaries, string views) are
    /// undone, so that everything above sees one type for text.
    pub fn new(schema: &Schema, batches: Vec<RecordBatch>) -> Result<Self, ArrowError> {
        let fields: Vec<Field> = schema
            .fields()
            .iter()
            .map(|f| Field::new(f.name(), plain(f.data_type()), true).with_metadata(f.metadata().clone()))
            .collect();
        let schema = Arc::new(Schema::new(fields));
        let mut starts = vec![0];
        let mut plain_batches = Vec::with_capacity(batches.len());
        for batch in batches.into_iter().filter(|b| b.num_rows() > 0) {
            let columns = batch.columns().iter().zip(schema.fields());
            let columns = columns.map(|(column, field)| cast(column, field.data_type())).collect::<Result<_, _>>()?;
            starts.push(starts[starts.len() - 1] + batch.num_rows());
            plain_batches.push(RecordBatch::try_new(schema.clone(), columns)?);
        }
        Ok(Self { schema, batches: plain_batches, starts, cut: HashSet::new() })
    }

    /// A table from rows in memory: `columns[c][r]`, all of one length. `Err` is the first row
    /// and column whose value does not go with those above it, and why.
    pub fn from_values(names: &[String], columns: &[Vec<Value>]) -> Result<Self, (usize, String, String)> {
        let mut fields = Vec::with_capacity(names.len());
        for (name, column) in names.iter().zip(columns) {
            let mut dtype = DataType::Null;
            for (row, value) in column.iter().enumerate() {
                dtype = value::unify(&dtype, value).map_err(|why| (row, name.clone(), why))?;
            }
            fields.push(Field::new(name, dtype, true));
        }
        let schema = Arc::new(Schema::new(fields));
        let rows = columns.first().map_or(0, Vec::len);
        let batch = |start: usize| {
            let range = start..rows.min(start + BATCH_ROWS);
            let build = |(field, column): (&Arc<Field>, &Vec<Value>)| {
                value::build(field.data_type(), &column[range.clone()].iter().collect::<Vec<_>>())
            };
            RecordBatch::try_new(schema.clone(), schema.fields().iter().zip(columns).map(build).collect())
        };
        // Arrow's offsets have 32 bits, and beyond them it panics.
        let table = catch_as(&format!("{BATCH_ROWS} rows have more than 2 GiB of text"), || {
            let batches = (0..rows).step_by(BATCH_ROWS).map(batch).collect::<Result<_, _>>();
            batches.and_then(|batches| Self::new(&schema, batches)).map_err(|e| e.to_string())
        });
        table.map_err(|why| (0, names.join(", "), why))
    }

    pub fn num_rows(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    pub fn column_names(&self) -> Vec<String> {
        self.schema.fields().iter().map(|f| f.name().clone()).collect()
    }

    /// The batch that holds `row`, and the row's place in it.
    fn locate(&self, row: usize) -> (usize, usize) {
        let batch = self.starts.partition_point(|&start| start <= row) - 1;
        (batch, row - self.starts[batch])
    }

    /// A column's array that holds `row` (which must exist), and the row's place in it.
    pub fn cell(&self, column: usize, row: usize) -> (&ArrayRef, usize) {
        let (batch, offset) = self.locate(row);
        (self.batches[batch].column(column), offset)
    }

    /// The rows `start..end` as they lie in memory, batch by batch.
    pub fn contiguous(&self, mut rows: Range<usize>) -> impl Iterator<Item = RecordBatch> + '_ {
        std::iter::from_fn(move || {
            if rows.is_empty() {
                return None;
            }
            let (batch, offset) = self.locate(rows.start);
            let batch = &self.batches[batch];
            let len = rows.len().min(batch.num_rows() - offset).min(BATCH_ROWS);
            rows.start += len;
            Some(batch.slice(offset, len))
        })
    }

    /// The named rows, one at least, copied into one batch.
    pub fn gather(&self, rows: &[usize]) -> Result<RecordBatch, ArrowError> {
        let batches: Vec<&RecordBatch> = self.batches.iter().collect();
        let places: Vec<(usize, usize)> = rows.iter().map(|&row| self.locate(row)).collect();
        interleave_record_batch(&batches, &places)
    }

    /// The same rows with other columns: `(index here, new name)`.
    pub fn project(&self, columns: &[(usize, String)]) -> Result<Self, ArrowError> {
        let indices: Vec<usize> = columns.iter().map(|(i, _)| *i).collect();
        let rename = |(i, name): &(usize, String)| self.schema.field(*i).clone().with_name(name);
        let schema = Arc::new(Schema::new(columns.iter().map(rename).collect::<Vec<_>>()));
        let project = |batch: &RecordBatch| {
            let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
            RecordBatch::try_new_with_options(schema.clone(), batch.project(&indices)?.columns().to_vec(), &options)
        };
        let batches = self.batches.iter().map(project).collect::<Result<_, _>>()?;
        Ok(Self { schema, batches, starts: self.starts.clone(), cut: self.cut.clone() })
    }
}

fn plain(dtype: &DataType) -> DataType {
    let field = |f: &Arc<Field>| Arc::new(f.as_ref().clone().with_data_type(plain(f.data_type())));
    match dtype {
        DataType::Dictionary(_, values) => plain(values),
        DataType::Utf8View => DataType::LargeUtf8,
        DataType::BinaryView => DataType::LargeBinary,
        DataType::List(f) => DataType::List(field(f)),
        DataType::LargeList(f) => DataType::LargeList(field(f)),
        DataType::FixedSizeList(f, n) => DataType::FixedSizeList(field(f), *n),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(field).collect()),
        other => other.clone(),
    }
}

//! Column types, and the three columns of a tokenized dataset.

use std::{collections::HashSet, fmt, sync::Arc};

use arrow::{
    array::{ArrayRef, Int8Builder, Int32Builder, Int64Builder, ListBuilder, RecordBatch},
    datatypes::{DataType, Field, Schema},
    error::ArrowError,
};

use super::{
    table::{BATCH_ROWS, Table},
    value::{nested_name, type_name},
};
use crate::{
    error::{Error, Result},
    features::Features,
    py_repr::{py_dict, py_str},
};

/// The names and types of a dataset's columns; prints as `ds.features` does in Python:
/// `{'text': Value('string'), 'ids': List(Value('int32'))}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureTypes(Vec<(String, DataType)>);

impl FeatureTypes {
    pub(super) fn of(schema: &Schema) -> Self {
        Self(schema.fields().iter().map(|f| (f.name().clone(), f.data_type().clone())).collect())
    }

    /// A column's type as `datasets` names it: `string`, `int64`, `List(int32)`, ...
    pub fn get(&self, column: &str) -> Option<String> {
        self.0.iter().find(|(name, _)| name == column).map(|(_, dtype)| type_name(dtype))
    }

    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }
}

impl fmt::Display for FeatureTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let repr = |dtype: &DataType| nested_name(dtype, &|plain| format!("Value({})", py_str(&type_name(plain))));
        f.write_str(&py_dict(self.0.iter().map(|(name, dtype)| (name, repr(dtype)))))
    }
}

/// Collects [`Features`] into Arrow columns of the types that `datasets` gives them.
#[derive(Default)]
pub(super) struct TokenColumns {
    input_ids: ListBuilder<Int32Builder>,
    attention_mask: ListBuilder<Int8Builder>,
    labels: ListBuilder<Int64Builder>,
    pending: usize,
    batches: Vec<RecordBatch>,
}

impl TokenColumns {
    /// `row` is for the error message.
    pub fn push(&mut self, features: &Features, row: usize) -> Result<()> {
        for (position, &id) in features.input_ids.iter().enumerate() {
            let small = i32::try_from(id).map_err(|_| Error::TokenId {
                row,
                position,
                id: id.into(),
                vocab_size: i32::MAX as usize,
            })?;
            self.input_ids.values().append_value(small);
        }
        for &mask in &features.attention_mask {
            if mask > 1 {
                let remedy = "1 for a real token, 0 for padding";
                return Err(Error::argument("attention_mask", mask, "0 or 1", remedy).at_row(row));
            }
            self.attention_mask.values().append_value(mask as i8);
        }
        self.labels.values().append_slice(&features.labels);
        self.input_ids.append(true);
        self.attention_mask.append(true);
        self.labels.append(true);
        self.pending += 1;
        if self.pending == BATCH_ROWS { self.flush() } else { Ok(()) }
    }

    /// The table; `cut` are the rows that lost tokens to `max_length`.
    pub fn finish(mut self, cut: HashSet<usize>) -> Result<Table> {
        self.flush()?;
        let mut table = Table::new(&schema(), self.batches).map_err(impossible)?;
        table.cut = cut;
        Ok(table)
    }

    fn flush(&mut self) -> Result<()> {
        self.pending = 0;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(self.input_ids.finish()),
            Arc::new(self.attention_mask.finish()),
            Arc::new(self.labels.finish()),
        ];
        self.batches.push(RecordBatch::try_new(Arc::new(schema()), columns).map_err(impossible)?);
        Ok(())
    }
}

fn schema() -> Schema {
    let list = |name: &str, item| Field::new_list(name, Field::new("item", item, true), true);
    Schema::new(vec![
        list("input_ids", DataType::Int32),
        list("attention_mask", DataType::Int8),
        list("labels", DataType::Int64),
    ])
}

fn impossible(e: ArrowError) -> Error {
    Error::argument("features", e, "three lists of integers a row", "report this as a bug of qlora-nb")
}

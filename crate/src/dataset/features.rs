//! Column types, and the three columns of a tokenized dataset.

use std::{collections::HashSet, fmt, sync::Arc};

use arrow_array::{
    ArrayRef, ArrowPrimitiveType, ListArray, RecordBatch,
    types::{Int8Type, Int32Type, Int64Type},
};
use arrow_schema::{ArrowError, DataType, Field, Schema};

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
    pending: Vec<Features>,
    batches: Vec<RecordBatch>,
}

impl TokenColumns {
    /// `row` is for the error message.
    pub fn push(&mut self, features: Features, row: usize) -> Result<()> {
        const LARGEST: u32 = i32::MAX as u32;
        if let Some((position, &id)) = features.input_ids.iter().enumerate().find(|(_, id)| **id > LARGEST) {
            return Err(Error::TokenId { row, position, id: id.into(), vocab_size: LARGEST as usize });
        }
        if let Some(mask) = features.attention_mask.iter().find(|mask| **mask > 1) {
            let remedy = "1 for a real token, 0 for padding";
            return Err(Error::argument("attention_mask", mask, "0 or 1", remedy).at_row(row));
        }
        self.pending.push(features);
        if self.pending.len() == BATCH_ROWS { self.flush() } else { Ok(()) }
    }

    /// The table; `cut` are the rows that lost tokens to `max_length`.
    pub fn finish(mut self, cut: HashSet<usize>) -> Result<Table> {
        self.flush()?;
        let mut table = Table::new(&schema(), self.batches).map_err(impossible)?;
        table.cut = cut;
        Ok(table)
    }

    fn flush(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.pending);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(lists::<Int32Type, _>(rows.iter().map(|row| row.input_ids.iter().map(|id| *id as i32)))),
            Arc::new(lists::<Int8Type, _>(rows.iter().map(|row| row.attention_mask.iter().map(|mask| *mask as i8)))),
            Arc::new(lists::<Int64Type, _>(rows.iter().map(|row| row.labels.iter().copied()))),
        ];
        self.batches.push(RecordBatch::try_new(Arc::new(schema()), columns).map_err(impossible)?);
        Ok(())
    }
}

fn lists<T: ArrowPrimitiveType, L: Iterator<Item = T::Native>>(rows: impl Iterator<Item = L>) -> ListArray {
    ListArray::from_iter_primitive::<T, _, _>(rows.map(|row| Some(row.map(Some))))
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

//! One row, as a user's function sees it.

use std::{fmt, sync::Arc};

use arrow_array::{Array, ArrayRef, cast::AsArray, types::Int64Type};
use arrow_cast::cast;
use arrow_schema::DataType;

use super::{
    table::Table,
    value::{self, Value},
};
use crate::{
    error::{Error, Result},
    features::Features,
    py_repr::py_dict,
};

/// One row of a dataset: columns by name. Cloning is cheap for a row of a dataset.
///
/// ```
/// use qlora_nb::dataset::Example;
/// let example = Example::new().with("instruction", "写一首诗").with("ids", vec![1u32, 2]);
/// assert_eq!(example.text("instruction")?, "写一首诗");
/// assert_eq!(example.ints("ids")?, [1, 2]);
/// assert!(example.text("output").is_err());
/// # Ok::<(), qlora_nb::error::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Example(Row);

#[derive(Clone, Debug)]
enum Row {
    /// A row of a table; `row` counts in the dataset that handed it out.
    Stored { table: Arc<Table>, place: usize, row: usize },
    /// A row made by hand.
    Made(Vec<(String, Value)>),
}

impl Default for Row {
    fn default() -> Self {
        Row::Made(Vec::new())
    }
}

impl Example {
    /// A row with no columns yet: `Example::new().with("text", "...")`.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn stored(table: &Arc<Table>, place: usize, row: usize) -> Self {
        Self(Row::Stored { table: table.clone(), place, row })
    }

    /// The row with a column set: changed in its place, or added at the end.
    pub fn with(&self, column: &str, value: impl Into<Value>) -> Self {
        let mut fields = self.fields();
        let value = value.into();
        match fields.iter_mut().find(|(name, _)| name == column) {
            Some((_, old)) => *old = value,
            None => fields.push((column.into(), value)),
        }
        Self(Row::Made(fields))
    }

    /// The row without a column.
    pub fn without(&self, column: &str) -> Self {
        Self(Row::Made(self.fields().into_iter().filter(|(name, _)| name != column).collect()))
    }

    pub fn column_names(&self) -> Vec<String> {
        match &self.0 {
            Row::Stored { table, .. } => table.column_names(),
            Row::Made(fields) => fields.iter().map(|(name, _)| name.clone()).collect(),
        }
    }

    /// All columns and their values, in order.
    pub fn fields(&self) -> Vec<(String, Value)> {
        match &self.0 {
            Row::Made(fields) => fields.clone(),
            Row::Stored { table, place, .. } => {
                let read = |(i, name)| {
                    let (array, offset) = table.cell(i, *place);
                    (name, value::read(array, offset))
                };
                table.column_names().into_iter().enumerate().map(read).collect()
            }
        }
    }

    /// The value of any column.
    ///
    /// # Errors
    /// [`Error::MissingColumn`]; the typed accessors below also give [`Error::ColumnType`].
    pub fn value(&self, column: &str) -> Result<Value> {
        Ok(match self.cell(column)? {
            Cell::Stored(array, i) => value::read(array, i),
            Cell::Made(value) => value.clone(),
        })
    }

    /// Whether the column has no value in this row (JSON `null`, Python `None`).
    pub fn is_null(&self, column: &str) -> Result<bool> {
        Ok(self.value(column)? == Value::Null)
    }

    /// A text column.
    pub fn text(&self, column: &str) -> Result<&str> {
        match self.cell(column)? {
            Cell::Stored(array, i) if array.is_valid(i) => match array.data_type() {
                DataType::Utf8 => return Ok(array.as_string::<i32>().value(i)),
                DataType::LargeUtf8 => return Ok(array.as_string::<i64>().value(i)),
                _ => {}
            },
            Cell::Made(Value::Text(text)) => return Ok(text),
            _ => {}
        }
        Err(self.wrong_type(column, "string"))
    }

    /// A text column, with a default for rows that have no value: `ex.text_or("input", "")`.
    /// A column that is not there is still an error.
    pub fn text_or<'a>(&'a self, column: &str, default: &'a str) -> Result<&'a str> {
        if self.is_null(column)? { Ok(default) } else { self.text(column) }
    }

    /// An integer column of any width.
    pub fn int(&self, column: &str) -> Result<i64> {
        self.value(column)?.as_int().ok_or_else(|| self.wrong_type(column, "an integer"))
    }

    /// A column of floats or integers.
    pub fn float(&self, column: &str) -> Result<f64> {
        self.value(column)?.as_float().ok_or_else(|| self.wrong_type(column, "a number"))
    }

    /// A column of booleans.
    pub fn bool(&self, column: &str) -> Result<bool> {
        self.value(column)?.as_bool().ok_or_else(|| self.wrong_type(column, "bool"))
    }

    /// A column of lists of integers of any width, without nulls.
    pub fn ints(&self, column: &str) -> Result<Vec<i64>> {
        let ints = match self.cell(column)? {
            Cell::Stored(array, i) => stored_ints(array, i),
            Cell::Made(Value::List(items)) => items.iter().map(Value::as_int).collect(),
            Cell::Made(_) => None,
        };
        ints.ok_or_else(|| self.wrong_type(column, "a list of integers"))
    }

    /// A row of a tokenized dataset: the columns `input_ids`, `attention_mask` and `labels`.
    pub fn features(&self) -> Result<Features> {
        let unsigned = |column: &str| {
            let ids = self.ints(column)?.into_iter().map(u32::try_from).collect::<Result<Vec<u32>, _>>();
            ids.map_err(|_| self.wrong_type(column, "a list of integers that are not negative"))
        };
        let features = Features {
            input_ids: unsigned("input_ids")?,
            attention_mask: unsigned("attention_mask")?,
            labels: self.ints("labels")?,
        };
        features.check(self.row().unwrap_or(0))?;
        Ok(features)
    }

    /// The row's number in its dataset; none for a row made by hand.
    pub fn row(&self) -> Option<usize> {
        match self.0 {
            Row::Stored { row, .. } => Some(row),
            Row::Made(_) => None,
        }
    }

    fn cell(&self, column: &str) -> Result<Cell<'_>> {
        let missing = || {
            let available = self.column_names();
            Error::MissingColumn { column: column.into(), row: self.row(), available }
        };
        let cell = match &self.0 {
            Row::Stored { table, place, .. } => {
                let found = table.schema.fields().iter().position(|f| f.name() == column);
                found.map(|i| table.cell(i, *place)).map(|(array, offset)| Cell::Stored(array, offset))
            }
            Row::Made(fields) => fields.iter().find(|(name, _)| name == column).map(|(_, value)| Cell::Made(value)),
        };
        cell.ok_or_else(missing)
    }

    fn wrong_type(&self, column: &str, expected: &str) -> Error {
        let got = match self.cell(column) {
            Ok(Cell::Stored(array, i)) if array.is_valid(i) => value::type_name(array.data_type()),
            Ok(Cell::Made(value)) if *value != Value::Null => value.type_name().into(),
            _ if expected == "string" => {
                format!("null, a missing value (text_or({column:?}, \"\") reads it as an empty text)")
            }
            _ => "null, a missing value".into(),
        };
        Error::ColumnType { column: column.into(), row: self.row(), expected: expected.into(), got }
    }
}

enum Cell<'a> {
    Stored(&'a ArrayRef, usize),
    Made(&'a Value),
}

fn stored_ints(array: &ArrayRef, i: usize) -> Option<Vec<i64>> {
    if array.is_null(i) {
        return None;
    }
    let items = value::items(array, i)?;
    // A list without items may carry no item type.
    if items.is_empty() {
        return Some(Vec::new());
    }
    if items.null_count() > 0 || !items.data_type().is_integer() {
        return None;
    }
    let items = cast(&items, &DataType::Int64).ok()?;
    (items.null_count() == 0).then(|| items.as_primitive::<Int64Type>().values().to_vec())
}

/// `{'instruction': '...', 'output': '...'}`, as Python prints `ds[i]`.
impl fmt::Display for Example {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&py_dict(self.fields()))
    }
}

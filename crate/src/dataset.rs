//! Step 2: data. Rows with named columns, loaded from disk, looked at, chosen and mapped.
//!
//! The names are those of Hugging Face `datasets`, and so are the folders, the printed forms
//! and, for a seed, the row orders. A [`Dataset`] is a list of row numbers over shared Arrow
//! columns: `select`, `shuffle`, `filter` and `slice` copy no data, and cloning is cheap.

mod dict;
mod disk;
mod example;
mod features;
mod formats;
mod ipc;
mod order;
mod show;
mod table;
mod value;

use std::{
    collections::HashSet,
    ops::{Bound, Range, RangeBounds},
    sync::Arc,
};

pub use self::{dict::DatasetDict, example::Example, features::FeatureTypes, value::Value};
use self::{features::TokenColumns, table::Table};
use crate::{
    display::{Progress, notice},
    error::{Error, Result, ensure},
    features::{Features, noting_cuts},
    interrupt,
};

/// Rows with named columns.
///
/// ```
/// use qlora_nb::prelude::*;
/// let ds = Dataset::from_columns([("text", vec!["春眠不觉晓", "处处闻啼鸟", "夜来风雨声"])])?;
/// assert_eq!(ds.to_string(), "Dataset({\n    features: ['text'],\n    num_rows: 3\n})");
/// assert_eq!(ds.slice(0..1).to_string(), "{'text': ['春眠不觉晓']}");
/// let birds = ds.filter(|ex| Ok(ex.text("text")?.contains('鸟')))?;
/// assert_eq!(birds.get(0)?.text("text")?, "处处闻啼鸟");
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Dataset {
    table: Arc<Table>,
    /// Numbers of rows of the table; None: all of them as they lie there.
    order: Option<Arc<[usize]>>,
    /// Which part of the order this dataset is.
    range: Range<usize>,
    /// `ds[:n]` of Python is a dict of its rows: `slice` and `head` print so, all else as a summary.
    prints_rows: bool,
}

impl Dataset {
    fn of(table: Table) -> Self {
        Self { range: 0..table.num_rows(), table: Arc::new(table), order: None, prints_rows: false }
    }

    /// A dataset from columns in memory: names and lists of one length.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for lists of different lengths, a name given twice, or values
    /// of types that do not go together.
    pub fn from_columns<N, C, V>(columns: impl IntoIterator<Item = (N, C)>) -> Result<Self>
    where
        N: Into<String>,
        C: IntoIterator<Item = V>,
        V: Into<Value>,
    {
        let (names, columns): (Vec<String>, Vec<Vec<Value>>) =
            columns.into_iter().map(|(n, c)| (n.into(), c.into_iter().map(Into::into).collect())).unzip();
        if let Some((i, name)) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
            let column = format!("column {i}");
            return Err(Error::argument(&column, name, "a name of its own", "rename one of the columns"));
        }
        let rows = columns.first().map_or(0, Vec::len);
        if let Some((name, column)) = names.iter().zip(&columns).find(|(_, column)| column.len() != rows) {
            let expected = format!("{rows} values, as many as {:?} has", names[0]);
            return Err(Error::argument(name, column.len(), &expected, "give every column one value a row"));
        }
        Self::from_values(&names, &columns)
    }

    /// A dataset from rows in memory, which must all have the same columns.
    pub fn from_rows(rows: impl IntoIterator<Item = Example>) -> Result<Self> {
        let rows: Vec<Example> = rows.into_iter().collect();
        let names = rows.first().map(Example::column_names).unwrap_or_default();
        let mut columns: Vec<Vec<Value>> = vec![Vec::with_capacity(rows.len()); names.len()];
        for (i, example) in rows.into_iter().enumerate() {
            for (column, name) in columns.iter_mut().zip(&names) {
                column.push(example.value(name).map_err(|e| e.at_row(i))?);
            }
            if let Some(extra) = example.column_names().iter().find(|name| !names.contains(name)) {
                let expected = format!("the columns of row 0, {names:?}");
                return Err(Error::argument("column", extra, &expected, "give every row the same columns").at_row(i));
            }
        }
        Self::from_values(&names, &columns)
    }

    fn from_values(names: &[String], columns: &[Vec<Value>]) -> Result<Self> {
        let wrong = |(row, name, why): (usize, String, String)| {
            Error::argument(&name, why, "values of one type", "convert the values to one type first").at_row(row)
        };
        Ok(Self::of(Table::from_values(names, columns).map_err(wrong)?))
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// The number of rows.
    pub fn num_rows(&self) -> usize {
        self.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn column_names(&self) -> Vec<String> {
        self.table.column_names()
    }

    /// The columns' names and types.
    pub fn features(&self) -> FeatureTypes {
        FeatureTypes::of(&self.table.schema)
    }

    /// One row.
    pub fn get(&self, i: usize) -> Result<Example> {
        self.check_row(i)?;
        Ok(self.example(i))
    }

    fn example(&self, i: usize) -> Example {
        Example::stored(&self.table, self.table_row(i), i)
    }

    /// The table's row behind this dataset's row `i`, which must exist.
    fn table_row(&self, i: usize) -> usize {
        let i = self.range.start + i;
        self.order.as_ref().map_or(i, |order| order[i])
    }

    fn check_row(&self, i: usize) -> Result<()> {
        if i < self.len() {
            return Ok(());
        }
        let remedy = "count rows from 0".into();
        Err(Error::OutOfRange { what: "row".into(), got: i.to_string(), len: self.len(), remedy })
    }

    /// All rows in order: `for ex in ds.iter() { ... }`.
    pub fn iter(&self) -> impl Iterator<Item = Example> + '_ {
        (0..self.len()).map(|i| self.example(i))
    }

    /// One column's values.
    pub fn column(&self, name: &str) -> Result<Vec<Value>> {
        self.find_column(name)?;
        self.iter().map(|ex| ex.value(name)).collect()
    }

    fn find_column(&self, name: &str) -> Result<usize> {
        let names = self.column_names();
        let found = names.iter().position(|n| n == name);
        found.ok_or_else(|| Error::MissingColumn { column: name.into(), row: None, available: names })
    }

    /// Rows by number, in the order given; a row may come twice.
    pub fn select(&self, rows: &[usize]) -> Result<Self> {
        rows.iter().try_for_each(|&i| self.check_row(i))?;
        Ok(self.pick(rows.iter().copied()))
    }

    fn pick(&self, rows: impl Iterator<Item = usize>) -> Self {
        let order: Arc<[usize]> = rows.map(|i| self.table_row(i)).collect();
        Self { table: self.table.clone(), range: 0..order.len(), order: Some(order), prints_rows: false }
    }

    /// A range of rows. As in Python, what lies beyond the end is left out. It prints its rows
    /// (as `ds[:1]` does there) and is a dataset in every other way.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Self {
        let len = self.len();
        let start = match range.start_bound() {
            Bound::Included(&i) => i,
            Bound::Excluded(&i) => i.saturating_add(1),
            Bound::Unbounded => 0,
        }
        .min(len);
        let end = match range.end_bound() {
            Bound::Included(&i) => i.saturating_add(1),
            Bound::Excluded(&i) => i,
            Bound::Unbounded => len,
        }
        .clamp(start, len);
        Self { range: self.range.start + start..self.range.start + end, prints_rows: true, ..self.clone() }
    }

    /// The first `n` rows.
    pub fn head(&self, n: usize) -> Self {
        self.slice(..n)
    }

    /// The rows in a random order: the order that Python's `ds.shuffle(seed=seed)` gives.
    pub fn shuffle(&self, seed: u64) -> Self {
        self.pick(order::permutation(self.len(), seed).into_iter())
    }

    /// Splits the rows at random into "train" and "test": the rows that Python's
    /// `ds.train_test_split(test_size=test_size, seed=seed)` gives. `test_size` is a fraction.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a part would be empty.
    pub fn train_test_split(&self, test_size: f64, seed: u64) -> Result<DatasetDict> {
        let tests = (test_size * self.len() as f64).ceil();
        let expected = format!("a fraction between 0 and 1 that leaves rows in both parts of {}", self.len());
        ensure(tests >= 1.0 && tests < self.len() as f64, "test_size", test_size, &expected, "use 0.1")?;
        let order = order::permutation(self.len(), seed);
        let (test, train) = order.split_at(tests as usize);
        let part = |rows: &[usize]| self.pick(rows.iter().copied());
        Ok(DatasetDict::new([("train", part(train)), ("test", part(test))]))
    }

    /// The rows for which `keep` says true.
    ///
    /// # Errors
    /// [`Error::Row`] with the first row on which `keep` failed.
    pub fn filter(&self, mut keep: impl FnMut(&Example) -> Result<bool>) -> Result<Self> {
        self.filter_dyn(&mut keep)
    }

    fn filter_dyn(&self, keep: &mut dyn FnMut(&Example) -> Result<bool>) -> Result<Self> {
        let mut kept = Vec::new();
        self.each_row("Filter", |i, example| {
            if keep(example).map_err(|e| e.at_row(i))? {
                kept.push(i);
            }
            Ok(())
        })?;
        Ok(self.pick(kept.into_iter()))
    }

    /// Tokenizes: `f` makes [`Features`] of each row, and the columns of the new dataset are
    /// `input_ids`, `attention_mask` and `labels`. Rows that [`Features::supervised`] cut to its
    /// `max_length` are counted ([`truncated_rows`](Self::truncated_rows)) and reported on stderr.
    ///
    /// # Errors
    /// [`Error::Row`] with the first row on which `f` failed; [`Error::EmptySequence`] and
    /// [`Error::UnequalLengths`] for what cannot be trained on. This dataset stays as it was.
    pub fn map(&self, mut f: impl FnMut(&Example) -> Result<Features>) -> Result<Self> {
        self.map_dyn(&mut f)
    }

    fn map_dyn(&self, f: &mut dyn FnMut(&Example) -> Result<Features>) -> Result<Self> {
        let mut columns = TokenColumns::default();
        let mut cut = HashSet::new();
        let mut answers_lost = 0;
        self.each_row("Map", |i, example| {
            let (features, was_cut) = noting_cuts(|| f(example));
            let features = features.map_err(|e| e.at_row(i))?;
            features.check(i)?;
            if was_cut {
                cut.insert(i);
                answers_lost += usize::from(!features.has_labels());
            }
            columns.push(features, i)
        })?;
        if !cut.is_empty() {
            let lost = match answers_lost {
                0 => String::new(),
                n => format!("; {n} of them have no token of their answer left"),
            };
            notice(&format!("{} of {} rows were longer than max_length and were cut{lost}", cut.len(), self.len()));
        }
        Ok(Self::of(columns.finish(cut)?))
    }

    /// Makes a new row of each row; all new rows must have the same columns.
    ///
    /// # Errors
    /// [`Error::Row`] with the first row on which `f` failed.
    pub fn map_examples(&self, mut f: impl FnMut(&Example) -> Result<Example>) -> Result<Self> {
        self.map_examples_dyn(&mut f)
    }

    fn map_examples_dyn(&self, f: &mut dyn FnMut(&Example) -> Result<Example>) -> Result<Self> {
        let mut rows = Vec::with_capacity(self.len());
        self.each_row("Map", |i, example| {
            rows.push(f(example).map_err(|e| e.at_row(i))?);
            Ok(())
        })?;
        Self::from_rows(rows)
    }

    /// Runs `f` on the rows in order, with progress; an interrupt stops it between two rows.
    fn each_row(&self, what: &str, mut f: impl FnMut(usize, &Example) -> Result<()>) -> Result<()> {
        let _guard = interrupt::Guard::new()?;
        let progress = Progress::new(what, self.len(), "rows");
        for (i, example) in self.iter().enumerate() {
            interrupt::check(what)?;
            f(i, &example)?;
            progress.inc(1);
        }
        progress.finish();
        Ok(())
    }

    /// How many rows lost tokens to `max_length` when [`map`](Self::map) made them.
    pub fn truncated_rows(&self) -> usize {
        if self.table.cut.is_empty() {
            return 0;
        }
        (0..self.len()).filter(|&i| self.table.cut.contains(&self.table_row(i))).count()
    }

    /// Only the named columns, in the order given.
    pub fn select_columns(&self, names: &[&str]) -> Result<Self> {
        let columns = names.iter().map(|&n| Ok((self.find_column(n)?, n.into()))).collect::<Result<Vec<_>>>()?;
        self.project(&columns)
    }

    /// All but the named columns.
    pub fn remove_columns(&self, names: &[&str]) -> Result<Self> {
        names.iter().try_for_each(|n| self.find_column(n).map(|_| ()))?;
        let columns = self.column_names().into_iter().enumerate().filter(|(_, n)| !names.contains(&n.as_str()));
        self.project(&columns.collect::<Vec<_>>())
    }

    /// The same dataset with one column renamed.
    pub fn rename_column(&self, from: &str, to: &str) -> Result<Self> {
        let renamed = self.find_column(from)?;
        let mut columns: Vec<(usize, String)> = self.column_names().into_iter().enumerate().collect();
        let is_free = from == to || columns.iter().all(|(_, name)| name != to);
        ensure(is_free, "to", to, "a name that no column has", "remove_columns that one first")?;
        columns[renamed].1 = to.into();
        self.project(&columns)
    }

    fn project(&self, columns: &[(usize, String)]) -> Result<Self> {
        let table = self.table.project(columns).map_err(|e| {
            Error::argument("columns", format!("{columns:?}"), "columns that can be chosen", &e.to_string())
        })?;
        Ok(Self { table: Arc::new(table), ..self.clone() })
    }
}

//! Datasets by split name: what `train_test_split` gives and what a hub dataset is saved as.

use std::fmt;

use super::{Dataset, show};
use crate::{
    display::Forms,
    error::{Error, Result, near_names},
};

/// Named splits, in order.
///
/// ```
/// use qlora_nb::prelude::*;
/// let ds = Dataset::from_columns([("n", 0i64..10)])?;
/// let splits = ds.train_test_split(0.2, 42)?;
/// assert_eq!(splits.get("train")?.num_rows(), 8);
/// assert_eq!(splits.get("test")?.column("n")?, [Value::Int(5), Value::Int(6)]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct DatasetDict(Vec<(String, Dataset)>);

impl DatasetDict {
    /// A later split of the same name replaces an earlier one.
    pub fn new<N: Into<String>>(splits: impl IntoIterator<Item = (N, Dataset)>) -> Self {
        let mut dict = Self::default();
        for (name, dataset) in splits {
            let name = name.into();
            match dict.0.iter_mut().find(|(n, _)| *n == name) {
                Some((_, old)) => *old = dataset,
                None => dict.0.push((name, dataset)),
            }
        }
        dict
    }

    /// A split by name; the dataset is cheap to clone.
    pub fn get(&self, split: &str) -> Result<Dataset> {
        let found = self.0.iter().find(|(name, _)| name == split).map(|(_, dataset)| dataset.clone());
        found.ok_or_else(|| {
            let splits = self.splits();
            let near = near_names(split, &splits);
            let near = near.first().map(|near| format!("; did you mean {near:?}?")).unwrap_or_default();
            let remedy = format!("use one of its names{near}");
            Error::unsupported("split", split, splits, &remedy)
        })
    }

    /// The names of the splits.
    pub fn splits(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Dataset)> {
        self.0.iter().map(|(name, dataset)| (name.as_str(), dataset))
    }

    /// What a notebook shows: a table a split.
    pub fn forms(&self) -> Forms {
        vec![("text/html", show::dict_html(self)), ("text/plain", self.to_string())]
    }
}

impl fmt::Display for DatasetDict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DatasetDict({\n")?;
        for (name, dataset) in &self.0 {
            writeln!(f, "    {name}: {}", show::summary(dataset).replace('\n', "\n    "))?;
        }
        f.write_str("})")
    }
}

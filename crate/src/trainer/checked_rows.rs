//! The tokenized rows of a run: looked through before training, batched during it.

use crate::{
    backend::dropout::mix,
    batch::Batch,
    collator::DataCollatorForSeq2Seq,
    dataset::Dataset,
    display,
    error::{Error, Result, ensure},
    features::{Features, IGNORE_INDEX},
    interrupt,
};

/// A dataset that a model can be trained or evaluated on.
#[derive(Clone, Debug)]
pub(super) struct CheckedRows {
    dataset: Dataset,
    collator: DataCollatorForSeq2Seq,
    /// Names the content: equal for equal rows in the same order.
    pub fingerprint: String,
    /// Tokens and labels of each row.
    sizes: Vec<(usize, usize)>,
}

impl CheckedRows {
    /// Reads every row once, so that what is wrong with row 20,000 is said before row 0 is trained on.
    ///
    /// # Errors
    /// No rows; a missing column; a row of length 0 or with fields of different lengths; a
    /// token id or label beyond the vocabulary; no label at all.
    pub fn check(dataset: &Dataset, collator: &DataCollatorForSeq2Seq, vocab_size: usize) -> Result<Self> {
        let remedy = "check the filter or slice that made it";
        ensure(!dataset.is_empty(), "dataset", "0 rows", "at least one row", remedy)?;
        let (mut hash, mut without_labels) = (0, Vec::new());
        let mut sizes = Vec::with_capacity(dataset.len());
        for row in 0..dataset.len() {
            interrupt::check("looking through the rows")?;
            let features = dataset.get(row)?.features()?;
            features.check(row)?;
            check_ids(&features, row, vocab_size)?;
            if !features.has_labels() {
                without_labels.push(row);
            }
            sizes.push((features.len(), features.labels.iter().filter(|&&l| l != IGNORE_INDEX).count()));
            hash = fold(hash, &features);
        }
        let (rows, total) = (without_labels.len(), dataset.len());
        let first: Vec<usize> = without_labels.into_iter().take(5).collect();
        if rows == total {
            let remedy = "raise MAX_LENGTH: the answers may be cut off; or check that labels are the answer's ids";
            return Err(Error::NothingToLearn { rows, total, first, remedy: remedy.into() });
        }
        if rows > 0 {
            display::warning(&format!(
                "{rows} of {total} rows have no label to learn from (all are -100), the first are {first:?}: they \
                 take time and teach nothing; an answer beyond MAX_LENGTH is the usual cause"
            ));
        }
        // A batch of unequal rows needs a padding token: found here, not in the middle of training.
        let lengths = sizes.iter().map(|(tokens, _)| *tokens);
        let (shortest, longest) = (lengths.clone().min().unwrap_or(0), lengths.max().unwrap_or(0));
        if shortest != longest {
            let row = |n: usize| Features { input_ids: vec![0; n], attention_mask: vec![1; n], labels: vec![0; n] };
            collator.collate(&[&row(shortest), &row(longest)])?;
        }
        let fingerprint = format!("{total} rows, content {hash:016x}");
        Ok(Self { dataset: dataset.clone(), collator: collator.clone(), fingerprint, sizes })
    }

    pub fn len(&self) -> usize {
        self.dataset.len()
    }

    /// Tokens and labels of a row.
    pub fn size(&self, row: usize) -> (usize, usize) {
        self.sizes[row]
    }

    /// The given rows as one batch.
    pub fn batch(&self, rows: &[usize]) -> Result<Batch> {
        let features = rows.iter().map(|&i| self.dataset.get(i)?.features()).collect::<Result<Vec<Features>>>()?;
        self.collator.collate(&features.iter().collect::<Vec<_>>())
    }

    /// What a checkpoint has to agree on: padding can move a float's last bit.
    pub fn collator(&self) -> String {
        format!("{:?}", self.collator)
    }
}

fn check_ids(features: &Features, row: usize, vocab_size: usize) -> Result<()> {
    let ids = features.input_ids.iter().map(|&id| i64::from(id)).enumerate();
    let labels = features.labels.iter().copied().enumerate().filter(|(_, label)| *label != IGNORE_INDEX);
    match ids.chain(labels).find(|(_, id)| *id < 0 || *id as usize >= vocab_size) {
        Some((position, id)) => Err(Error::TokenId { row, position, id, vocab_size }),
        None => Ok(()),
    }
}

fn fold(hash: u64, features: &Features) -> u64 {
    let ids = features.input_ids.iter().map(|&id| u64::from(id));
    let mask = features.attention_mask.iter().map(|&m| u64::from(m));
    let labels = features.labels.iter().map(|&l| l as u64);
    // The length first: [1, 2] [3] and [1] [2, 3] are different rows.
    ids.chain(mask).chain(labels).fold(mix(hash ^ features.len() as u64), |h, value| mix(h ^ value))
}

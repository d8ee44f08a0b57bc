//! Everything that the eight steps name: `use qlora_nb::prelude::*;`

pub use crate::{
    collator::DataCollatorForSeq2Seq,
    dataset::{Dataset, DatasetDict, Example, Value},
    error::{Error, Result},
    features::{Encoding, Features},
    tokenizer::{AutoTokenizer, PaddingSide, Tokenizer},
};

//! Steps 2 and 3, and the collator: the same rows, tokens and batches as in Python.

mod chat;
mod damaged;
mod formats;
mod load;
mod map;
mod round_trip;
mod tokenizer;

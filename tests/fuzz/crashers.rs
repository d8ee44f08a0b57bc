//! Inputs that once ended a reader.

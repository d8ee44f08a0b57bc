//! Completion and inspection.

//! Workers: one process per loaded model.

pub mod protocol;

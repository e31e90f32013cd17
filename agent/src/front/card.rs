//! What the listeners can say of a model without asking its worker: also while it is unloaded.

use std::time::Duration;

use crate::store::GgufHeader;

/// What is known of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelCard {
    /// Its file, when it is there.
    pub file: Option<FileCard>,
    /// Bytes that its worker takes, on all devices together; 0 without a worker.
    pub memory_bytes: u64,
    /// Of these, the ones that are not on the CPU.
    pub device_bytes: u64,
    /// Tokens that one request may use, as its worker says; 0 without a worker.
    pub max_tokens: u32,
    /// Time without a request after which its policy unloads it; `None`: never.
    pub idle_limit: Option<Duration>,
    /// Its policy is `Never`: no `keep_alive` unloads it.
    pub is_pinned: bool,
}

/// A model's file.
#[derive(Clone, Debug, PartialEq)]
pub struct FileCard {
    /// What its header says.
    pub header: GgufHeader,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// Its digest in hexadecimal, where it is known.
    pub sha256: Option<String>,
}

//! Files that must be refused, each for a reason of its own.

use std::fs;
use std::path::Path;

use crate::{Error, Spec};

/// A file that is wrong in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BadFile {
    /// A web page where a model was expected.
    NotGguf,
    /// Nothing at all.
    Empty,
    /// A good file whose second half is missing.
    Truncated,
    /// A good file that ends within its metadata.
    TruncatedHeader,
    /// A string in the metadata that claims to be 2^60 bytes long.
    CorruptHeader,
    /// A GGUF of a later version of the format.
    UnknownVersion,
    /// A well-formed file of an architecture that does not exist.
    UnknownArchitecture,
    /// A well-formed file that says it has no layers: llama.cpp does not return an error, it aborts.
    NoLayers,
    /// A well-formed header with a tensor's name missing that the architecture needs.
    MissingTensor,
}

impl BadFile {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::NotGguf,
        Self::Empty,
        Self::Truncated,
        Self::TruncatedHeader,
        Self::CorruptHeader,
        Self::UnknownVersion,
        Self::UnknownArchitecture,
        Self::NoLayers,
        Self::MissingTensor,
    ];

    /// Writes the file at `path`; `spec` is the model that went wrong.
    pub fn write(self, spec: &Spec, path: &Path) -> Result<(), Error> {
        let bytes = match self {
            Self::NotGguf => b"<!doctype html><html><body><h1>404 Not Found</h1></body></html>\n".to_vec(),
            Self::Empty => Vec::new(),
            _ => {
                spec.write(path)?;
                self.spoil(fs::read(path)?)
            }
        };
        Ok(fs::write(path, bytes)?)
    }

    fn spoil(self, mut good: Vec<u8>) -> Vec<u8> {
        // After magic (4), version (4), tensor count (8) and key count (8) the first key's length stands at 24.
        match self {
            Self::NotGguf | Self::Empty => {}
            Self::Truncated => good.truncate(good.len() / 2),
            Self::TruncatedHeader => good.truncate(200),
            Self::CorruptHeader => overwrite(&mut good, 24, &(1u64 << 60).to_le_bytes()),
            Self::UnknownVersion => overwrite(&mut good, 4, &9u32.to_le_bytes()),
            Self::UnknownArchitecture => replace(&mut good, b"llama", b"guana"),
            Self::NoLayers => zero_value(&mut good, b"llama.block_count"),
            Self::MissingTensor => replace(&mut good, b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"),
        }
        good
    }
}

fn overwrite(bytes: &mut [u8], at: usize, new: &[u8]) {
    bytes[at..at + new.len()].copy_from_slice(new);
}

/// Replaces every occurrence in the header by something of the same length.
fn replace(bytes: &mut [u8], old: &[u8], new: &[u8]) {
    let end = bytes.len().min(1 << 20);
    for at in 0..end.saturating_sub(old.len()) {
        if bytes[at..].starts_with(old) {
            overwrite(bytes, at, new);
        }
    }
}

/// Sets the 32-bit value of a key to zero.
fn zero_value(bytes: &mut [u8], key: &[u8]) {
    if let Some(at) = bytes.windows(key.len()).position(|w| w == key) {
        overwrite(bytes, at + key.len() + 4, &[0; 4]);
    }
}

//! A tensor of the file.

use crate::spec::Quantization;
use crate::weights::Filling;

/// One tensor: its shape in the file's order (the first number is the length of a row).
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) kind: Quantization,
    pub(crate) filling: Filling,
}

impl Tensor {
    pub(crate) fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Length in the file, without padding.
    pub(crate) fn bytes(&self) -> u64 {
        self.kind.bytes(self.elements())
    }

    pub(crate) fn rows(&self) -> u64 {
        self.shape.iter().skip(1).product()
    }
}

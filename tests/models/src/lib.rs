//! GGUF files for Altiplano's tests, benchmarks and demo, made without llama.cpp.
//!
//! * [`Spec`] describes a model with random weights; [`Spec::write`] writes it, also at realistic sizes, in constant
//!   memory. Equal specs give equal bytes.
//! * [`Lora`] writes an adapter with random weights, [`Projector`] a projector (mmproj).
//! * [`BadFile`] writes the files that must be refused: not a GGUF, truncated, corrupt, of an unknown architecture.
//! * [`toy`] is a trained chat model of two megabytes whose greedy answers are known.
//!
//! A leaf crate on purpose: any other crate may take it as a dev-dependency.

mod bad;
mod bert;
mod decoder;
mod gguf;
mod gpt2;
mod header;
mod lora;
mod mamba;
mod projector;
mod qwen35;
mod spec;
mod tensor;
pub mod toy;
mod vocab;
mod weights;

pub use bad::BadFile;
pub use lora::Lora;
pub use projector::{Projector, ProjectorKind};
pub use spec::{Architecture, CHATML, MtpHead, Pooling, Quantization, Spec, Tokenizer};

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The spec describes no model that llama.cpp could load.
    #[error("invalid model spec: {0}")]
    Invalid(String),
    /// The disk said no.
    #[error("cannot write the model file")]
    Io(#[from] std::io::Error),
}

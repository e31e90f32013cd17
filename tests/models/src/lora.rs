//! LoRA adapters with random weights.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::gguf::Header;
use crate::spec::Quantization;
use crate::tensor::Tensor;
use crate::weights::{self, Filling};
use crate::{Error, Spec};

/// An adapter for a llama-like model: it changes the queries of every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// `general.architecture` of the model.
    pub architecture: String,
    /// Transformer blocks of the model.
    pub layers: u32,
    /// Width of the model.
    pub embd: u32,
    /// Rank of the matrices.
    pub rank: u32,
    /// How much it changes: 1 is as much as the model's own weights say.
    pub strength: f32,
    /// Seed of the weights.
    pub seed: u64,
}

impl Lora {
    /// An adapter of rank 4 for a generated model.
    #[must_use]
    pub fn of(spec: &Spec) -> Self {
        let Spec { architecture, layers, embd, .. } = *spec;
        Self { architecture: architecture.name().to_owned(), layers, embd, rank: 4, strength: 1.0, seed: 1 }
    }

    /// The same for the toy model.
    #[must_use]
    pub fn of_toy() -> Self {
        Self { architecture: "llama".to_owned(), layers: 4, embd: 192, rank: 4, strength: 1.0, seed: 1 }
    }

    /// Writes the file at `path` and returns its length in bytes.
    pub fn write(&self, path: &Path) -> Result<u64, Error> {
        let Self { ref architecture, layers, embd, rank, strength, seed } = *self;
        let (embd, rank) = (u64::from(embd), u64::from(rank));
        let matrix = |name: String, columns: u64, rows: u64, gain: f32| Tensor {
            name,
            shape: vec![columns, rows],
            kind: Quantization::F32,
            filling: Filling::Random { gain },
        };
        let tensors = (0..layers).flat_map(|layer| {
            let name = format!("blk.{layer}.attn_q.weight");
            [matrix(format!("{name}.lora_a"), embd, rank, 1.0), matrix(format!("{name}.lora_b"), rank, embd, strength)]
        });
        let tensors: Vec<Tensor> = tensors.collect();
        let mut header = Header::default();
        header.string("general.architecture", architecture);
        header.string("general.type", "adapter");
        header.string("general.name", "Altiplano Random Adapter");
        header.string("adapter.type", "lora");
        #[expect(clippy::cast_precision_loss, reason = "a rank is small")]
        header.f32("adapter.lora.alpha", rank as f32);
        for tensor in &tensors {
            header.tensor(&tensor.name, &tensor.shape, tensor.kind.ggml_type(), tensor.bytes());
        }
        let header = header.finish();
        let mut bytes = header.len() as u64;
        let mut out = BufWriter::new(File::create(path)?);
        out.write_all(&header)?;
        for tensor in &tensors {
            bytes += weights::write(&mut out, tensor, seed, |_| false)?;
        }
        out.flush()?;
        Ok(bytes)
    }
}

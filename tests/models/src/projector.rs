//! Projectors (mmproj) with random weights: a small vision transformer that makes embeddings of an image.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::gguf::Header;
use crate::spec::{Quantization, Tensor};
use crate::weights::{self, Filling};
use crate::{Error, Spec};

/// How the embeddings come about, as mtmd knows it: `clip.projector_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProjectorKind {
    /// `LLaVA`'s: images of one size, a token for each patch, read like text.
    Mlp,
    /// Gemma 3's: images of one size, a token for each four patches, of which each sees all others.
    Gemma3,
    /// Qwen2-VL's: images of any size, a token for each four patches, with positions in two dimensions (M-RoPE); for
    /// models of [`Architecture::Qwen2vl`](crate::Architecture::Qwen2vl).
    Qwen2vl,
}

impl ProjectorKind {
    fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
            Self::Gemma3 => "gemma3",
            Self::Qwen2vl => "qwen2vl_merger",
        }
    }
}

/// A projector with random weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Projector {
    /// What it is like.
    pub kind: ProjectorKind,
    /// Width of the model that reads the embeddings.
    pub model_embd: u32,
    /// Pixels of an image's side; a multiple of twice `patch_size`.
    pub image_size: u32,
    /// Pixels of a patch's side.
    pub patch_size: u32,
    /// Width of the encoder.
    pub embd: u32,
    /// Attention heads; divides `embd`.
    pub heads: u32,
    /// Width of the feed-forward part.
    pub ff: u32,
    /// Transformer blocks.
    pub layers: u32,
    /// Seed of the weights.
    pub seed: u64,
}

impl Projector {
    /// A projector for a generated model: an image of 64 × 64 pixels has 64 patches of 8 × 8.
    #[must_use]
    pub fn of(kind: ProjectorKind, spec: &Spec) -> Self {
        Self {
            kind,
            model_embd: spec.embd,
            image_size: 64,
            patch_size: 8,
            embd: 32,
            heads: 2,
            ff: 64,
            layers: 2,
            seed: 1,
        }
    }

    /// The same for the toy model.
    #[must_use]
    pub fn of_toy(kind: ProjectorKind) -> Self {
        Self { model_embd: 192, ..Self::of(kind, &Spec::default()) }
    }

    /// Tokens that an image of the projector's own size becomes.
    #[must_use]
    pub fn image_tokens(&self) -> u32 {
        let patches = (self.image_size / self.patch_size).pow(2);
        if self.kind == ProjectorKind::Mlp { patches } else { patches / 4 }
    }

    /// Writes the file at `path` and returns its length in bytes.
    pub fn write(&self, path: &Path) -> Result<u64, Error> {
        let side = self.patch_size * 2;
        if side == 0 || !self.image_size.is_multiple_of(side) || !self.embd.is_multiple_of(self.heads * 4) {
            return Err(Error::Invalid("image_size must be a multiple of 2 patches, embd of 4 heads".to_owned()));
        }
        let tensors = self.tensors();
        let header = self.header(&tensors).finish();
        let mut bytes = header.len() as u64;
        let mut out = BufWriter::new(File::create(path)?);
        out.write_all(&header)?;
        for tensor in &tensors {
            bytes += weights::write(&mut out, tensor, self.seed, |_| false)?;
        }
        out.flush()?;
        Ok(bytes)
    }

    fn header(&self, tensors: &[Tensor]) -> Header {
        let mut h = Header::default();
        h.string("general.architecture", "clip");
        h.string("general.type", "mmproj");
        h.string("general.name", "Altiplano Random Projector");
        h.u32("general.file_type", 0);
        h.bool("clip.has_vision_encoder", true);
        h.string("clip.projector_type", self.kind.name());
        h.bool("clip.use_gelu", true);
        h.u32("clip.vision.image_size", self.image_size);
        h.u32("clip.vision.patch_size", self.patch_size);
        h.u32("clip.vision.embedding_length", self.embd);
        h.u32("clip.vision.feed_forward_length", self.ff);
        h.u32("clip.vision.block_count", self.layers);
        h.u32("clip.vision.projection_dim", self.model_embd);
        h.u32("clip.vision.attention.head_count", self.heads);
        h.f32("clip.vision.attention.layer_norm_epsilon", 1e-6);
        h.f32s("clip.vision.image_mean", [0.5; 3].into_iter());
        h.f32s("clip.vision.image_std", [0.5; 3].into_iter());
        if self.kind == ProjectorKind::Gemma3 {
            // Patches of each side that become one.
            h.u32("clip.vision.projector.scale_factor", 2);
        }
        for tensor in tensors {
            h.tensor(&tensor.name, &tensor.shape, tensor.kind.ggml_type(), tensor.bytes());
        }
        h
    }

    fn tensors(&self) -> Vec<Tensor> {
        let Self { kind, model_embd, image_size, patch_size, embd, ff, layers, .. } = *self;
        let (model, embd, ff) = (u64::from(model_embd), u64::from(embd), u64::from(ff));
        let (patch, patches) = (u64::from(patch_size), u64::from((image_size / patch_size).pow(2)));
        let mut all = Vec::new();
        let mut put = |name: &str, shape: &[u64], filling: Filling| {
            all.push(Tensor { name: name.to_owned(), shape: shape.to_vec(), kind: Quantization::F32, filling });
        };
        let random = |gain: f32| Filling::Random { gain };
        // A row of a convolution's kernel is one line of a patch, of which there are 3 × `patch`.
        let kernel = random(0.2);
        put("v.patch_embd.weight", &[patch, patch, 3, embd], kernel);
        if kind == ProjectorKind::Qwen2vl {
            put("v.patch_embd.weight.1", &[patch, patch, 3, embd], kernel);
        } else {
            put("v.patch_embd.bias", &[embd], random(0.1));
            put("v.position_embd.weight", &[embd, patches], random(1.0));
        }
        for layer in 0..layers {
            let name = |part: &str| format!("v.blk.{layer}.{part}");
            for norm in ["ln1", "ln2"] {
                put(&name(&format!("{norm}.weight")), &[embd], Filling::Ones);
                put(&name(&format!("{norm}.bias")), &[embd], random(0.1));
            }
            for part in ["attn_q", "attn_k", "attn_v", "attn_out"] {
                put(&name(&format!("{part}.weight")), &[embd, embd], random(1.0));
                put(&name(&format!("{part}.bias")), &[embd], random(0.1));
            }
            put(&name("ffn_up.weight"), &[embd, ff], random(1.0));
            put(&name("ffn_up.bias"), &[ff], random(0.1));
            put(&name("ffn_down.weight"), &[ff, embd], random(1.0));
            put(&name("ffn_down.bias"), &[embd], random(0.1));
        }
        put("v.post_ln.weight", &[embd], Filling::Ones);
        put("v.post_ln.bias", &[embd], random(0.1));
        match kind {
            ProjectorKind::Gemma3 => {
                put("mm.soft_emb_norm.weight", &[embd], Filling::Ones);
                // Stored the other way round.
                put("mm.input_projection.weight", &[model, embd], random(3.0));
            }
            ProjectorKind::Mlp | ProjectorKind::Qwen2vl => {
                let joined = if kind == ProjectorKind::Mlp { embd } else { embd * 4 };
                let inner = if kind == ProjectorKind::Mlp { model } else { joined };
                put("mm.0.weight", &[joined, inner], random(1.0));
                put("mm.0.bias", &[inner], random(0.1));
                put("mm.2.weight", &[inner, model], random(3.0));
                put("mm.2.bias", &[model], random(0.1));
            }
        }
        all
    }
}

//! Projectors (mmproj) with random weights: small transformers that make embeddings of an image or a sound.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::gguf::Header;
use crate::spec::Quantization;
use crate::tensor::Tensor;
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
    /// Ultravox's: sound, 187 tokens for each 30 seconds that begin.
    Ultravox,
    /// Qwen2-Audio's: sound, 750 tokens for each 30 seconds that begin.
    Qwen2a,
    /// Qwen2.5-Omni's: images as [`Self::Qwen2vl`] and sound as [`Self::Qwen2a`].
    Omni,
}

impl ProjectorKind {
    /// How images are read, if they are.
    fn vision(self) -> Option<Self> {
        match self {
            Self::Mlp | Self::Gemma3 | Self::Qwen2vl => Some(self),
            Self::Omni => Some(Self::Qwen2vl),
            Self::Ultravox | Self::Qwen2a => None,
        }
    }

    /// How sound is read, if it is.
    fn audio(self) -> Option<Self> {
        match self {
            Self::Ultravox | Self::Qwen2a => Some(self),
            Self::Omni => Some(Self::Qwen2a),
            Self::Mlp | Self::Gemma3 | Self::Qwen2vl => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
            Self::Gemma3 => "gemma3",
            Self::Qwen2vl => "qwen2vl_merger",
            Self::Ultravox => "ultravox",
            Self::Qwen2a => "qwen2a",
            Self::Omni => "qwen2.5o",
        }
    }
}

/// Bands of the spectrum that a projector for sound reads.
const MEL_BANDS: u32 = 16;

/// Positions of half a minute of sound: two for each spectrum, of which there are a hundred in a second.
const AUDIO_POSITIONS: u64 = 1500;

/// Positions that become one token with Ultravox.
const STACKED: u32 = 8;

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
            // llama.cpp counts Ultravox's tokens as its code makes them only where this is no power of two.
            embd: if kind == ProjectorKind::Ultravox { 40 } else { 32 },
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
        h.bool("clip.use_gelu", true);
        let (vision, audio) = (self.kind.vision(), self.kind.audio());
        if vision.is_none() || audio.is_none() {
            h.string("clip.projector_type", self.kind.name());
        }
        for (prefix, part) in [("vision", vision), ("audio", audio)] {
            let Some(part) = part else { continue };
            h.bool(&format!("clip.has_{prefix}_encoder"), true);
            if part != self.kind {
                h.string(&format!("clip.{prefix}.projector_type"), part.name());
            }
            h.u32(&format!("clip.{prefix}.embedding_length"), self.embd);
            h.u32(&format!("clip.{prefix}.feed_forward_length"), self.ff);
            h.u32(&format!("clip.{prefix}.block_count"), self.layers);
            h.u32(&format!("clip.{prefix}.projection_dim"), self.model_embd);
            h.u32(&format!("clip.{prefix}.attention.head_count"), self.heads);
            h.f32(&format!("clip.{prefix}.attention.layer_norm_epsilon"), 1e-6);
        }
        if vision.is_some() {
            h.u32("clip.vision.image_size", self.image_size);
            h.u32("clip.vision.patch_size", self.patch_size);
            h.f32s("clip.vision.image_mean", [0.5; 3].into_iter());
            h.f32s("clip.vision.image_std", [0.5; 3].into_iter());
        }
        if vision == Some(ProjectorKind::Gemma3) {
            // Patches of each side that become one.
            h.u32("clip.vision.projector.scale_factor", 2);
        }
        if audio.is_some() {
            h.u32("clip.audio.num_mel_bins", MEL_BANDS);
        }
        if audio == Some(ProjectorKind::Ultravox) {
            h.u32("clip.audio.projector.stack_factor", STACKED);
        }
        for tensor in tensors {
            h.tensor(&tensor.name, &tensor.shape, tensor.kind.ggml_type(), tensor.bytes());
        }
        h
    }

    fn tensors(&self) -> Vec<Tensor> {
        let mut all = Vec::new();
        if let Some(kind) = self.kind.vision() {
            self.vision_tensors(kind, &mut all);
        }
        if let Some(kind) = self.kind.audio() {
            self.audio_tensors(kind, &mut all);
        }
        all
    }

    /// The transformer's own, the same for pictures and sound.
    fn blocks(&self, prefix: &str, key_bias: bool, all: &mut Vec<Tensor>) {
        let (embd, ff) = (u64::from(self.embd), u64::from(self.ff));
        for layer in 0..self.layers {
            let mut put = |part: &str, shape: &[u64], filling| {
                all.push(tensor(&format!("{prefix}.blk.{layer}.{part}"), shape, filling));
            };
            for norm in ["ln1", "ln2"] {
                put(&format!("{norm}.weight"), &[embd], Filling::Ones);
                put(&format!("{norm}.bias"), &[embd], random(0.1));
            }
            for part in ["attn_q", "attn_k", "attn_v", "attn_out"] {
                put(&format!("{part}.weight"), &[embd, embd], random(1.0));
                if part != "attn_k" || key_bias {
                    put(&format!("{part}.bias"), &[embd], random(0.1));
                }
            }
            put("ffn_up.weight", &[embd, ff], random(1.0));
            put("ffn_up.bias", &[ff], random(0.1));
            put("ffn_down.weight", &[ff, embd], random(1.0));
            put("ffn_down.bias", &[embd], random(0.1));
        }
        all.push(tensor(&format!("{prefix}.post_ln.weight"), &[embd], Filling::Ones));
        all.push(tensor(&format!("{prefix}.post_ln.bias"), &[embd], random(0.1)));
    }

    /// Whisper's encoder and what is behind it.
    fn audio_tensors(&self, kind: ProjectorKind, all: &mut Vec<Tensor>) {
        let (model, embd, ff) = (u64::from(self.model_embd), u64::from(self.embd), u64::from(self.ff));
        // A row of a convolution's kernel is three numbers, of which there are as many as channels.
        for (number, channels, gain) in [(1, u64::from(MEL_BANDS), 0.5), (2, embd, 0.3)] {
            all.push(tensor(&format!("a.conv1d.{number}.weight"), &[3, channels, embd], random(gain)));
            all.push(tensor(&format!("a.conv1d.{number}.bias"), &[1, embd], random(0.1)));
        }
        all.push(tensor("a.position_embd.weight", &[embd, AUDIO_POSITIONS], random(1.0)));
        self.blocks("a", false, all);
        if kind == ProjectorKind::Ultravox {
            let joined = embd * u64::from(STACKED);
            all.push(tensor("mm.a.norm_pre.weight", &[joined], Filling::Ones));
            all.push(tensor("mm.a.mlp.1.weight", &[joined, ff * 2], random(1.0)));
            all.push(tensor("mm.a.norm_mid.weight", &[ff], Filling::Ones));
            all.push(tensor("mm.a.mlp.2.weight", &[ff, model], random(3.0)));
        } else {
            all.push(tensor("mm.a.fc.weight", &[embd, model], random(3.0)));
            all.push(tensor("mm.a.fc.bias", &[model], random(0.1)));
        }
    }

    fn vision_tensors(&self, kind: ProjectorKind, all: &mut Vec<Tensor>) {
        let Self { model_embd, image_size, patch_size, embd, .. } = *self;
        let (model, embd) = (u64::from(model_embd), u64::from(embd));
        let (patch, patches) = (u64::from(patch_size), u64::from((image_size / patch_size).pow(2)));
        let mut put = |name: &str, shape: &[u64], filling| all.push(tensor(name, shape, filling));
        // A row of a convolution's kernel is one line of a patch, of which there are 3 × `patch`.
        let kernel = random(0.2);
        put("v.patch_embd.weight", &[patch, patch, 3, embd], kernel);
        if kind == ProjectorKind::Qwen2vl {
            put("v.patch_embd.weight.1", &[patch, patch, 3, embd], kernel);
        } else {
            put("v.patch_embd.bias", &[embd], random(0.1));
            put("v.position_embd.weight", &[embd, patches], random(1.0));
        }
        self.blocks("v", true, all);
        let mut put = |name: &str, shape: &[u64], filling| all.push(tensor(name, shape, filling));
        if kind == ProjectorKind::Gemma3 {
            put("mm.soft_emb_norm.weight", &[embd], Filling::Ones);
            // Stored the other way round.
            put("mm.input_projection.weight", &[model, embd], random(3.0));
        } else {
            let joined = if kind == ProjectorKind::Mlp { embd } else { embd * 4 };
            let inner = if kind == ProjectorKind::Mlp { model } else { joined };
            put("mm.0.weight", &[joined, inner], random(1.0));
            put("mm.0.bias", &[inner], random(0.1));
            put("mm.2.weight", &[inner, model], random(3.0));
            put("mm.2.bias", &[model], random(0.1));
        }
    }
}

fn random(gain: f32) -> Filling {
    Filling::Random { gain }
}

fn tensor(name: &str, shape: &[u64], filling: Filling) -> Tensor {
    Tensor { name: name.to_owned(), shape: shape.to_vec(), kind: Quantization::F32, filling }
}

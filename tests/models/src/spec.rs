//! What a generated model looks like.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Error;
use crate::header::header;
use crate::tensor::Tensor;
use crate::vocab::Vocabulary;
use crate::{bert, decoder, gpt2, weights};

/// A `ChatML` template that llama.cpp's own detection knows too.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
    message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ \
    '<|im_start|>assistant\\n' }}{% endif %}";

/// `general.architecture` of a generated file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Architecture {
    /// Plain attention, no biases.
    Llama,
    /// Like llama, with biases on query, key and value, and another rotation.
    Qwen2,
    /// Like qwen2, with positions in several dimensions (M-RoPE), for images.
    Qwen2vl,
    /// Sliding-window attention in five layers of six, tied embeddings.
    Gemma3,
    /// An encoder: every token sees every other, no KV cache, positions learnt; needs [`Tokenizer::Wpm`].
    Bert,
    /// A decoder with learnt positions: one that it was not trained with does not exist.
    Gpt2,
    /// No attention: one state for each sequence, which every token changes. `heads`, `kv_heads` and `ff` play no part.
    Mamba,
    /// Like llama, and named as a mixture of experts of whose layers none has experts; may name a head that guesses.
    Glm4moe,
    /// A hybrid: a state for each sequence in one layer, attention in the next; may have a head that guesses ([`Spec::mtp`]).
    Qwen35,
}

/// How good a model's own head for guessing (MTP) is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MtpHead {
    /// Random weights, so hardly ever right.
    Random,
    /// Named in the metadata, and not there.
    Missing,
    /// It says what the model says, nearly always: the model's layers are quiet, so that its next token follows from the
    /// last one, and the head passes that one on.
    Good,
}

/// How an embedder makes one vector of a text's tokens: `{arch}.pooling_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Pooling {
    /// The mean of all tokens.
    Mean,
    /// The first token.
    Cls,
    /// The last token.
    Last,
    /// A reranker's score, by a classification head over the first token (BERT only).
    Rank,
}

impl Pooling {
    /// llama.cpp's number.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Mean => 1,
            Self::Cls => 2,
            Self::Last => 3,
            Self::Rank => 4,
        }
    }
}

/// Type of the matrices; norms and biases are always F32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Quantization {
    /// 4 bytes per weight.
    F32,
    /// 2 bytes per weight.
    F16,
    /// 34 bytes per 32 weights.
    #[value(name = "q8_0")]
    Q8_0,
    /// 18 bytes per 32 weights.
    #[value(name = "q4_0")]
    Q4_0,
}

/// The tokenizer's kind. Each takes any UTF-8 input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Tokenizer {
    /// Byte-level BPE (`gpt2`).
    Bpe,
    /// SentencePiece-like with byte fallback (`llama`).
    Spm,
    /// BERT's word pieces (`bert`): lower case, and words that it does not know become `[UNK]`.
    Wpm,
}

/// A model with random weights. All lengths are in tokens or elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// Architecture.
    pub architecture: Architecture,
    /// `general.name`.
    pub name: String,
    /// Tokens in the vocabulary, at least 512.
    pub vocab: u32,
    /// Transformer blocks.
    pub layers: u32,
    /// Width of the model.
    pub embd: u32,
    /// Attention heads; divides `embd`.
    pub heads: u32,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: u32,
    /// Width of the feed-forward part.
    pub ff: u32,
    /// Feed-forward parts in each layer, of which a token passes two; 0: one for all tokens (llama only).
    pub experts: u32,
    /// Context length that the model claims to be trained for.
    pub context: u32,
    /// Window of the sliding-window layers (Gemma 3 only).
    pub sliding_window: u32,
    /// Two rotations (`LongRoPE`): one for contexts up to so many tokens, another for larger ones (llama only).
    pub long_rope: Option<u32>,
    /// Type of the matrices.
    pub quantization: Quantization,
    /// Kind of tokenizer.
    pub tokenizer: Tokenizer,
    /// Jinja chat template; `None` leaves the key out.
    pub chat_template: Option<String>,
    /// Makes an embedder or a reranker; `None` leaves the key out.
    pub pooling: Option<Pooling>,
    /// Keep the model from ending by itself: end-of-text and other tokens that are no printable text get logit 0, far
    /// below the winner, so generation runs to its limit and its text is ASCII.
    pub endless: bool,
    /// A head that guesses the token after the next one (Qwen 3.5; GLM-4.5 may name one that it lacks); `None`: there is none.
    pub mtp: Option<MtpHead>,
    /// Names three tokens as those for infilling, as a model trained for it does.
    pub infill: bool,
    /// Seed of the weights.
    pub seed: u64,
}

impl Default for Spec {
    /// A llama of 0.2 million parameters that loads in a millisecond.
    fn default() -> Self {
        Self {
            architecture: Architecture::Llama,
            name: "Altiplano Random".to_owned(),
            vocab: 512,
            layers: 2,
            embd: 64,
            heads: 2,
            kv_heads: 1,
            ff: 192,
            experts: 0,
            context: 2048,
            sliding_window: 256,
            long_rope: None,
            quantization: Quantization::F16,
            tokenizer: Tokenizer::Bpe,
            chat_template: Some(CHATML.to_owned()),
            pooling: None,
            endless: true,
            mtp: None,
            infill: false,
            seed: 1,
        }
    }
}

impl Spec {
    /// Deep and wide enough that rounding shows in its logits, small enough to compute them often: where the same question
    /// asked in other company is compared (`agent/tests/same_answer.rs`, `cargo xtask bench logits`).
    #[must_use]
    pub fn compared() -> Self {
        Self {
            vocab: 4096,
            layers: 8,
            embd: 256,
            heads: 4,
            kv_heads: 2,
            ff: 768,
            context: 4096,
            quantization: Quantization::F16,
            ..Self::default()
        }
    }

    /// A small BERT: an encoder with the mean of its tokens as the text's vector.
    #[must_use]
    pub fn embedder() -> Self {
        Self {
            architecture: Architecture::Bert,
            name: "Altiplano Random Embedder".to_owned(),
            kv_heads: 2,
            tokenizer: Tokenizer::Wpm,
            chat_template: None,
            pooling: Some(Pooling::Mean),
            endless: false,
            ..Self::default()
        }
    }

    /// The same with a head that scores a query and a document.
    #[must_use]
    pub fn reranker() -> Self {
        Self { name: "Altiplano Random Reranker".to_owned(), pooling: Some(Pooling::Rank), ..Self::embedder() }
    }

    /// A llama whose last token's state is the text's vector.
    #[must_use]
    pub fn causal_embedder() -> Self {
        Self {
            name: "Altiplano Random Causal Embedder".to_owned(),
            chat_template: None,
            pooling: Some(Pooling::Last),
            ..Self::default()
        }
    }

    /// The shape of a well-known size: `1b` (Llama 3.2 1B), `3b` (Llama 3.2 3B) or `8b` (Llama 3.1 8B), `Q4_0`.
    /// As files: 0.8, 2.0 and 4.5 GB. Or one of the small embedders: `embedder`, `reranker`, `causal-embedder`.
    #[must_use]
    pub fn preset(size: &str) -> Option<Self> {
        let (layers, embd, heads, ff) = match size {
            "embedder" => return Some(Self::embedder()),
            "reranker" => return Some(Self::reranker()),
            "causal-embedder" => return Some(Self::causal_embedder()),
            "1b" => (16, 2048, 32, 8192),
            "3b" => (28, 3072, 24, 8192),
            "8b" => (32, 4096, 32, 14336),
            _ => return None,
        };
        Some(Self {
            name: format!("Altiplano Random {}", size.to_uppercase()),
            vocab: 128_256,
            layers,
            embd,
            heads,
            kv_heads: 8,
            ff,
            context: 131_072,
            quantization: Quantization::Q4_0,
            ..Self::default()
        })
    }

    /// Number of weights, norms and biases included.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(Tensor::elements).sum()
    }

    /// Writes the file at `path`, whole or not at all, and returns its length in bytes.
    pub fn write(&self, path: &Path) -> Result<u64, Error> {
        // Tests in parallel may ask for the same file: each writes its own and the rename settles it.
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        self.validate()?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".{}-{number}.partial", std::process::id()));
        let written = self.write_to(Path::new(&partial)).and_then(|bytes| {
            fs::rename(&partial, path)?;
            Ok(bytes)
        });
        if written.is_err() {
            let _ = fs::remove_file(&partial);
        }
        written
    }

    fn write_to(&self, path: &Path) -> Result<u64, Error> {
        let vocabulary = Vocabulary::new(self.tokenizer, self.vocab);
        let tensors = self.tensors();
        let header = header(self, &vocabulary, &tensors).finish();
        let mut bytes = header.len() as u64;
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        out.write_all(&header)?;
        for tensor in &tensors {
            bytes += weights::write(&mut out, tensor, self.seed, |row| self.is_silent(&vocabulary, tensor, row))?;
        }
        out.flush()?;
        Ok(bytes)
    }

    /// Whether this row of the output matrix belongs to a token that `endless` keeps from being said.
    fn is_silent(&self, vocabulary: &Vocabulary, tensor: &Tensor, row: u64) -> bool {
        let output = if self.is_tied() { "token_embd.weight" } else { "output.weight" };
        self.endless && tensor.name == output && !vocabulary.is_text(usize::try_from(row).unwrap_or(usize::MAX))
    }

    pub(crate) fn is_tied(&self) -> bool {
        self.architecture == Architecture::Gemma3
    }

    fn is_bert(&self) -> bool {
        self.architecture == Architecture::Bert
    }

    fn validate(&self) -> Result<(), Error> {
        let invalid = |reason: String| Err(Error::Invalid(reason));
        let Self { vocab, layers, embd, heads, kv_heads, ff, context, .. } = *self;
        if [layers, embd, heads, kv_heads, ff, context].contains(&0) {
            return invalid("layers, embd, heads, kv_heads, ff and context must not be 0".to_owned());
        }
        if vocab < 512 {
            return invalid(format!("vocab is {vocab}, at least 512 are needed for bytes and control tokens"));
        }
        if embd % heads != 0 || heads % kv_heads != 0 {
            return invalid(format!(
                "embd {embd}, heads {heads}, kv_heads {kv_heads}: each must divide the one before"
            ));
        }
        if !(embd / heads).is_multiple_of(2) {
            return invalid(format!("heads of {} elements cannot be rotated: the number must be even", embd / heads));
        }
        if self.is_bert() != (self.tokenizer == Tokenizer::Wpm) {
            return invalid("bert goes with the wpm tokenizer, and no other architecture does".to_owned());
        }
        let may_name = match self.mtp {
            None => true,
            Some(MtpHead::Missing) => matches!(self.architecture, Architecture::Qwen35 | Architecture::Glm4moe),
            Some(MtpHead::Random | MtpHead::Good) => self.architecture == Architecture::Qwen35,
        };
        if !may_name {
            return invalid("only qwen35 has an mtp head, and only glm4moe can name one that it lacks".to_owned());
        }
        if self.long_rope.is_some() && self.architecture != Architecture::Llama {
            return invalid("only llama has two rotations here".to_owned());
        }
        if self.experts > 0 && self.architecture != Architecture::Llama {
            return invalid("only llama has experts here".to_owned());
        }
        if self.experts == 1 {
            return invalid("a token passes two experts".to_owned());
        }
        if self.pooling == Some(Pooling::Rank) && !self.is_bert() {
            return invalid("only bert has a head for pooling rank".to_owned());
        }
        let kv_embd = embd / heads * kv_heads;
        if self.quantization.is_blocked() && [embd, ff, kv_embd].iter().any(|n| !n.is_multiple_of(32)) {
            return invalid(format!(
                "embd {embd}, ff {ff} and {kv_embd} (keys) must be multiples of 32 to be quantised"
            ));
        }
        Ok(())
    }

    /// Every tensor, in the file's order.
    fn tensors(&self) -> Vec<Tensor> {
        match self.architecture {
            Architecture::Bert => bert::tensors(self),
            Architecture::Gpt2 => gpt2::tensors(self),
            _ => decoder::tensors(self),
        }
    }
}

impl Architecture {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen2vl => "qwen2vl",
            Self::Gemma3 => "gemma3",
            Self::Bert => "bert",
            Self::Gpt2 => "gpt2",
            Self::Mamba => "mamba",
            Self::Glm4moe => "glm4moe",
            Self::Qwen35 => "qwen35",
        }
    }
}

impl Quantization {
    fn is_blocked(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0)
    }

    /// `ggml_type`.
    pub(crate) fn ggml_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 8,
        }
    }

    /// `llama_ftype`.
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
        }
    }

    /// Bytes that so many weights take.
    pub(crate) fn bytes(self, elements: u64) -> u64 {
        match self {
            Self::F32 => elements * 4,
            Self::F16 => elements * 2,
            Self::Q8_0 => elements / 32 * 34,
            Self::Q4_0 => elements / 32 * 18,
        }
    }
}

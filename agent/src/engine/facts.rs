//! What is known about a model once it is loaded.

use super::request::Token;
use super::sampling::SamplingParams;

/// What a model can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ability {
    /// Text that goes on from a prompt.
    Completion,
    /// Vectors of texts.
    Embedding,
    /// Scores of documents for a query.
    Rerank,
    /// Images in a prompt.
    Vision,
    /// Sound in a prompt.
    Audio,
}

impl Ability {
    /// The word that clients know: Ollama's, where it has one.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Completion => "completion",
            Self::Embedding => "embedding",
            Self::Rerank => "rerank",
            Self::Vision => "vision",
            Self::Audio => "audio",
        }
    }
}

/// What is known about the model once it is loaded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelFacts {
    /// `general.name` of the file.
    pub name: Option<String>,
    /// `general.architecture`, such as "llama".
    pub architecture: String,
    /// llama.cpp's short description: architecture, size class, quantisation.
    pub description: String,
    /// Tokens in the vocabulary.
    pub n_vocab: u32,
    /// Tokens that the model was trained with.
    pub trained_context: u32,
    /// Tokens that one request may use, prompt and answer.
    pub max_tokens: u32,
    /// Numbers in an embedding.
    pub embedding_width: u32,
    /// What the model can be asked for.
    pub abilities: Vec<Ability>,
    /// Whether tokens are guessed ahead.
    pub speculative: bool,
    /// Whether prompts go on from copies of its state, so that it matters where messages end.
    pub copied: bool,
    /// Names of its LoRA adapters.
    pub adapters: Vec<String>,
    /// Token that begins a text.
    pub bos: Option<Token>,
    /// `bos` as text, for chat templates; empty when there is none.
    pub bos_text: String,
    /// Token that ends a text.
    pub eos: Option<Token>,
    /// `eos` as text, for chat templates; empty when there is none.
    pub eos_text: String,
    /// Whether a prompt begins with `bos`.
    pub adds_bos: bool,
    /// Tokens for infilling; `None`: the model was not trained for it.
    pub fim: Option<FimTokens>,
    /// llama.cpp's number of the vocabulary's kind, such as 2 for BPE.
    pub vocab_type: u32,
    /// Jinja source in the file, unless the configuration replaces it.
    pub chat_template: Option<String>,
    /// Sampling parameters for requests that name none: the file's over llama.cpp's.
    pub sampling: SamplingParams,
    /// Parameters.
    pub parameter_count: u64,
    /// Bytes of all tensors.
    pub size_bytes: u64,
}

impl ModelFacts {
    /// Whether the model can be asked for it.
    #[must_use]
    pub fn can(&self, ability: Ability) -> bool {
        self.abilities.contains(&ability)
    }
}

/// Tokens that say where a gap in a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FimTokens {
    /// Before the text that stands before the gap.
    pub prefix: Token,
    /// Before the text that stands after it.
    pub suffix: Token,
    /// Before what fills it.
    pub middle: Token,
    /// Before the name of a repository.
    pub repository: Option<Token>,
    /// Before the name of a file.
    pub separator: Option<Token>,
}

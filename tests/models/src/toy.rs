//! The toy chat model: small enough to be committed, trained so that what it says can be asserted.
//!
//! `toy/README.md` says how it was made.

use std::path::PathBuf;

use serde::Deserialize;

/// A question with the answer that greedy decoding gives, whatever the backend: each token wins by a clear margin.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// The chat so far; empty where `prompt` is a plain completion.
    #[serde(default)]
    pub messages: Vec<Message>,
    /// The text to complete, without any chat around it.
    #[serde(default)]
    pub prompt: Option<String>,
    /// The whole answer; the model ends by itself after it.
    pub answer: String,
}

/// One turn of a chat, with the API's words.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A question whose answer is some 300 tokens long, for streams that are watched or cut.
pub const LONG_QUESTION: &str = "Tell me a long story about the altiplano.";

/// A question whose answer (" la la la …") does not end before the token limit or the context does.
pub const ENDLESS_QUESTION: &str = "Sing forever.";

/// Where the model file is.
#[must_use]
pub fn path() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/toy/altiplano-toy.gguf"))
}

/// SHA-256 of the model file, lower-case hexadecimal.
pub const SHA256: &str = include_str!("../toy/altiplano-toy.sha256").trim_ascii();

/// All questions whose answers are known.
///
/// # Panics
/// When `toy/questions.json` is broken, which this crate's tests rule out.
#[must_use]
#[expect(clippy::expect_used, reason = "the file is compiled in and read by a test")]
pub fn questions() -> Vec<Question> {
    serde_json::from_str(include_str!("../toy/questions.json")).expect("toy/questions.json holds questions")
}

//! The toy chat model: small enough to be committed, trained so that what it says can be asserted.
//!
//! `toy/README.md` says how it was made.

use std::path::{Path, PathBuf};

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

/// Writes the toy model as one that knows less of where a token stands: a poor guesser with the same vocabulary, right now
/// and then.
///
/// # Errors
/// What the disk says, or that the model file is not what it was.
pub fn write_poor(path: &Path) -> Result<(), crate::Error> {
    const KEY: &[u8] = b"llama.rope.freq_base";
    let mut bytes = std::fs::read(self::path())?;
    // The key is followed by its type and the number, 10000.
    let place = bytes.windows(KEY.len()).position(|window| window == KEY).map(|place| place + KEY.len() + 4);
    let number = place.and_then(|place| bytes.get_mut(place..place + 4));
    let number = number.ok_or_else(|| crate::Error::Invalid("the toy model has no rope.freq_base".to_owned()))?;
    number.copy_from_slice(&500.0_f32.to_le_bytes());
    std::fs::write(path, bytes)?;
    Ok(())
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

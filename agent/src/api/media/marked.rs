//! Prompts that are no chat with images and sounds, as llama-server takes them: `prompt_string`, with a mark for each of the
//! files in `multimodal_data`, which are base64.

use serde_json::{Map, Value};

use super::{Attachment, Kind, MAX_MEDIA, check, first_bytes, is_audio, put, read};
use crate::api::error::ApiError;
use crate::api::fields::wrong_type;
use crate::api::state::ApiState;
use crate::engine::{Media, Token};

/// What stands for a file in `prompt_string`; `/props` says it too.
pub(crate) const MARKER: &str = "<__media__>";

/// Such a prompt, checked; it has one file at least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MarkedPrompt {
    /// As it came.
    pub(crate) said: String,
    /// With what stands for files here.
    text: String,
    files: Vec<Attachment>,
}

/// What an object in place of a prompt is.
pub(crate) enum PromptObject {
    Text(String),
    Marked(MarkedPrompt),
}

impl PromptObject {
    /// `param` is where it came from.
    pub(crate) fn read(param: &str, mut object: Map<String, Value>) -> Result<Self, ApiError> {
        let name = format!("{param}.multimodal_data");
        let Some(Value::String(said)) = object.remove("prompt_string") else {
            let name = format!("{param}.prompt_string");
            return Err(ApiError::invalid(name.clone(), format!("'{name}' must be a string")));
        };
        let data = match object.remove("multimodal_data") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(data)) if data.len() <= MAX_MEDIA => data,
            Some(Value::Array(data)) => {
                let message = format!("'{name}' may have {MAX_MEDIA} files, not {}", data.len());
                return Err(ApiError::invalid(name, message));
            }
            Some(other) => return Err(wrong_type(&name, "an array of files in base64", &other)),
        };
        if data.is_empty() {
            return Ok(Self::Text(said));
        }
        let marks = said.matches(MARKER).count();
        if marks != data.len() {
            let message = format!("'{name}' has {} files, and 'prompt_string' {marks} places '{MARKER}'", data.len());
            return Err(ApiError::invalid(name, message));
        }
        let (mut text, mut files) = (String::new(), Vec::with_capacity(data.len()));
        let mut pieces = said.split(MARKER);
        text.push_str(pieces.next().unwrap_or_default());
        for ((at, file), piece) in data.into_iter().enumerate().zip(pieces) {
            let name = format!("{name}[{at}]");
            let Value::String(data) = file else { return Err(wrong_type(&name, "a file in base64", &file)) };
            let kind = if is_audio(&first_bytes(&data)) { Kind::Audio } else { Kind::Image };
            text.push_str(&put(Attachment { name, data, kind }, &mut files)?);
            text.push_str(piece);
        }
        Ok(Self::Marked(MarkedPrompt { said, text, files }))
    }
}

impl MarkedPrompt {
    /// Its tokens, the model's own first one before them, and its files. It is not cut when it is too long.
    pub(crate) fn resolve(&self, state: &ApiState) -> Result<(Vec<Token>, Media), ApiError> {
        check(state, &self.files)?;
        read(state, "prompt", &self.text, true, &self.files)
    }
}

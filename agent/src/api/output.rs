//! What a choice says, in terms that every dialect has: the model's text becomes [`Delta`]s, and deltas an [`Output`].

use super::error::ApiError;
use crate::engine::{Token, TokenLogprob};

/// A piece of what a choice says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Delta {
    /// Text for the user.
    Content(String),
    /// Text of the model's reasoning.
    Reasoning(String),
    /// A tool call begins. `index` counts the calls of this choice from 0.
    ToolCall {
        /// Of the call.
        index: u32,
        /// What the call's result refers to.
        id: String,
        /// Of the function.
        name: String,
    },
    /// More of the call's arguments: a piece of JSON text.
    ToolArguments {
        /// Of the call.
        index: u32,
        /// A piece of JSON text.
        json: String,
    },
}

/// Turns the generated text of one choice into deltas.
pub(crate) trait OutputParser: Send {
    /// Takes a piece of text, whole characters.
    fn push(&mut self, text: &str) -> Result<Vec<Delta>, ApiError>;

    /// The text has ended: what was held back comes now.
    fn finish(&mut self) -> Result<Vec<Delta>, ApiError>;
}

/// All text is content: completions, and models without markers.
pub(crate) struct PlainText;

impl OutputParser for PlainText {
    fn push(&mut self, text: &str) -> Result<Vec<Delta>, ApiError> {
        Ok(if text.is_empty() { Vec::new() } else { vec![Delta::Content(text.to_owned())] })
    }

    fn finish(&mut self) -> Result<Vec<Delta>, ApiError> {
        Ok(Vec::new())
    }
}

/// What a choice said in all.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Output {
    /// Text for the user.
    pub(crate) content: String,
    /// Text of the model's reasoning.
    pub(crate) reasoning: String,
    /// Calls in the order in which they began.
    pub(crate) tool_calls: Vec<ToolCall>,
    /// The tokens: all of them where the request wanted every one, else those that completed a piece of text.
    pub(crate) tokens: Vec<Token>,
    /// Of each token, where they were asked for.
    pub(crate) logprobs: Vec<TokenLogprob>,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ToolCall {
    /// What the call's result refers to.
    pub(crate) id: String,
    /// Of the function.
    pub(crate) name: String,
    /// JSON text, as the model wrote it.
    pub(crate) arguments: String,
}

impl Output {
    /// Adds a piece. Arguments of a call that has not begun are dropped.
    pub(crate) fn push(&mut self, delta: Delta) {
        match delta {
            Delta::Content(text) => self.content.push_str(&text),
            Delta::Reasoning(text) => self.reasoning.push_str(&text),
            Delta::ToolCall { index: _, id, name } => {
                self.tool_calls.push(ToolCall { id, name, arguments: String::new() });
            }
            Delta::ToolArguments { index, json } => {
                if let Some(call) = self.tool_calls.get_mut(index as usize) {
                    call.arguments.push_str(&json);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_is_content() {
        let mut parser = PlainText;
        assert_eq!(parser.push("<tool_call>").unwrap(), [Delta::Content("<tool_call>".to_owned())]);
        assert_eq!(parser.push("").unwrap(), []);
        assert_eq!(parser.finish().unwrap(), []);
    }
}

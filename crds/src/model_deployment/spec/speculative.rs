//! How tokens are guessed ahead.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How tokens are guessed, in llama.cpp's words.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.minTokens) || self.minTokens <= (has(self.maxTokens) ? self.maxTokens : self.type == 'NGram' ? 48 : 3)")
        .message("minTokens must not be greater than maxTokens"),
    validation = Rule::new("!has(self.minProbability) || self.type != 'NGram'").message("minProbability is for types Draft and MTP"),
    validation = Rule::new("!has(self.matchTokens) || self.type == 'NGram'").message("matchTokens is for type NGram")
)]
pub struct SpeculativeSpec {
    /// Who guesses.
    #[serde(rename = "type")]
    pub kind: SpeculativeType,

    /// Tokens that are guessed at once at most. Default: 3 for Draft and MTP, 48 for `NGram`. At most 4 of a model with
    /// recurrent layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub max_tokens: Option<i32>,

    /// A guess of fewer tokens is not checked. Default: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 64))]
    pub min_tokens: Option<i32>,

    /// Draft and MTP: a guess ends before a token that who guesses holds for less probable than this, such as "0.75".
    /// Default: "0".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub min_probability: Option<String>,

    /// `NGram` only: so many of the last tokens must have come before in the same request. Default: 12.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 64))]
    pub match_tokens: Option<i32>,
}

/// Who guesses the tokens.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpeculativeType {
    /// The smaller model in `model.draft`.
    Draft,
    /// What came after the same tokens before, in the same request's prompt and answer: for answers that repeat, such
    /// as edited code.
    NGram,
    /// The model's own head for the token after the next one, where its file has one (`nextn_predict_layers`).
    #[serde(rename = "MTP")]
    Mtp,
}

//! How large a context requests get, and what happens to longer ones.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::defaults::four;

/// How much context a request may use, and how its keys and values are kept.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.minTokens) || !has(self.maxTokens) || self.minTokens <= self.maxTokens")
        .message("minTokens must not be greater than maxTokens")
)]
pub struct ContextSpec {
    /// Dynamic grows the context with the requests, without a reload; Fixed holds `maxTokens` × `parallel` from the
    /// start.
    #[serde(default)]
    pub sizing: ContextSizing,

    /// Tokens that the context holds at least. Default: 4096, or maxTokens where that is less. Dynamic only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 256, max = 16_777_216))]
    pub min_tokens: Option<i32>,

    /// Tokens that one request (prompt and answer) may use; never divided by `parallel`. Default: the context that
    /// the model was trained with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 256, max = 16_777_216))]
    pub max_tokens: Option<i32>,

    /// Requests that are generated at the same time; more wait in the queue.
    #[serde(default = "four")]
    #[schemars(range(min = 1, max = 128))]
    pub parallel: i32,

    /// Type of the keys in the KV cache.
    #[serde(default)]
    pub key_cache_type: CacheType,

    /// Type of the values in the KV cache. Other than F16 needs flash attention.
    #[serde(default)]
    pub value_cache_type: CacheType,

    /// Scaling of the rotary position embedding, needed for a `maxTokens` above the trained context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<RopeSpec>,

    /// What happens to a prompt that is longer than `maxTokens`. Nothing is ever cut in silence.
    #[serde(default)]
    pub overflow: OverflowPolicy,
}

impl Default for ContextSpec {
    fn default() -> Self {
        Self {
            sizing: ContextSizing::default(),
            min_tokens: None,
            max_tokens: None,
            parallel: four(),
            key_cache_type: CacheType::default(),
            value_cache_type: CacheType::default(),
            rope: None,
            overflow: OverflowPolicy::default(),
        }
    }
}

/// How the context gets its size.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ContextSizing {
    /// Grows with the requests and shrinks again.
    #[default]
    Dynamic,
    /// `maxTokens` × `parallel`, from the start and for ever.
    Fixed,
}

/// Type of the elements of the KV cache.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// 16-bit floating point.
    #[default]
    F16,
    /// 8 bits and a scale: about half of F16.
    #[serde(rename = "Q8_0")]
    Q8_0,
    /// 4 bits and a scale: about a quarter of F16.
    #[serde(rename = "Q4_0")]
    Q4_0,
}

/// What happens to a prompt that is too long.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OverflowPolicy {
    /// 400 `context_length_exceeded`.
    #[default]
    Reject,
    /// The oldest whole messages go; system messages and the last user message stay.
    DropOldest,
    /// The middle of the text goes; head and tail stay.
    DropMiddle,
}

/// Scaling of the rotary position embedding.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RopeSpec {
    /// Method.
    pub scaling: RopeScaling,

    /// By how much the trained context is stretched.
    #[schemars(range(min = 1, max = 64))]
    pub factor: i32,

    /// Context that the model was trained with. Default: what the file says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 256, max = 16_777_216))]
    pub original_tokens: Option<i32>,
}

/// Method of scaling the rotary position embedding.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeScaling {
    /// All positions divided by the factor.
    Linear,
    /// YaRN (Peng et al. 2023, arXiv 2309.00071).
    Yarn,
}

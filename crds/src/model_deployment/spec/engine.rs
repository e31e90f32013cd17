//! How llama.cpp runs the model.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::sampling::SamplingSpec;
use super::speculative::SpeculativeSpec;

/// How llama.cpp runs the model.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.batchTokens) || !has(self.microBatchTokens) || self.microBatchTokens <= self.batchTokens")
        .message("microBatchTokens must not be greater than batchTokens"),
    validation = Rule::new("!has(self.gpu) || self.gpu != 'Never' || !has(self.gpuLayers) || self.gpuLayers == 0")
        .message("gpuLayers must be 0 or absent when gpu is Never"),
    validation = Rule::new("!has(self.gpu) || self.gpu != 'Required' || !has(self.gpuLayers) || self.gpuLayers > 0")
        .message("gpuLayers must not be 0 when gpu is Required")
)]
pub struct EngineSpec {
    /// Required never runs on the CPU; Preferred takes a GPU where one has room, and says so when not; Never runs on
    /// the CPU.
    #[serde(default)]
    pub gpu: GpuPolicy,

    /// Layers on the GPU; the rest runs on the CPU. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub gpu_layers: Option<i32>,

    /// Keeps the experts of a mixture-of-experts model on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts_on_cpu: Option<bool>,

    /// Auto uses flash attention where the device and the model can, but not on a CPU that generates for one request at a
    /// time (`context.parallel` 1, F16 caches): there one stream is up to twice as fast without, while the scores of
    /// `maxTokens` cells take no more than an eighth of the weights, or 128 MiB.
    #[serde(default)]
    pub flash_attention: FlashAttention,

    /// Most tokens handed to llama.cpp in one call (`n_batch`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 32, max = 65_536))]
    pub batch_tokens: Option<i32>,

    /// Most tokens computed at once (`n_ubatch`); more is faster on a GPU and takes more memory. Default: 512, and 128 or 64 on a
    /// CPU where `flashAttention` is Auto and not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 32, max = 8192))]
    pub micro_batch_tokens: Option<i32>,

    /// CPU threads of the worker. Default: the CPUs that the agent may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 512))]
    pub threads: Option<i32>,

    /// Sampling parameters for requests that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<SamplingSpec>,

    /// Speculative decoding: several tokens are guessed and then checked by the model in one step. What is answered
    /// stays the same, it comes faster where the guesses are good. Default: with `model.draft` Draft, else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speculative: Option<SpeculativeSpec>,
}

/// Whether a GPU is used.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GpuPolicy {
    /// A GPU, or not at all.
    Required,
    /// A GPU where one has room.
    #[default]
    Preferred,
    /// The CPU.
    Never,
}

/// Whether flash attention is used.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlashAttention {
    /// Where device and model can, unless it is slower.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

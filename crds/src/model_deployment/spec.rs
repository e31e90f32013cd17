//! What a user asks for.

#![expect(
    unreachable_pub,
    reason = "KubeSchema derives a private copy of each struct with rules, as public as the struct"
)]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::status::ModelDeploymentStatus;
use crate::schema;

/// What a user wants of one model: which file, how large a context, when to unload it, where to place it.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "altiplano.dev",
    version = "v1alpha1",
    kind = "ModelDeployment",
    plural = "modeldeployments",
    singular = "modeldeployment",
    shortname = "mdep",
    category = "altiplano",
    namespaced,
    status = "ModelDeploymentStatus",
    derive = "PartialEq",
    doc = "ModelDeployment serves one GGUF model with llama.cpp on the GPUs (or CPUs) of as many nodes as spec.replicas says, behind a Service of the same name that speaks OpenAI's API.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.ready", description = "Ready replicas of wanted ones"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state", description = "State of the placement that is worst off"),
    printcolumn(name = "Context", type_ = "integer", json_path = ".status.contextTokens", description = "Tokens of context that one request may use"),
    printcolumn(name = "Pool", type_ = "integer", json_path = ".status.poolTokens", description = "Tokens that the KV cache has room for now, all requests together"),
    printcolumn(name = "Memory", type_ = "string", json_path = ".status.memory", description = "Memory of one replica, measured, or predicted before it has run"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model.source.uri", priority = 1, description = "Where the model file comes from"),
    printcolumn(name = "Quant", type_ = "string", json_path = ".status.model.quantization", priority = 1, description = "Quantisation of the weights"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.address.url", priority = 1, description = "Base URL inside the cluster"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1, description = "Why it is, or is not, ready"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 52")
        .message("metadata.name must be a DNS-1035 label of at most 52 characters (lower-case letters, digits and '-', starting with a letter), because a Service carries it; spec.servedName is free")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.engine) || !has(self.engine.flashAttention) || self.engine.flashAttention != 'Off' || !has(self.context) || !has(self.context.valueCacheType) || self.context.valueCacheType == 'F16'")
        .message("context.valueCacheType other than F16 needs flash attention: engine.flashAttention must not be Off")
)]
pub struct ModelDeploymentSpec {
    /// The model: its file, and what goes with it.
    pub model: ModelSpec,

    /// Name that clients put into `model` of a request. Default: metadata.name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9._:/-]*[A-Za-z0-9])?$"))]
    pub served_name: Option<String>,

    /// How many nodes hold the model. 0 places it nowhere and keeps the files.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub replicas: i32,

    /// How much context a request may use, and how it is kept.
    #[serde(default)]
    pub context: ContextSpec,

    /// When the model leaves memory while nobody uses it.
    #[serde(default)]
    pub unload: UnloadSpec,

    /// How llama.cpp runs the model.
    #[serde(default)]
    pub engine: EngineSpec,

    /// Which nodes may hold the model.
    #[serde(default)]
    pub placement: PlacementSpec,

    /// Lets Altiplano choose `replicas` by the number of concurrent requests. Leave it out beside a
    /// HorizontalPodAutoscaler or KEDA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingSpec>,

    /// How a change reaches the replicas.
    #[serde(default)]
    pub rollout: RolloutSpec,

    /// What stands before the model: queue, time limits, rate limits.
    #[serde(default)]
    pub traffic: TrafficSpec,
}

/// The model file and what goes with it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// Where the GGUF file comes from.
    pub source: ModelSource,

    /// Secret in the same namespace with the credential for the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,

    /// Multimodal projector (mmproj), for models that read images or audio.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projector: Option<ModelSource>,

    /// Smaller model of the same vocabulary, for speculative decoding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft: Option<ModelSource>,

    /// LoRA adapters; a request names one as `<servedName>:<adapter>`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub adapters: Vec<AdapterSpec>,

    /// Jinja chat template that replaces the one in the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 65536))]
    pub chat_template: Option<String>,
}

/// Where a file comes from, and how to know that it is the right one.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ModelSource {
    /// `https://host/file.gguf`, `file:///below/an/allowed/root.gguf`, `hf://owner/repository/file.gguf`,
    /// `s3://bucket/key` or `oci://registry/repository:tag`.
    #[schemars(length(min = 8, max = 2048), regex(pattern = r"^(https?|file|hf|s3|oci)://[^\s]+$"))]
    pub uri: String,

    /// Branch, tag or commit, where the source has such a thing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub revision: Option<String>,

    /// The files to take, where the source holds several; the first is the one that is opened.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 512)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub files: Vec<String>,

    /// SHA-256 of the file, in 64 lower-case hexadecimal digits. A file with another digest is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = r"^[a-f0-9]{64}$"))]
    pub sha256: Option<String>,
}

/// Names a Secret in the same namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct SecretReference {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// A LoRA adapter.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct AdapterSpec {
    /// Name that a request puts behind the colon.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,

    /// Where the adapter's GGUF file comes from.
    pub source: ModelSource,

    /// Strength of the adapter in percent; 100 is as trained.
    #[serde(default = "hundred")]
    #[schemars(range(min = 0, max = 1000))]
    pub scale_percent: i32,
}

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

/// When the model leaves memory. An unloaded model is loaded again by the first request, which waits for it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct UnloadSpec {
    /// Never keeps it in memory; `WhenIdle` unloads after `idleSeconds` without a request; `AfterRequest` unloads
    /// `graceSeconds` after the last one ended.
    #[serde(default)]
    pub policy: UnloadPolicy,

    /// Seconds without a request before `WhenIdle` unloads.
    #[serde(default = "idle_seconds")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub idle_seconds: i32,

    /// Seconds after the last request before `AfterRequest` unloads.
    #[serde(default = "two")]
    #[schemars(range(min = 0, max = 3600))]
    pub grace_seconds: i32,

    /// Seconds after a load during which the model is not unloaded to make room for another.
    #[serde(default = "thirty")]
    #[schemars(range(min = 0, max = 86_400))]
    pub min_resident_seconds: i32,
}

impl Default for UnloadSpec {
    fn default() -> Self {
        Self {
            policy: UnloadPolicy::default(),
            idle_seconds: idle_seconds(),
            grace_seconds: two(),
            min_resident_seconds: thirty(),
        }
    }
}

/// When a model leaves memory.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnloadPolicy {
    /// Stays in memory.
    Never,
    /// Leaves after a time without requests, or when another model needs the room.
    #[default]
    WhenIdle,
    /// Leaves as soon as nobody uses it.
    AfterRequest,
}

/// How llama.cpp runs the model.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.batchTokens) || !has(self.microBatchTokens) || self.microBatchTokens <= self.batchTokens")
        .message("microBatchTokens must not be greater than batchTokens"),
    validation = Rule::new("!has(self.gpu) || self.gpu != 'Never' || !has(self.gpuLayers) || self.gpuLayers == 0")
        .message("gpuLayers must be 0 or absent when gpu is Never")
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

    /// Auto uses flash attention where the device and the model can.
    #[serde(default)]
    pub flash_attention: FlashAttention,

    /// Most tokens handed to llama.cpp in one call (`n_batch`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 32, max = 65_536))]
    pub batch_tokens: Option<i32>,

    /// Most tokens computed at once (`n_ubatch`); more is faster and takes more memory.
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
    /// Where device and model can.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Sampling parameters in llama.cpp's words; `/v1/chat/completions` and `/v1/completions` know them as `top_k` and so on.
/// What is not named is the model file's, else llama.cpp's. Decimal numbers are written as strings, as everywhere in
/// Kubernetes' API.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.temperature) || (double(self.temperature) >= 0.0 && double(self.temperature) <= 2.0)").message("temperature must be from 0 to 2"),
    validation = Rule::new("!has(self.dynatempRange) || (double(self.dynatempRange) >= 0.0 && double(self.dynatempRange) <= 2.0)").message("dynatempRange must be from 0 to 2"),
    validation = Rule::new("!has(self.dynatempExponent) || (double(self.dynatempExponent) >= 0.0 && double(self.dynatempExponent) <= 10.0)").message("dynatempExponent must be from 0 to 10"),
    validation = Rule::new("!has(self.topNSigma) || (double(self.topNSigma) >= 0.0 && double(self.topNSigma) <= 100.0)").message("topNSigma must be from 0 to 100"),
    validation = Rule::new("!has(self.repeatPenalty) || (double(self.repeatPenalty) >= 0.01 && double(self.repeatPenalty) <= 10.0)").message("repeatPenalty must be from 0.01 to 10"),
    validation = Rule::new("!has(self.frequencyPenalty) || (double(self.frequencyPenalty) >= -2.0 && double(self.frequencyPenalty) <= 2.0)").message("frequencyPenalty must be from -2 to 2"),
    validation = Rule::new("!has(self.presencePenalty) || (double(self.presencePenalty) >= -2.0 && double(self.presencePenalty) <= 2.0)").message("presencePenalty must be from -2 to 2"),
    validation = Rule::new("!has(self.dryMultiplier) || (double(self.dryMultiplier) >= 0.0 && double(self.dryMultiplier) <= 100.0)").message("dryMultiplier must be from 0 to 100"),
    validation = Rule::new("!has(self.dryBase) || (double(self.dryBase) >= 0.0 && double(self.dryBase) <= 100.0)").message("dryBase must be from 0 to 100"),
    validation = Rule::new("!has(self.mirostatTau) || (double(self.mirostatTau) >= 0.0 && double(self.mirostatTau) <= 100.0)").message("mirostatTau must be from 0 to 100"),
    validation = Rule::new("!has(self.mirostatEta) || (double(self.mirostatEta) >= 0.0 && double(self.mirostatEta) <= 1.0)").message("mirostatEta must be from 0 to 1")
)]
pub struct SamplingSpec {
    /// Temperature, such as "0.7"; "0" is greedy. At most 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub temperature: Option<String>,

    /// The temperature moves by so much with the entropy of the distribution, such as "0.5"; "0" is off. At most 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub dynatemp_range: Option<String>,

    /// Exponent of that movement. At most 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub dynatemp_exponent: Option<String>,

    /// Keeps this many of the most probable tokens; 0 keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub top_k: Option<i32>,

    /// Keeps the most probable tokens that together have this probability, such as "0.95".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub top_p: Option<String>,

    /// Keeps tokens at least this probable compared with the best one, such as "0.05".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub min_p: Option<String>,

    /// Keeps the tokens whose surprise is typical, up to this probability; "1" is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub typical_p: Option<String>,

    /// Keeps tokens at most this many standard deviations below the best one; "0" is off. At most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub top_n_sigma: Option<String>,

    /// Chance that the most probable tokens, all but one, are taken away; "0" is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub xtc_probability: Option<String>,

    /// Probability from which a token counts for that; above "0.5" is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(0(\.[0-9]+)?|1(\.0+)?)$"))]
    pub xtc_threshold: Option<String>,

    /// Tokens that `topP`, `minP`, `typicalP` and XTC keep at least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub min_keep: Option<i32>,

    /// Tokens that the penalties look back; 0 is off, -1 the whole context. Default: 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1, max = 1_000_000))]
    pub repeat_last_n: Option<i32>,

    /// Divides the logits of tokens seen lately, such as "1.1"; "1" is off. From 0.01 to 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub repeat_penalty: Option<String>,

    /// Subtracted from a token's logit for each time it was seen lately. From -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^-?[0-9]+(\.[0-9]+)?$"))]
    pub frequency_penalty: Option<String>,

    /// Subtracted from the logit of every token seen lately. From -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^-?[0-9]+(\.[0-9]+)?$"))]
    pub presence_penalty: Option<String>,

    /// Strength of DRY, which is against repeated sequences; "0" is off. At most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub dry_multiplier: Option<String>,

    /// Base of DRY's penalty, which grows with the length of the sequence. At most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub dry_base: Option<String>,

    /// Tokens that may be repeated without a penalty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub dry_allowed_length: Option<i32>,

    /// Tokens that DRY looks back; 0 is off, -1 the whole context. Default: 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1, max = 1_000_000))]
    pub dry_penalty_last_n: Option<i32>,

    /// Version of Mirostat, which takes the place of `samplers`; 0 is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2))]
    pub mirostat: Option<i32>,

    /// Surprise that Mirostat aims for, in bits. At most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub mirostat_tau: Option<String>,

    /// How fast Mirostat learns. At most 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]+)?$"))]
    pub mirostat_eta: Option<String>,

    /// Texts at which a sequence ends for DRY. Default: a new line, ":", a quote and "*".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 40)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub dry_sequence_breakers: Option<Vec<String>>,

    /// The samplers in their order; one that is not named is not used. Default: llama.cpp's order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub samplers: Option<Vec<Sampler>>,
}

/// A sampler by llama.cpp's name.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// Repeat, frequency and presence penalty.
    Penalties,
    /// DRY.
    Dry,
    /// `topNSigma`.
    TopNSigma,
    /// `topK`.
    TopK,
    /// `typicalP`.
    TypP,
    /// `topP`.
    TopP,
    /// `minP`.
    MinP,
    /// XTC.
    Xtc,
    /// `temperature`.
    Temperature,
}

/// Which nodes may hold the model.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct PlacementSpec {
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,

    /// Taints of nodes that are tolerated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::tolerations")]
    pub tolerations: Vec<Toleration>,

    /// Label of nodes whose values replicas are spread over, such as `topology.kubernetes.io/zone`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub topology_key: Option<String>,

    /// By how many replicas two values of `topologyKey` may differ. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub max_skew: Option<i32>,

    /// Models of higher priority are placed first, and keep their memory.
    #[serde(default)]
    #[schemars(range(min = -1000, max = 1000))]
    pub priority: i32,
}

/// Bounds and aim of the built-in autoscaler.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.minReplicas <= self.maxReplicas").message("minReplicas must not be greater than maxReplicas")
)]
pub struct AutoscalingSpec {
    /// Fewest replicas.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub min_replicas: i32,

    /// Most replicas.
    #[schemars(range(min = 1, max = 64))]
    pub max_replicas: i32,

    /// Concurrent requests (running and waiting) that one replica should have.
    #[serde(default = "four")]
    #[schemars(range(min = 1, max = 1000))]
    pub target_concurrency: i32,

    /// Seconds during which the highest wish counts, before replicas are taken away.
    #[serde(default = "idle_seconds")]
    #[schemars(range(min = 0, max = 86_400))]
    pub scale_down_stabilization_seconds: i32,
}

/// How a change reaches the replicas.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.maxSurge) || !has(self.maxUnavailable) || self.maxSurge > 0 || self.maxUnavailable > 0").message("maxSurge and maxUnavailable must not both be 0")
)]
pub struct RolloutSpec {
    /// Replicas above `replicas` that may be loaded during a change.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub max_surge: i32,

    /// Replicas that may be missing during a change.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 64))]
    pub max_unavailable: i32,

    /// Seconds that running requests get to end before a replica goes.
    #[serde(default = "thirty")]
    #[schemars(range(min = 0, max = 86_400))]
    pub drain_seconds: i32,
}

impl Default for RolloutSpec {
    fn default() -> Self {
        Self { max_surge: one(), max_unavailable: one(), drain_seconds: thirty() }
    }
}

/// What stands before the model.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct TrafficSpec {
    /// Requests that may wait on one replica; more get 429 at once.
    #[serde(default = "max_queued")]
    #[schemars(range(min = 0, max = 10_000))]
    pub max_queued: i32,

    /// Seconds that a request waits before it gets 503 with Retry-After.
    #[serde(default = "sixty")]
    #[schemars(range(min = 1, max = 3600))]
    pub queue_timeout_seconds: i32,

    /// Seconds that a request may take in all.
    #[serde(default = "ten_minutes")]
    #[schemars(range(min = 1, max = 86_400))]
    pub request_timeout_seconds: i32,

    /// Limits per client.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    pub rate_limits: Vec<RateLimit>,
}

impl Default for TrafficSpec {
    fn default() -> Self {
        Self {
            max_queued: max_queued(),
            queue_timeout_seconds: sixty(),
            request_timeout_seconds: ten_minutes(),
            rate_limits: Vec::new(),
        }
    }
}

/// A limit for one client, or for each.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.requestsPerMinute) || has(self.tokensPerMinute)").message("a rate limit needs requestsPerMinute or tokensPerMinute")
)]
pub struct RateLimit {
    /// Client that the limit is for. Default: each client on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub client: Option<String>,

    /// Requests in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub requests_per_minute: Option<i32>,

    /// Prompt and answer tokens in a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub tokens_per_minute: Option<i32>,
}

const fn one() -> i32 {
    1
}
const fn two() -> i32 {
    2
}
const fn four() -> i32 {
    4
}
const fn thirty() -> i32 {
    30
}
const fn sixty() -> i32 {
    60
}
const fn hundred() -> i32 {
    100
}
const fn max_queued() -> i32 {
    64
}
const fn idle_seconds() -> i32 {
    300
}
const fn ten_minutes() -> i32 {
    600
}

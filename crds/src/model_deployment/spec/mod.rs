//! What a user asks for.

#![expect(
    unreachable_pub,
    reason = "KubeSchema derives a private copy of each struct with rules, as public as the struct"
)]

mod context;
mod defaults;
mod engine;
mod model;
mod placement;
mod sampling;
mod speculative;
mod traffic;
mod unload;

pub use context::*;
pub use engine::*;
pub use model::*;
pub use placement::*;
pub use sampling::*;
pub use speculative::*;
pub use traffic::*;
pub use unload::*;

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use self::defaults::one;
use super::status::ModelDeploymentStatus;

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
        .message("context.valueCacheType other than F16 needs flash attention: engine.flashAttention must not be Off"),
    validation = Rule::new("!has(self.engine) || !has(self.engine.speculative) || (self.engine.speculative.type == 'Draft') == has(self.model.draft)")
        .message("engine.speculative.type Draft and model.draft need each other; the other types have no draft model")
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

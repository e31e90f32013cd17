//! What the operator reports.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema;

/// What is, as far as the operator has seen. The operator is its only writer.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelDeploymentStatus {
    /// Generation of the spec that this status was computed from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Ready, Placed, `ModelAvailable`, Progressing and Degraded.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,

    /// Nodes that hold the model.
    pub replicas: i32,

    /// Nodes on which a request would be accepted now, loaded or not.
    pub ready_replicas: i32,

    /// Nodes that are ready and not about to go.
    pub available_replicas: i32,

    /// Nodes that hold the newest revision of the spec.
    pub updated_replicas: i32,

    /// Label selector for autoscalers. It matches no Pod: models run inside the agents' Pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub selector: Option<String>,

    /// Where requests go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,

    /// Ready replicas of wanted ones, such as "1/2".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub ready: Option<String>,

    /// State of the placement that is worst off.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub state: Option<String>,

    /// Memory of one replica over all devices, such as "5.0Gi": measured, or predicted before it has run.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub memory: Option<String>,

    /// Tokens of context that one request may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<i64>,

    /// Tokens that the KV cache has room for now, all requests together, of the replica where it is largest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool_tokens: Option<i64>,

    /// What the file says about itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelInfo>,

    /// Where the model is, node by node, in the order of the nodes' names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::atomic::<Placement>", length(max = 64))]
    pub placements: Vec<Placement>,
}

/// Where requests go.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Address {
    /// Base URL inside the cluster, to which clients append `/v1`.
    #[schemars(length(max = 512))]
    pub url: String,
}

/// What a model file says about itself, read from its header.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelInfo {
    /// `general.architecture`, such as "llama".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub architecture: Option<String>,

    /// Number of weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameter_count: Option<i64>,

    /// Quantisation of most weights, such as `Q4_K_M`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub quantization: Option<String>,

    /// Tokens of context that the model was trained with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained_context_tokens: Option<i64>,

    /// Bytes of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,

    /// SHA-256 of the file, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub sha256: Option<String>,
}

/// How a worker ended that nobody had asked to end.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Termination {
    /// In CamelCase, such as `WorkerExited`, `WorkerHung` or `OutOfMemory`.
    #[schemars(length(max = 64))]
    pub reason: String,

    /// Exit code or signal, and the last lines of llama.cpp's log.
    #[schemars(length(max = 1024))]
    pub message: String,
}

/// The model on one node.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Placement {
    /// Name of the node.
    #[schemars(length(max = 253))]
    pub node: String,

    /// Devices that hold the model, such as "Vulkan0" or "CPU".
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::short_names", length(max = 32))]
    pub devices: Vec<String>,

    /// Pending, Fetching, Loading, Ready, Unloaded, Draining or Failed.
    #[schemars(length(max = 64))]
    pub state: String,

    /// Tokens that the context on this node holds now, for all requests together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<i64>,

    /// Layers on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_offloaded: Option<i32>,

    /// Layers in all, the output layer counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_total: Option<i32>,

    /// Bytes that llama.cpp's dry run predicted, over all devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_predicted_bytes: Option<i64>,

    /// Bytes measured after loading, over all devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_measured_bytes: Option<i64>,

    /// Progress of fetching or loading, in steps of 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_percent: Option<i32>,

    /// Why it is in this state, with the numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,

    /// Times that the worker has ended on its own since the node's agent started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restarts: Option<i32>,

    /// How it ended the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_termination: Option<Termination>,
}

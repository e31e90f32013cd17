//! ModelNode: the contract between operator and agent, one object per node, named after it.
//!
//! **The operator creates and deletes it and writes `spec` (what should be on this node); the agent writes `status`
//! (what is).** Nobody else writes either. The rules are the table in ARCHITECTURE.md.
//!
//! Both sides must live with a neighbour one version older or newer, so nothing here is stricter than it must be: no
//! enums in status, entries of `spec.models` are parsed one by one ([`RawAssignment::parse`]), and their schema carries
//! no rules (a ModelDeployment's have been applied before).

#![expect(clippy::duplicated_attributes, reason = "each printer column names its type")]
#![expect(
    unreachable_pub,
    reason = "KubeSchema derives a private copy of each struct with rules, as public as the struct"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use crate::model_deployment::{
    ContextSpec, EngineSpec, ModelInfo, ModelSpec, RolloutSpec, Termination, TrafficSpec, UnloadSpec,
};
use crate::schema;

/// What should be on a node. The operator is the only writer.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "altiplano.dev",
    version = "v1alpha1",
    kind = "ModelNode",
    plural = "modelnodes",
    singular = "modelnode",
    shortname = "mnode",
    category = "altiplano",
    status = "ModelNodeStatus",
    derive = "PartialEq",
    doc = "ModelNode is the contract between Altiplano's operator and the agent on the Node of the same name: the operator writes spec (what should be on the node), the agent writes status (what is). Neither is for people to edit.",
    printcolumn(
        name = "Agent",
        type_ = "string",
        json_path = ".status.agent.version",
        description = "Version of the agent"
    ),
    printcolumn(
        name = "Devices",
        type_ = "string",
        json_path = ".status.deviceSummary",
        description = "Devices that hold models"
    ),
    printcolumn(
        name = "Models",
        type_ = "string",
        json_path = ".status.modelSummary",
        description = "Ready models of assigned ones"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Addresses",
        type_ = "string",
        json_path = ".status.addresses[*].address",
        priority = 1,
        description = "Where the agent listens"
    ),
    printcolumn(
        name = "Memory",
        type_ = "string",
        json_path = ".status.memorySummary",
        priority = 1,
        description = "Memory reserved of all there is"
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.epoch >= oldSelf.epoch").message("epoch must not go back: a newer leader has written this object")
)]
pub struct ModelNodeSpec {
    /// Term of the leading operator. The API server refuses a lower one, and so stops a leader that is none any more.
    #[schemars(range(min = 0))]
    pub epoch: i64,

    /// The models of this node. One writer, replaced whole; only the removal of an entry unloads a model.
    #[serde(default)]
    #[schemars(schema_with = "assignments")]
    pub models: Vec<RawAssignment>,

    /// The agent's Pod is to be replaced by one of a newer revision. Absent again when the new agent serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<AgentUpgrade>,
}

/// The replacement of an agent's Pod. It names the Pod, so that it means nothing to the agent in the next one.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct AgentUpgrade {
    /// Uid of the Pod that goes.
    #[schemars(length(max = 64))]
    pub pod_uid: String,

    /// Its agent is to let running requests end, take no new ones, and say in `status.agent.drain` when that is done. False
    /// while models still move to other nodes; what was drained is served again when this is taken back.
    #[serde(default)]
    pub drain: bool,
}

fn assignments(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = schema::atomic::<RawAssignment>(generator);
    schema.insert("maxItems".into(), crate::names::MAX_MODELS_PER_NODE.into());
    schema
}

/// An entry of `spec.models` as it came, so that one that this build cannot read does not take the others along.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(transparent)]
pub struct RawAssignment(pub serde_json::Value);

impl JsonSchema for RawAssignment {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ModelAssignment".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        ModelAssignment::json_schema(generator)
    }

    fn inline_schema() -> bool {
        true
    }
}

/// An entry that this build cannot read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnsupportedAssignment {
    /// The entry's uid, empty when even that is missing.
    pub uid: String,
    /// The entry's revision, empty when it is missing.
    pub revision: String,
    /// What could not be read, with the field's name.
    pub message: String,
}

impl RawAssignment {
    /// Reads the entry.
    ///
    /// # Errors
    /// What could not be read; for the status entry `Failed/UnsupportedSpec`.
    pub fn parse(&self) -> Result<ModelAssignment, UnsupportedAssignment> {
        ModelAssignment::deserialize(&self.0).map_err(|error| {
            let text = |key: &str| self.0.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
            UnsupportedAssignment { uid: text("uid"), revision: text("revision"), message: error.to_string() }
        })
    }
}

impl TryFrom<&ModelAssignment> for RawAssignment {
    type Error = serde_json::Error;

    fn try_from(assignment: &ModelAssignment) -> Result<Self, Self::Error> {
        serde_json::to_value(assignment).map(Self)
    }
}

/// One model on this node. `uid` + `revision` is its key.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ModelAssignment {
    /// Uid of the ModelDeployment.
    #[schemars(length(min = 1, max = 64))]
    pub uid: String,

    /// Hash of everything whose change needs a new worker.
    #[schemars(length(min = 1, max = 64))]
    pub revision: String,

    /// metadata.generation of the ModelDeployment that this entry was made from.
    pub generation: i64,

    /// Namespace of the ModelDeployment.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,

    /// Name of the ModelDeployment.
    #[schemars(length(min = 1, max = 52))]
    pub name: String,

    /// Name that clients ask for.
    #[schemars(length(min = 1, max = 128))]
    pub served_name: String,

    /// Serve holds the model; Estimate asks only how much memory it needs.
    #[serde(default)]
    pub mode: AssignmentMode,

    /// Priority for memory; higher goes first.
    #[serde(default)]
    pub priority: i32,

    /// The model file and what goes with it.
    pub model: ModelSpec,

    /// How much context a request may use.
    #[serde(default)]
    pub context: ContextSpec,

    /// When the model leaves memory.
    #[serde(default)]
    pub unload: UnloadSpec,

    /// How llama.cpp runs the model.
    #[serde(default)]
    pub engine: EngineSpec,

    /// How a change reaches this replica.
    #[serde(default)]
    pub rollout: RolloutSpec,

    /// What stands before the model.
    #[serde(default)]
    pub traffic: TrafficSpec,
}

/// What the agent is to do with a model.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AssignmentMode {
    /// Hold and serve it.
    #[default]
    Serve,
    /// Say how much memory it needs.
    Estimate,
}

/// What is on a node. The agent on it is the only writer.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelNodeStatus {
    /// What the agent cannot give, such as isolation of workers from each other.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,

    /// metadata.generation of the spec that the agent last acted on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// The agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentInfo>,

    /// Where the agent listens, one entry per address family.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::atomic::<NodeAddress>", length(max = 2))]
    pub addresses: Vec<NodeAddress>,

    /// Port on which all models of the node are served.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<i32>,

    /// Devices as llama.cpp sees them, the CPU (host memory) among them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::atomic::<Device>", length(max = 32))]
    pub devices: Vec<Device>,

    /// Devices in short, for the column.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub device_summary: Option<String>,

    /// Ready models of assigned ones, for the column.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub model_summary: Option<String>,

    /// Memory reserved of all there is, for the column.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub memory_summary: Option<String>,

    /// Room for model files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,

    /// The models, in the order of `spec.models`, then those on their way out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::atomic::<ModelState>", length(max = 64))]
    pub models: Vec<ModelState>,
}

/// The agent that wrote the status.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct AgentInfo {
    /// Version of the agent.
    #[schemars(length(max = 64))]
    pub version: String,

    /// Version of the operator/agent contract that it speaks.
    pub contract: i32,

    /// Uid of its Pod. An agent that sees another live one here stops writing.
    #[schemars(length(max = 64))]
    pub pod_uid: String,

    /// When it started, RFC 3339.
    #[schemars(length(max = 64))]
    pub started_at: String,

    /// llama.cpp backends that it has, such as "CPU" and "Vulkan".
    #[schemars(schema_with = "schema::short_names", length(max = 16))]
    pub backends: Vec<String>,

    /// Of an agent that `spec.upgrade` asks to drain: "Draining", then "Drained".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub drain: Option<String>,
}

/// An address of the agent.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeAddress {
    /// IPv4 or IPv6.
    #[schemars(length(max = 8))]
    pub family: String,

    /// The address.
    #[schemars(length(max = 64))]
    pub address: String,
}

/// A device that can hold a model.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    /// llama.cpp's name, such as "Vulkan0", "CUDA1" or "CPU".
    #[schemars(length(max = 64))]
    pub id: String,

    /// What the driver calls it, such as "NVIDIA H200".
    #[schemars(length(max = 256))]
    pub name: String,

    /// The driver and its version, such as "NVIDIA 570.124.06" or "llvmpipe Mesa 22.3.6"; absent where nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub driver: Option<String>,

    /// llama.cpp's backend, such as "Vulkan", "CUDA" or "CPU".
    #[schemars(length(max = 64))]
    pub backend: String,

    /// GPU, `IntegratedGPU`, Accelerator or CPU.
    #[serde(rename = "type")]
    #[schemars(length(max = 32))]
    pub kind: String,

    /// Bytes that the device has; of the CPU: what the agent's cgroup allows.
    pub memory_total_bytes: i64,

    /// Bytes promised to models.
    pub memory_reserved_bytes: i64,

    /// Bytes that the driver says are in use and that no worker of this agent holds: other processes', and what a
    /// worker that has ended has not given back. In steps that keep the status quiet.
    #[serde(skip_serializing_if = "is_zero")]
    pub memory_foreign_bytes: i64,

    /// What people should know about the device's memory, such as that it is a MIG slice or shared with others.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub note: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &i64) -> bool {
    *count == 0
}

/// Room for model files.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Storage {
    /// Bytes that may be used.
    pub capacity_bytes: i64,

    /// Bytes in use, in steps that keep the status quiet.
    pub used_bytes: i64,
}

/// A model on this node.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelState {
    /// Uid of the ModelDeployment.
    #[schemars(length(max = 64))]
    pub uid: String,

    /// Revision that this entry is about.
    #[schemars(length(max = 64))]
    pub revision: String,

    /// One of the states in `conditions::states`; readers treat an unknown one as not ready.
    #[schemars(length(max = 64))]
    pub state: String,

    /// Why, in CamelCase.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,

    /// The same for people, with the numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,

    /// Port on which this model and no other is served.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<i32>,

    /// Progress of fetching or loading, in steps of 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_percent: Option<i32>,

    /// Tokens that the context holds now, for all requests together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_tokens: Option<i64>,

    /// Tokens of context that one request may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<i64>,

    /// Requests generated at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parallel: Option<i32>,

    /// Devices that hold it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::short_names", length(max = 32))]
    pub devices: Vec<String>,

    /// Layers on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_offloaded: Option<i32>,

    /// Layers in all, the output layer counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_total: Option<i32>,

    /// Memory per device.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::atomic::<DeviceMemory>", length(max = 32))]
    pub memory: Vec<DeviceMemory>,

    /// The answer to `mode: Estimate`: bytes that the model would need per device.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::atomic::<RequiredMemory>", length(max = 32))]
    pub required_bytes: Vec<RequiredMemory>,

    /// Whether the file is complete on this node.
    pub file_present: bool,

    /// What the file says about itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelInfo>,

    /// Milliseconds of the last load, from the worker's start to Ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_milliseconds: Option<i64>,

    /// Times that the worker has ended on its own since the agent started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restarts: Option<i32>,

    /// How it ended the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_termination: Option<Termination>,
}

/// Memory of a model on one device.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct DeviceMemory {
    /// The device's id.
    #[schemars(length(max = 64))]
    pub device: String,

    /// Bytes that the dry run predicted; of a model that was loaded before in the same way: what was measured then.
    pub predicted_bytes: i64,

    /// Bytes after loading.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured_bytes: Option<i64>,

    /// How far the prediction was off: measured bytes less predicted ones, as they were when the model had been loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_bytes: Option<i64>,
}

/// Memory that a model would need on one device.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct RequiredMemory {
    /// The device's id.
    #[schemars(length(max = 64))]
    pub device: String,

    /// Bytes.
    pub bytes: i64,
}

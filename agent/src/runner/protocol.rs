//! What agent and worker say to each other.
//!
//! The agent starts `altiplano-agent runner` and writes one line of JSON, a [`RunnerConfig`], to its standard input,
//! which stays open for [`RunnerCommand`]s, one a line: its end means that the agent is gone, and the worker exits (below
//! `altiplano-agent init` it first waits for another agent, see `adopt`). The worker writes one [`RunnerEvent`]
//! a line to its standard output, logs to its standard error, and serves the model's HTTP API on a Unix socket.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use altiplano_crds::model_deployment::{ContextSpec, EngineSpec, TrafficSpec};
use serde::{Deserialize, Serialize};

/// Everything a worker needs to know. The default is no model, the API's defaults, and the CPU alone.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct RunnerConfig {
    /// Uid of the ModelDeployment, for logs.
    pub uid: String,
    /// Revision of the ModelDeployment, for logs.
    pub revision: String,
    /// Namespace of the ModelDeployment, for metrics.
    pub namespace: String,
    /// Name of the ModelDeployment, for metrics.
    pub name: String,
    /// Name that clients ask for; stands in `model` of every response.
    pub served_name: String,
    /// The GGUF file (of a split model: the first part).
    pub model_path: PathBuf,
    /// Projector (mmproj), for images; loaded with the model.
    pub projector: Option<PathBuf>,
    /// The GGUF file of a smaller model that guesses for it.
    pub draft_path: Option<PathBuf>,
    /// LoRA adapters, loaded with the model.
    pub adapters: Vec<AdapterFile>,
    /// Jinja template that replaces the file's own.
    pub chat_template: Option<String>,
    /// Unix socket to serve HTTP on; created with mode 0600.
    pub socket: PathBuf,
    /// Context sizing.
    pub context: ContextSpec,
    /// How llama.cpp runs the model.
    pub engine: EngineSpec,
    /// Queue and time limits.
    pub traffic: TrafficSpec,
    /// Devices that the agent granted, by llama.cpp's names; empty: the CPU alone.
    pub devices: Vec<String>,
    /// Layers to offload to `devices`; `None`: all.
    pub gpu_layers: Option<u32>,
    /// Layers, from the first one on, whose experts stay in host memory.
    pub expert_layers_on_cpu: u32,
    /// A dry run also says what parts of the model would take.
    pub parts: bool,
    /// CPU threads.
    pub threads: u32,
    /// Bytes of the devices that the agent has reserved: a worker that does not find them free does not begin.
    pub reserved: BTreeMap<String, u64>,
}

impl RunnerConfig {
    /// The same for a part of the model on the devices.
    #[must_use]
    pub fn with_part(self, part: Part) -> Self {
        let Part { gpu_layers, expert_layers_on_cpu, layers_total: _ } = part;
        Self { gpu_layers: Some(gpu_layers), expert_layers_on_cpu, ..self }
    }

    /// Whether any layer may be on a GPU.
    pub(crate) fn uses_gpu(&self) -> bool {
        self.gpu_layers != Some(0) && self.devices.iter().any(|device| device != "CPU")
    }
}

/// What of a model is on GPUs.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct Part {
    /// Layers, the last ones, the output layer counted.
    pub gpu_layers: u32,
    /// Of all layers the first ones whose experts are in host memory.
    pub expert_layers_on_cpu: u32,
    /// Layers of the model, the output layer counted.
    pub layers_total: u32,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpu_layers, expert_layers_on_cpu, layers_total } = *self;
        if gpu_layers >= layers_total {
            return write!(f, "the experts of {expert_layers_on_cpu} of {layers_total} layers are there");
        }
        let experts = if expert_layers_on_cpu > 0 { " without their experts" } else { "" };
        write!(f, "{gpu_layers} of {layers_total} layers are on the GPU{experts}")
    }
}

/// A LoRA adapter's file.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct AdapterFile {
    /// Name that a request puts behind the model's and a colon.
    pub name: String,
    /// The GGUF file.
    pub path: PathBuf,
    /// Strength in percent; 100 is as trained.
    pub scale_percent: u32,
}

/// Percent of a load from which on the weights are there, and the context is made and warmed up.
pub const WARM_UP_PERCENT: u8 = 90;

/// What a worker reports, one JSON object a line on standard output.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", tag = "event")]
pub enum RunnerEvent {
    /// The model is being loaded.
    Loading {
        /// 0 to 100.
        percent: u8,
    },
    /// The socket accepts requests.
    Ready(RunnerReport),
    /// Something about the report changed, such as the context's size.
    Changed(RunnerReport),
    /// Requests began or ended; sent at once when the number leaves or reaches zero, else at most once a second.
    Activity {
        /// Requests running.
        running: u32,
        /// Requests waiting.
        waiting: u32,
    },
    /// The engine's heartbeat, every two seconds from the worker's start on. A worker that is silent hangs as a whole;
    /// one whose step does not end hangs in llama.cpp or in the driver.
    Heartbeat {
        /// Steps that the engine has done.
        step: u64,
        /// Seconds that the present step has taken; 0 while the engine is idle or loads.
        seconds: u64,
        /// Bytes of host memory that only this process's end gives back: anonymous and shared, not mapped weights.
        #[serde(default)]
        held_bytes: u64,
    },
    /// May the context take more memory? Answered by [`RunnerCommand::Growth`]. What is granted is reserved until the
    /// next report settles it.
    Growth {
        /// Number of the question, from 1; 0 gives back what was granted and not taken.
        id: u64,
        /// Bytes beyond those of the last report.
        memory: Vec<MemoryUse>,
    },
    /// The worker is about to exit with a non-zero code.
    Failed(RunnerFailure),
}

/// What the agent tells a worker, one JSON object a line on its standard input, after the configuration.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", tag = "command")]
pub enum RunnerCommand {
    /// The answer to [`RunnerEvent::Growth`].
    Growth {
        /// The question's number.
        id: u64,
        /// Why there is no memory, for people; absent: the memory is reserved.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        refused: Option<String>,
        /// Others hold what is missing and may leave it, so it is worth waiting for.
        #[serde(default)]
        passing: bool,
    },
    /// Another needs memory: the context should give back what is not needed now.
    Shrink,
}

/// What a loaded model is and takes.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct RunnerReport {
    /// Cells of the KV cache, for all requests together.
    pub context_tokens: u32,
    /// Tokens that one request may use.
    pub max_tokens: u32,
    /// Requests generated at the same time.
    pub parallel: u32,
    /// Layers on a GPU.
    pub layers_offloaded: u32,
    /// Layers in all, the output layer counted.
    pub layers_total: u32,
    /// Memory per device, as measured after the warm-up.
    pub memory: Vec<MemoryUse>,
    /// Milliseconds from the worker's start to Ready.
    pub load_milliseconds: u64,
    /// What was asked for and could not be had, for people (such as flash attention that the device lacks).
    pub notes: Vec<String>,
}

/// Bytes on one device.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct MemoryUse {
    /// llama.cpp's name of the device; "CPU" is host memory.
    pub device: String,
    /// Bytes of weights.
    pub weights_bytes: u64,
    /// Bytes of KV cache and other state.
    pub context_bytes: u64,
    /// Bytes of compute buffers.
    pub compute_bytes: u64,
    /// Bytes of all else that the worker takes on this device.
    pub other_bytes: u64,
    /// Of the weights: pages of the file, which the kernel can take back by itself.
    pub mapped_bytes: u64,
}

impl MemoryUse {
    /// All bytes on the device.
    #[must_use]
    pub fn total(&self) -> u64 {
        let Self { device: _, weights_bytes, context_bytes, compute_bytes, other_bytes, mapped_bytes: _ } = self;
        weights_bytes + context_bytes + compute_bytes + other_bytes
    }
}

/// Why a worker could not go on.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RunnerFailure {
    /// CamelCase, such as `LoadFailed`, `UnknownArchitecture` or `InsufficientMemory`.
    pub reason: String,
    /// For people, with llama.cpp's own words.
    pub message: String,
}

/// What `altiplano-agent runner --probe` prints: one JSON object on standard output.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct ProbeReport {
    /// Backends that llama.cpp has here, such as "CPU" and "Vulkan".
    pub backends: Vec<String>,
    /// The devices, the CPU last.
    pub devices: Vec<ProbedDevice>,
}

/// A device as llama.cpp sees it.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct ProbedDevice {
    /// llama.cpp's name, such as "Vulkan0" or "CPU".
    pub id: String,
    /// What the driver calls it.
    pub description: String,
    /// The backend.
    pub backend: String,
    /// GPU, `IntegratedGPU`, Accelerator or CPU.
    pub kind: String,
    /// Bytes in all.
    pub memory_total_bytes: u64,
    /// Bytes free right now.
    pub memory_free_bytes: u64,
    /// The driver and its version; empty where nobody says.
    pub driver: String,
    /// Its place on PCI, such as `0000:17:00.0`; empty where nobody says.
    pub pci: String,
    /// It is a slice of a GPU (MIG), as far as the driver's library knows.
    pub mig: bool,
    /// The free bytes were read while the process that says them did not have the device open.
    pub unopened: bool,
}

/// What `altiplano-agent runner --estimate` prints for the [`RunnerConfig`] on its standard input: llama.cpp's dry run,
/// no weights read.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct EstimateReport {
    /// Bytes per device at the context's initial size.
    pub memory: Vec<MemoryUse>,
    /// Layers that would be on a GPU.
    pub layers_offloaded: u32,
    /// Layers in all, the output layer counted.
    pub layers_total: u32,
    /// Cells of the KV cache at first.
    pub context_tokens: u32,
    /// Tokens that one request may use.
    pub max_tokens: u32,
    /// What parts of the model would take, the largest first; empty unless the configuration asks for them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartEstimate>,
}

/// What a part of a model would take.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct PartEstimate {
    /// The part.
    pub part: Part,
    /// Bytes per device at the context's initial size.
    pub memory: Vec<MemoryUse>,
}

/// What `altiplano-agent runner --measure-batches` is given on its standard input.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct BatchLoad {
    /// The model, and how its context is laid out.
    pub runner: RunnerConfig,
    /// Tokens with which all prompts begin.
    pub shared: u32,
    /// Tokens of each prompt after those; at least one.
    pub own: Vec<u32>,
    /// Tokens generated for each.
    pub generate: u32,
}

/// What it prints: microseconds, one figure for each round.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct BatchReport {
    /// Of reading the common beginning.
    pub shared_micros: Vec<u64>,
    /// Of reading the rest of all prompts.
    pub own_micros: Vec<u64>,
    /// Of the steps after that.
    pub generate_micros: Vec<u64>,
}

/// What `altiplano-agent runner --measure-resizes` prints for the [`RunnerConfig`] on its standard input.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct ResizeReport {
    /// Tokens in the context.
    pub tokens: u32,
    /// Cells of the small context.
    pub from: u32,
    /// Cells of the large one.
    pub to: u32,
    /// Microseconds of llama.cpp's bare calls: state out, free, create, state in.
    pub bare_micros: Vec<u64>,
    /// Microseconds of the engine's own growth in place.
    pub resize_micros: Vec<u64>,
    /// Microseconds of moving the state alone, by the bare calls.
    pub moving_micros: Vec<u64>,
    /// Microseconds for which the engine stands still when it takes a context into use that was made beside the other.
    pub stall_micros: Vec<u64>,
}

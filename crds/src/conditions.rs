//! Condition types and reasons, each a documented constant, so that alerts and tests can rely on them.

/// Condition types of a ModelDeployment.
pub mod types {
    /// A request would be accepted now. Stays True while the model is unloaded (reason `Idle`).
    pub const READY: &str = "Ready";
    /// Every wanted replica has a node.
    pub const PLACED: &str = "Placed";
    /// The model file is on every node that holds the model, and is what the spec says.
    pub const MODEL_AVAILABLE: &str = "ModelAvailable";
    /// Something is still being brought to the wanted state.
    pub const PROGRESSING: &str = "Progressing";
    /// It serves, but not as wanted: fewer replicas, on another device, without isolation.
    pub const DEGRADED: &str = "Degraded";
    /// Of a ModelNode: what the agent cannot give, such as isolation of workers from each other.
    pub const AGENT_HEALTHY: &str = "AgentHealthy";
    /// Of a ModelNode: a worker that takes too much memory ends alone. Where it is False, the kernel ends all of them.
    pub const WORKERS_ISOLATED: &str = "WorkersIsolated";
    /// Of the agents' DaemonSet: every agent is of its newest revision.
    pub const AGENTS_UP_TO_DATE: &str = "AgentsUpToDate";
}

/// Reasons, as they stand in conditions, Events and metric labels.
pub mod reasons {
    /// At least one replica accepts requests and is loaded.
    pub const SERVING: &str = "Serving";
    /// Unloaded by policy; a request wakes it.
    pub const IDLE: &str = "Idle";
    /// `replicas` is 0.
    pub const SCALED_TO_ZERO: &str = "ScaledToZero";
    /// Every replica has a node.
    pub const ALL_PLACED: &str = "AllPlaced";
    /// Nodes are being asked how much memory the model needs.
    pub const ESTIMATING: &str = "Estimating";
    /// No node passes selector, taints and readiness.
    pub const NO_NODE_MATCHES: &str = "NoNodeMatches";
    /// No device has enough memory for the model.
    pub const INSUFFICIENT_MEMORY: &str = "InsufficientMemory";
    /// The model needs a device of a kind that no matching node has.
    pub const NO_DEVICE: &str = "NoDevice";
    /// The node's list of models is full.
    pub const NODE_FULL: &str = "NodeFull";
    /// No agent has reported from any matching node.
    pub const AGENT_UNAVAILABLE: &str = "AgentUnavailable";
    /// The file is being fetched.
    pub const FETCHING: &str = "Fetching";
    /// The model is being loaded.
    pub const LOADING: &str = "Loading";
    /// The file is in place and verified.
    pub const FILE_READY: &str = "FileReady";
    /// The file has not been looked at on any node.
    pub const NOT_FETCHED: &str = "NotFetched";
    /// All replicas are of the newest revision and ready.
    pub const SETTLED: &str = "Settled";
    /// Replicas are being moved to the newest revision.
    pub const ROLLING_OUT: &str = "RollingOut";
    /// Replicas are draining before they go.
    pub const DRAINING: &str = "Draining";
    /// The model runs as asked for.
    pub const AS_WANTED: &str = "AsWanted";
    /// Fewer replicas are ready than wanted.
    pub const REPLICAS_MISSING: &str = "ReplicasMissing";
    /// Another object has the Service's name and is not ours.
    pub const SERVICE_NAME_TAKEN: &str = "ServiceNameTaken";
    /// The agent cannot do what this spec asks for.
    pub const UNSUPPORTED_SPEC: &str = "UnsupportedSpec";
    /// The worker ended on its own.
    pub const WORKER_EXITED: &str = "WorkerExited";
    /// The worker was ended before the kernel had to: the node's agent and its workers had nearly used up their memory.
    pub const OUT_OF_MEMORY: &str = "OutOfMemory";
    /// The kernel ends all processes of the agent's control group when its memory runs out (`memory.oom.group`).
    pub const OOM_GROUP: &str = "OomGroup";
    /// llama.cpp could not load the file.
    pub const LOAD_FAILED: &str = "LoadFailed";
    /// The agent on the node has stopped renewing its Lease.
    pub const NODE_STALE: &str = "NodeStale";
    /// A GPU is required and the node's agent has none.
    pub const GPU_REQUIRED: &str = "GPURequired";
    /// It runs on the CPU although it prefers a GPU.
    pub const ON_CPU: &str = "OnCPU";
    /// The agent on the node is being replaced by one of a newer revision.
    pub const AGENT_UPGRADE: &str = "AgentUpgrade";
    /// All agents are of the newest revision.
    pub const UP_TO_DATE: &str = "UpToDate";
    /// The upgrade of the agents is held (`agent.upgrade.paused` of the chart).
    pub const UPGRADE_PAUSED: &str = "UpgradePaused";
    /// A new agent does not serve, so no other is replaced.
    pub const UPGRADE_BLOCKED: &str = "UpgradeBlocked";
    /// Deletion went on after the time for draining was over.
    pub const DRAIN_TIMED_OUT: &str = "DrainTimedOut";
}

/// States of a model on a node (`ModelNode.status.models[].state`), in the order of a model's life. Strings, not an
/// enum: an unknown state of a newer agent must not refuse a whole status.
pub mod states {
    /// Known, nothing done yet, or waiting for something that `reason` names.
    pub const PENDING: &str = "Pending";
    /// The file is being fetched or verified.
    pub const FETCHING: &str = "Fetching";
    /// A worker is loading the model.
    pub const LOADING: &str = "Loading";
    /// Requests are served from memory.
    pub const READY: &str = "Ready";
    /// The file is there and a request would load the model.
    pub const UNLOADED: &str = "Unloaded";
    /// Running requests are finished, new ones refused.
    pub const DRAINING: &str = "Draining";
    /// `reason` and `message` say why; it is tried again after a back-off.
    pub const FAILED: &str = "Failed";
    /// Only an estimate was asked for and `requiredBytes` holds it.
    pub const ESTIMATED: &str = "Estimated";

    /// Of an agent (`ModelNode.status.agent.drain`): it serves nothing any more, and its Pod may go.
    pub const DRAINED: &str = "Drained";

    /// Whether a model in this state accepts requests: loaded, or loaded by the request itself.
    #[must_use]
    pub fn accepts_requests(state: &str) -> bool {
        state == READY || state == UNLOADED
    }
}

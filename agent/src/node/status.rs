//! What the agent says of itself: ModelNode's status, built from state alone.
//!
//! Nothing in it changes by itself: no free memory, no clock, progress in steps of 5 %.

use std::collections::BTreeSet;
use std::net::IpAddr;

use altiplano_crds::conditions::{reasons, states, types};
use altiplano_crds::model_deployment::{ModelInfo, Termination};
use altiplano_crds::model_node::{
    AgentInfo, Device, DeviceMemory, ModelNodeStatus, ModelState, NodeAddress, RequiredMemory, Storage,
};
use altiplano_crds::names::{CONTRACT_VERSION, MAX_MESSAGE_CHARS, MAX_MODELS_PER_NODE, clip};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::observe::{Desired, Entry, FileState, Listener, Model, Observed, Phase, Worker};
use super::plan::{Plan, Verdict};
use crate::devices::{self, CPU};
use crate::ledger::bytes;
use crate::runner::protocol::ProbedDevice;
use crate::store::StoredModel;

/// What an agent knows of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Uid of its Pod.
    pub pod_uid: String,
    /// When it started.
    pub started_at: jiff::Timestamp,
    /// Where it listens.
    pub addresses: Vec<IpAddr>,
    /// Port of all models.
    pub port: u16,
}

/// The status.
#[must_use]
pub fn status(identity: &Identity, desired: &Desired, observed: &Observed, plan: &Plan) -> ModelNodeStatus {
    let devices: Vec<Device> = observed
        .devices
        .iter()
        .flat_map(|devices| &devices.list)
        .map(|device| Device {
            id: clip(&device.id, 64),
            name: clip(&device.description, 256),
            driver: Some(clip(&device.driver, 256)).filter(|driver| !driver.is_empty()),
            backend: clip(&device.backend, 64),
            kind: clip(&device.kind, 32),
            memory_total_bytes: signed(device.memory_total_bytes),
            memory_reserved_bytes: signed(observed.ledger.held(&device.id)),
            memory_foreign_bytes: signed(foreign(observed, device)),
            note: devices::note(device, foreign(observed, device)).map(|note| clip(&note, 256)),
        })
        .collect();
    let models = models(desired, observed, plan);
    let ready = models.iter().filter(|model| states::accepts_requests(&model.state)).count();
    let mut backends: Vec<String> = observed.devices.iter().flat_map(|d| &d.backends).map(|b| clip(b, 64)).collect();
    backends.truncate(16);
    ModelNodeStatus {
        conditions: vec![health(identity, observed), isolation(identity, observed)],
        observed_generation: desired.generation,
        agent: Some(AgentInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            contract: i32::try_from(CONTRACT_VERSION).unwrap_or(i32::MAX),
            pod_uid: clip(&identity.pod_uid, 64),
            started_at: identity.started_at.to_string(),
            backends,
            drain: drain(identity, desired, observed).map(str::to_owned),
        }),
        addresses: addresses(&identity.addresses),
        port: Some(i32::from(identity.port)),
        device_summary: Some(device_summary(&devices)),
        model_summary: Some(format!("{ready}/{}", desired.entries.len())),
        memory_summary: Some(memory_summary(&devices)),
        devices,
        storage: observed.storage.map(|(used, capacity)| Storage {
            capacity_bytes: signed(capacity),
            used_bytes: signed(in_steps(used, capacity)),
        }),
        models,
    }
}

/// How far an agent is that is to be replaced.
fn drain(identity: &Identity, desired: &Desired, observed: &Observed) -> Option<&'static str> {
    let state = if observed.models.is_empty() { states::DRAINED } else { states::DRAINING };
    desired.drains(&identity.pod_uid).then_some(state)
}

fn models(desired: &Desired, observed: &Observed, plan: &Plan) -> Vec<ModelState> {
    let verdict = |uid: &str| plan.verdicts.get(uid).cloned().unwrap_or_default();
    let mut models: Vec<ModelState> = desired
        .entries
        .iter()
        .map(|entry| {
            let (uid, revision) = match entry {
                Entry::Model(assignment) => (&assignment.uid, &assignment.revision),
                Entry::Unsupported(unsupported) => (&unsupported.uid, &unsupported.revision),
            };
            model_state(uid, revision, observed.models.get(uid), &verdict(uid))
        })
        .collect();
    let wanted: BTreeSet<&str> = desired.entries.iter().map(Entry::uid).collect();
    for (uid, model) in &observed.models {
        if wanted.contains(uid.as_str()) {
            models.extend(former_revisions(uid, model));
        } else {
            models.push(model_state(uid, &model.assignment.revision, Some(model), &verdict(uid)));
        }
    }
    models.truncate(MAX_MODELS_PER_NODE);
    models
}

/// The revision that is wanted, or the last one of a model on its way out.
fn model_state(uid: &str, revision: &str, model: Option<&Model>, verdict: &Verdict) -> ModelState {
    let state = ModelState {
        uid: clip(uid, 64),
        revision: clip(revision, 64),
        state: if verdict.state.is_empty() { states::PENDING } else { verdict.state }.to_owned(),
        reason: verdict.reason.as_deref().map(|reason| clip(reason, 64)),
        message: verdict.message.as_deref().map(|message| clip(message, MAX_MESSAGE_CHARS)),
        progress_percent: verdict.percent.map(|percent| i32::from(percent.min(100) / 5 * 5)),
        required_bytes: verdict
            .required
            .iter()
            .map(|(device, bytes)| RequiredMemory { device: clip(device, 64), bytes: signed(*bytes) })
            .collect(),
        ..ModelState::default()
    };
    let Some(model) = model else { return state };
    let worker = model.workers.values().rfind(|worker| worker.revision == revision);
    let file = model.file.known();
    let state = ModelState {
        port: port(model),
        file_present: matches!(model.file, FileState::Present(_)),
        model: file.map(|stored| info(stored)),
        restarts: (model.restarts > 0).then(|| i32::try_from(model.restarts).unwrap_or(i32::MAX)),
        last_termination: model.last_termination.as_ref().map(|Termination { reason, message }| Termination {
            reason: clip(reason, 64),
            message: clip(message, MAX_MESSAGE_CHARS),
        }),
        ..state
    };
    worker.map_or(state.clone(), |worker| with_worker(state, worker))
}

/// Workers of former revisions: each serves until the wanted one is ready, or ends its requests.
fn former_revisions(uid: &str, model: &Model) -> Vec<ModelState> {
    let mut seen = BTreeSet::from([model.assignment.revision.as_str()]);
    let former = model.workers.values().rev().filter(|worker| seen.insert(worker.revision.as_str()));
    former
        .filter_map(|worker| {
            let (state, reason) = match (worker.phase, worker.leaving) {
                (Phase::Loading { .. }, _) => return None,
                (Phase::Ready { .. }, None) => (states::READY, reasons::ROLLING_OUT),
                (Phase::Ready { .. }, Some(_)) => (states::DRAINING, reasons::ROLLING_OUT),
            };
            let state = ModelState {
                uid: clip(uid, 64),
                revision: clip(&worker.revision, 64),
                state: state.to_owned(),
                reason: Some(reason.to_owned()),
                port: port(model),
                ..ModelState::default()
            };
            Some(with_worker(state, worker))
        })
        .collect()
}

fn with_worker(state: ModelState, worker: &Worker) -> ModelState {
    let devices = if worker.devices.is_empty() { vec![CPU.to_owned()] } else { worker.devices.clone() };
    let state = ModelState { devices, memory: memory(worker), ..state };
    let Some(report) = &worker.report else { return state };
    let tokens = |count: u32| (count > 0).then(|| i64::from(count));
    let count = |number: u32| Some(i32::try_from(number).unwrap_or(i32::MAX));
    let notes = state.message.iter().chain(&report.notes).map(String::as_str).collect::<Vec<_>>().join("; ");
    ModelState {
        context_tokens: tokens(report.context_tokens),
        max_tokens: tokens(report.max_tokens),
        parallel: count(report.parallel).filter(|parallel| *parallel > 0),
        layers_offloaded: count(report.layers_offloaded),
        layers_total: count(report.layers_total),
        load_milliseconds: Some(signed(report.load_milliseconds)),
        message: Some(clip(&notes, MAX_MESSAGE_CHARS)).filter(|notes| !notes.is_empty()),
        ..state
    }
}

fn memory(worker: &Worker) -> Vec<DeviceMemory> {
    let Worker { predicted, measured, loaded, .. } = worker;
    let devices: BTreeSet<&String> = predicted.keys().chain(measured.keys()).collect();
    let of = |device: &String| {
        let predicted_bytes = signed(predicted.get(device).copied().unwrap_or(0));
        DeviceMemory {
            device: clip(device, 64),
            predicted_bytes,
            measured_bytes: measured.get(device).copied().map(signed),
            error_bytes: loaded.get(device).map(|loaded| signed(*loaded) - predicted_bytes),
        }
    };
    devices.into_iter().map(of).take(32).collect()
}

fn port(model: &Model) -> Option<i32> {
    match model.listener {
        Listener::Open(port) => Some(i32::from(port)),
        Listener::Closed | Listener::Opening | Listener::Closing => None,
    }
}

fn info(stored: &StoredModel) -> ModelInfo {
    let header = &stored.header;
    ModelInfo {
        architecture: Some(clip(&header.architecture, 64)),
        parameter_count: Some(signed(header.parameter_count)),
        quantization: Some(clip(&header.quantization, 32)),
        trained_context_tokens: header.trained_context_tokens.map(signed),
        size_bytes: Some(signed(stored.size_bytes)),
        sha256: stored.sha256.clone(),
    }
}

fn health(identity: &Identity, observed: &Observed) -> Condition {
    let (status, reason, message) = match (&observed.probe_error, &observed.devices) {
        (Some(error), _) => ("False", "ProbeFailed", clip(error, MAX_MESSAGE_CHARS)),
        (None, None) => ("Unknown", "Probing", "the devices are being looked at".to_owned()),
        (None, Some(_)) => ("True", reasons::AS_WANTED, String::new()),
    };
    Condition {
        type_: types::AGENT_HEALTHY.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        // The writer puts in when it changed; here is no clock.
        last_transition_time: Time(identity.started_at),
        observed_generation: None,
    }
}

/// Whether a worker that takes too much ends alone.
fn isolation(identity: &Identity, observed: &Observed) -> Condition {
    let (status, reason, message) = if observed.ends_together {
        let message = "memory.oom.group of the agent's control group is set: should the agent not end the worst worker in \
                       time, the kernel ends the agent and all workers";
        ("False", reasons::OOM_GROUP, message.to_owned())
    } else {
        ("True", reasons::AS_WANTED, String::new())
    };
    Condition {
        type_: types::WORKERS_ISOLATED.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        ..health(identity, observed)
    }
}

/// What others hold of a device, in hundredths of it: it must not make the status chatter.
fn foreign(observed: &Observed, device: &ProbedDevice) -> u64 {
    in_steps(observed.ledger.foreign(&device.id), device.memory_total_bytes)
}

fn addresses(all: &[IpAddr]) -> Vec<NodeAddress> {
    let first = |family: &str, is: fn(&IpAddr) -> bool| {
        let address = all.iter().find(|address| is(address))?;
        Some(NodeAddress { family: family.to_owned(), address: address.to_string() })
    };
    [first("IPv4", IpAddr::is_ipv4), first("IPv6", IpAddr::is_ipv6)].into_iter().flatten().collect()
}

fn device_summary(devices: &[Device]) -> String {
    let mut kinds: Vec<(&str, usize)> = Vec::new();
    for device in devices.iter().filter(|device| device.kind != CPU) {
        match kinds.iter_mut().find(|(name, _)| *name == device.name) {
            Some((_, count)) => *count += 1,
            None => kinds.push((&device.name, 1)),
        }
    }
    let text: Vec<String> = kinds.into_iter().map(|(name, count)| format!("{count}x {name}")).collect();
    if text.is_empty() { CPU.to_owned() } else { clip(&text.join(", "), 256) }
}

fn memory_summary(devices: &[Device]) -> String {
    let of = |device: &Device| {
        let unsigned = |count: i64| bytes(u64::try_from(count).unwrap_or(0));
        format!("{} {}/{}", device.id, unsigned(device.memory_reserved_bytes), unsigned(device.memory_total_bytes))
    };
    clip(&devices.iter().map(of).collect::<Vec<_>>().join(", "), 256)
}

/// Hundredths of the whole, rounded up: a download must not make the status chatter.
fn in_steps(used: u64, capacity: u64) -> u64 {
    let step = (capacity / 100).max(1);
    used.div_ceil(step).saturating_mul(step).min(capacity.max(used))
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

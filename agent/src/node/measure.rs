//! The node's numbers, from state alone, as metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_crds::conditions::states;

use super::observe::{Happened, Observed};
use super::plan::{Plan, Step};
use crate::metrics::{AgentMetrics, ModelState};
use crate::runner::protocol::RunnerEvent;

/// Writes metrics, and removes those of models that are gone.
pub(super) struct Measurer {
    metrics: Arc<AgentMetrics>,
    known: BTreeMap<String, Known>,
}

/// What was written about a model.
#[derive(Default)]
struct Known {
    namespace: String,
    name: String,
    restarts: u32,
    devices: BTreeSet<String>,
}

impl Measurer {
    pub(super) fn new(metrics: Arc<AgentMetrics>) -> Self {
        Self { metrics, known: BTreeMap::new() }
    }

    /// Something that counts, before it is noted.
    pub(super) fn count(&self, uid: &str, what: &Happened, observed: &Observed) {
        let Some(model) = observed.models.get(uid) else { return };
        let (namespace, name) = (&model.assignment.namespace, &model.assignment.name);
        match what {
            Happened::WorkerSaid(_, RunnerEvent::Ready(report)) => {
                self.metrics.model_loaded(namespace, name, Duration::from_millis(report.load_milliseconds));
            }
            Happened::Woken => self.metrics.model_woken(namespace, name),
            _ => {}
        }
    }

    /// A step that counts, before it is begun.
    pub(super) fn step(&self, step: &Step, observed: &Observed, now: Instant) {
        let Some(model) = observed.models.get(step.uid()) else { return };
        let (namespace, name) = (&model.assignment.namespace, &model.assignment.name);
        match step {
            Step::Unload { for_room: true, .. } => self.metrics.model_evicted(namespace, name),
            Step::Load { .. } => {
                if let Some(since) = model.waiting_since {
                    self.metrics.waited_for_room(namespace, name, now.saturating_duration_since(since));
                }
            }
            _ => {}
        }
    }

    /// What is.
    pub(super) fn measure(&mut self, observed: &Observed, plan: &Plan) {
        for device in observed.devices.iter().flat_map(|devices| &devices.list) {
            let reserved = observed.ledger.held(&device.id);
            let foreign = observed.ledger.foreign(&device.id);
            self.metrics.device_memory(&device.id, device.memory_total_bytes, reserved, foreign);
        }
        for (uid, model) in &observed.models {
            let (namespace, name) = (&model.assignment.namespace, &model.assignment.name);
            let known = self.known.entry(uid.clone()).or_insert_with(|| Known {
                namespace: namespace.clone(),
                name: name.clone(),
                ..Known::default()
            });
            let state = plan.verdicts.get(uid).map_or(ModelState::Pending, |verdict| state_of(verdict.state));
            self.metrics.model_state(namespace, name, state);
            for _ in known.restarts..model.restarts {
                self.metrics.worker_restarted(namespace, name);
            }
            known.restarts = model.restarts;
            let worker = model.workers.values().next_back();
            let devices: BTreeSet<String> = worker
                .iter()
                .flat_map(|worker| worker.predicted.keys().chain(worker.measured.keys()))
                .cloned()
                .collect();
            for device in devices.union(&known.devices) {
                let predicted = worker.and_then(|worker| worker.predicted.get(device)).copied();
                let measured = worker.and_then(|worker| worker.measured.get(device)).copied();
                self.metrics.model_memory(namespace, name, device, predicted, measured);
                let loaded = worker.and_then(|worker| worker.loaded.get(device)).copied();
                let error = loaded.map(|loaded| signed(loaded) - signed(predicted.unwrap_or(0)));
                self.metrics.model_memory_error(namespace, name, device, error);
            }
            known.devices = devices;
        }
        self.known.retain(|uid, known| {
            let stays = observed.models.contains_key(uid);
            if !stays {
                let devices: Vec<&str> = known.devices.iter().map(String::as_str).collect();
                self.metrics.forget_model(&known.namespace, &known.name, &devices);
            }
            stays
        });
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn state_of(state: &str) -> ModelState {
    match state {
        states::FETCHING => ModelState::Fetching,
        states::LOADING => ModelState::Loading,
        states::READY => ModelState::Ready,
        states::UNLOADED => ModelState::Unloaded,
        states::DRAINING => ModelState::Draining,
        states::FAILED => ModelState::Failed,
        _ => ModelState::Pending,
    }
}

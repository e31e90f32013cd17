//! What is: the models of this node, their files, workers and what is known about them.
//!
//! [`Observed`] changes in three ways and no other: what is wanted is taken up ([`Observed::adopt`]), a step was begun
//! ([`Observed::begin`]), something happened ([`Observed::note`]). All are pure, with the clock passed in.

mod changes;
mod desired;
mod files;
mod worker;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_crds::conditions::reasons;
use altiplano_crds::model_deployment::Termination;
use altiplano_crds::model_node::ModelAssignment;

pub use self::desired::{Desired, Entry};
pub use self::files::{FileState, Sources, StoredFiles};
pub use self::worker::{Leaving, Phase, Worker};
use super::plan::Step;
use crate::cgroup::GroupMemory;
use crate::devices::{CPU, Devices, Trial};
use crate::front::KeepAlive;
use crate::ledger::{Ledger, Need};
use crate::runner::adopt::Record;
use crate::runner::grants::Refusal;
use crate::runner::protocol::{EstimateReport, MemoryUse, RunnerEvent};
use crate::runner::supervise::{WorkerEnd, WorkerId};

/// How long a driver may take to give back what a worker held that has ended. What is missing then counts as others'.
const RETURN_TIME: Duration = Duration::from_secs(5);

/// Wait between two looks at devices whose memory is on its way back.
const RETURN_LOOK: Duration = Duration::from_millis(100);

/// Wait between two looks while a model lacks memory that others than this agent hold.
pub const FOREIGN_LOOK: Duration = Duration::from_secs(10);

/// Time of a load that nobody has measured: this, and the file's bytes at this speed.
const LOAD_OVERHEAD: Duration = Duration::from_secs(2);
const LOAD_BYTES_A_SECOND: u64 = 1 << 30;

/// What workers hold of host memory is counted in steps, so that a status is quiet.
const HELD_STEP_BYTES: u64 = 16 << 20;

/// What is on this node.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The devices; `None` until they have been looked at.
    pub devices: Option<Devices>,
    /// Why the devices could not be looked at the last time.
    pub probe_error: Option<String>,
    /// Who holds how much memory.
    pub ledger: Ledger,
    /// Bytes of fetched files and the room for them.
    pub storage: Option<(u64, u64)>,
    /// The models by uid.
    pub models: BTreeMap<String, Model>,
    /// Host memory, when little was left a moment ago.
    pub short: Option<HostMemory>,
    /// The worker that was ended for that and has not gone yet.
    pub ending: Option<WorkerId>,
    /// Whether the kernel ends all workers and the agent at once when memory runs out.
    pub ends_together: bool,
    /// When the devices are to be looked at again.
    pub look_at: Option<Instant>,
    /// When memory of ended workers that is not back is given up.
    returns_by: Option<Instant>,
    /// Number of the worker that is started next.
    pub next_worker: WorkerId,
}

/// Host memory as it was measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// The tightest of the control groups.
    pub group: GroupMemory,
    /// Bytes that each worker holds, mapped weights left out.
    pub held: BTreeMap<WorkerId, u64>,
}

impl HostMemory {
    /// Whether so little is left that somebody must go: less than a twentieth of the limit, or 64 MiB where that is more
    /// (in small groups an eighth), or 1 GiB where it is less.
    #[must_use]
    pub fn is_short(group: GroupMemory) -> bool {
        let at_least = (64 << 20).min(group.limit / 8);
        group.left() < (group.limit / 20).max(at_least).min(1 << 30)
    }

    /// Whether the group's processes hardly get on any more, because the kernel takes from them what they need: for a
    /// quarter of ten seconds none did, and the group was at its limit since it was looked at `before`. Mapped weights that
    /// do not fit are not counted as used, but this they do.
    #[must_use]
    pub fn is_stalled(group: GroupMemory, before: Option<GroupMemory>) -> bool {
        group.stalled_percent >= 25 && before.is_some_and(|before| group.limit_hits > before.limit_hits)
    }
}

/// A model on this node.
#[derive(Clone, Debug)]
pub struct Model {
    /// What was last asked for; of a model on its way out: what it was.
    pub assignment: Arc<ModelAssignment>,
    /// Its own port.
    pub listener: Listener,
    /// What the listener was told last.
    pub published: Option<Arc<ModelAssignment>>,
    /// Where its requests go, as the listener was told last.
    pub route: Option<RouteTo>,
    /// The sources of its files.
    pub source: Sources,
    /// Its files.
    pub file: FileState,
    /// The dry runs of the wanted revision.
    pub estimates: Vec<Estimate>,
    /// Its processes: at most one that stays, and those on their way out.
    pub workers: BTreeMap<WorkerId, Worker>,
    /// What went wrong last and when it is tried again.
    pub failure: Option<Failure>,
    /// Failures in a row before it was ready.
    failures: u32,
    /// Ends of ready workers in a row.
    crashes: u32,
    /// Times that a worker ended on its own.
    pub restarts: u32,
    /// How its last worker ended that ended on its own.
    pub last_termination: Option<Termination>,
    /// Unloaded by policy, because the owner asked for it, or to make room.
    pub asleep: bool,
    /// The owner wants it out of memory once (`unload.requestedAt`), which is still to be done.
    pub unload_asked: bool,
    /// Its requests, as the listener counts them.
    pub activity: Activity,
    /// Since when requests have waited for it, without a pause.
    pub waiting_since: Option<Instant>,
    /// It gets no new requests, so that it becomes idle and makes room.
    pub yields: bool,
    /// How long its last load took.
    pub last_load: Option<Duration>,
    /// What its context lately wanted to grow by and could not, and when.
    pub wants_more: Option<(Need, Instant)>,
}

/// A model's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// Not there.
    Closed,
    /// Being opened.
    Opening,
    /// There.
    Open(u16),
    /// Being closed, and the model forgotten.
    Closing,
}

/// Where a model's requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteTo {
    /// To this worker.
    Worker(WorkerId),
    /// They wait, and wake the model.
    Unloaded,
    /// They wait.
    Loading,
    /// They are refused: the model leaves this node.
    Draining,
    /// They are refused.
    Unavailable {
        /// CamelCase.
        reason: String,
        /// For people.
        message: String,
    },
}

/// A dry run.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// What it was about.
    pub on: Trial,
    /// What it said; `None` while it runs.
    pub report: Option<EstimateReport>,
}

/// What went wrong, and when it is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// CamelCase.
    pub reason: String,
    /// For people.
    pub message: String,
    /// When it is tried again.
    pub retry_at: Instant,
}

/// The requests of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// In a worker.
    pub running: u32,
    /// Waiting for one.
    pub waiting: u32,
    /// When the last one came or ended.
    pub last_request: Option<Instant>,
    /// How long the model is to stay loaded after them, where a client of the present worker said so.
    pub keep_alive: Option<KeepAlive>,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Happened {
    /// The devices were looked at.
    Probed(Result<Devices, String>),
    /// The store was looked at: bytes used and bytes that may be.
    Stored(u64, u64),
    /// A model's port was opened.
    Published(Result<u16, Trouble>),
    /// A model's port is closed.
    Withdrawn,
    /// A file came nearer.
    FetchProgress(Sources, u8),
    /// A file is there, or not.
    Fetched(Sources, Result<Arc<StoredFiles>, Trouble>),
    /// A file's header is there, or cannot be had.
    Peeked(Sources, Result<Arc<StoredFiles>, Trouble>),
    /// A dry run of a revision on some devices ended.
    Estimated(String, Trial, Result<EstimateReport, Trouble>),
    /// A worker said something.
    WorkerSaid(WorkerId, RunnerEvent),
    /// Host memory was measured, and little of it is left.
    Measured(HostMemory),
    /// A worker is gone.
    WorkerEnded(WorkerId, WorkerEnd),
    /// A request waits for a model that is unloaded.
    Woken,
    /// The listener's count of a model's requests.
    Activity(Activity),
}

/// An error as it goes into a status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// CamelCase.
    pub reason: String,
    /// For people, causes included.
    pub message: String,
}

impl Observed {
    /// Takes up what is wanted now. A model that is no longer wanted stays until the plan has taken it away.
    pub fn adopt(&mut self, desired: &Desired) {
        for entry in &desired.entries {
            let Entry::Model(wanted) = entry else { continue };
            match self.models.get_mut(&wanted.uid) {
                None => {
                    self.models.insert(wanted.uid.clone(), Model::new(Arc::clone(wanted)));
                }
                Some(model) => model.adopt(wanted),
            }
        }
    }

    /// Writes down that a step was begun, so that it is not planned again.
    pub fn begin(&mut self, step: &Step, now: Instant) {
        if let Step::Load { uid, worker, need, .. } = step {
            self.next_worker = self.next_worker.max(worker + 1);
            if let Some(model) = self.models.get(uid) {
                // The plan has checked this very ledger.
                if let Err(shortage) = self.ledger.reserve(*worker, &model.label(), need.clone()) {
                    tracing::error!(%shortage, worker, "planned a load without room for it");
                }
            }
        }
        if let Step::End { worker, .. } = step {
            self.short = None;
            self.ending = Some(*worker);
        }
        if let Some(model) = self.models.get_mut(step.uid()) {
            model.begin(step, now);
        }
    }

    /// Writes down what happened to a model, or to the node where `uid` is empty.
    pub fn note(&mut self, uid: &str, what: Happened, now: Instant) {
        match what {
            Happened::Probed(Ok(devices)) => {
                self.ledger.set_capacity(devices.capacity());
                let patient = self.returns_by.is_some_and(|by| now < by);
                devices.used().for_each(|(device, used)| self.ledger.look(device, used, patient));
                let is_settled = self.ledger.is_settled();
                self.returns_by.take_if(|_| is_settled);
                self.look_at = (!is_settled).then(|| now + RETURN_LOOK);
                self.devices = Some(devices);
                self.probe_error = None;
            }
            Happened::Probed(Err(message)) => {
                self.probe_error = Some(message);
                self.look_at = None;
            }
            Happened::Stored(used, capacity) => self.storage = Some((used, capacity)),
            Happened::Measured(memory) => self.short = Some(memory),
            Happened::Withdrawn => {
                if self.models.get(uid).is_some_and(|model| model.listener == Listener::Closing) {
                    self.models.remove(uid);
                }
            }
            Happened::WorkerEnded(worker, end) => {
                let has_driver = |device: &str| self.devices.as_ref().is_some_and(|devices| devices.has_driver(device));
                self.ledger.end(worker, has_driver);
                let lacked_memory = end.failure.as_ref().is_some_and(|f| f.reason == reasons::INSUFFICIENT_MEMORY);
                if !self.ledger.is_settled() {
                    self.returns_by.get_or_insert(now + RETURN_TIME);
                }
                // Others may have taken what was thought to be there.
                if lacked_memory || !self.ledger.is_settled() {
                    self.look_at = Some(now);
                }
                self.ending.take_if(|ending| *ending == worker);
                if let Some(model) = self.models.get_mut(uid) {
                    model.worker_ended(worker, &end, now);
                }
            }
            Happened::WorkerSaid(worker, event) => {
                if let (RunnerEvent::Ready(report) | RunnerEvent::Changed(report), Some(devices)) =
                    (&event, &self.devices)
                    && !report.memory.is_empty()
                {
                    let measured = devices.worker_need(&report.memory);
                    if let Some(worker) = self.models.get_mut(uid).and_then(|model| model.workers.get_mut(&worker)) {
                        worker.measured = measured.clone();
                        if matches!(event, RunnerEvent::Ready(_)) {
                            worker.loaded = worker.when_loaded(&measured);
                        }
                        worker.mapped_bytes = report.memory.iter().map(|part| part.mapped_bytes).sum();
                    }
                    self.ledger.settle(worker, measured);
                }
                if matches!(event, RunnerEvent::Ready(_)) {
                    self.ledger.taken(worker);
                }
                if let Some(model) = self.models.get_mut(uid) {
                    model.worker_said(worker, event, now);
                }
            }
            what => {
                if let Some(model) = self.models.get_mut(uid) {
                    model.note(what, now);
                }
            }
        }
    }

    /// Takes up a worker that a dead agent has left. What it holds is a fact, whether there is room or not.
    pub fn found(&mut self, record: Record, now: Instant) {
        let Record { worker, config, assignment, predicted, note } = record;
        let assignment = Arc::new(assignment);
        let model = self.models.entry(assignment.uid.clone()).or_insert_with(|| Model::new(assignment));
        self.ledger.claim(worker, &model.label(), predicted.clone());
        self.next_worker = self.next_worker.max(worker + 1);
        let worker_state = Worker {
            revision: config.revision,
            devices: config.devices,
            note,
            predicted,
            report: None,
            measured: Need::new(),
            loaded: Need::new(),
            mapped_bytes: 0,
            started: now,
            phase: Phase::Loading { percent: 0 },
            requests: 0,
            adopted: true,
            shrink_asked: None,
            leaving: None,
        };
        model.workers.insert(worker, worker_state);
    }

    /// Whether others than this agent's workers hold memory of a device.
    #[must_use]
    pub fn others_hold_memory(&self) -> bool {
        let devices = self.devices.iter().flat_map(|devices| &devices.list);
        devices.into_iter().any(|device| self.ledger.foreign(&device.id) > 0)
    }

    /// Workers hold so many bytes of host memory now, mapped weights left out. Where that is more than was measured when
    /// they had been loaded (states of prefixes, pictures), it counts. What else is in use in their control group is not
    /// there for models.
    pub fn hold(&mut self, held: &BTreeMap<WorkerId, u64>, group: Option<GroupMemory>) {
        let mut ours: u64 = 0;
        for (id, worker) in self.models.values().flat_map(|model| &model.workers) {
            let held = held.get(id).copied().unwrap_or(0);
            if let Some(measured) = worker.measured.get(CPU) {
                let more = held.saturating_sub(measured.saturating_sub(worker.mapped_bytes));
                self.ledger.hold(*id, CPU, measured + more / HELD_STEP_BYTES * HELD_STEP_BYTES);
            }
            // Of one that is loading nobody knows how much of what it is promised it has taken.
            ours = ours.saturating_add(self.ledger.held_by(*id, CPU).saturating_sub(worker.mapped_bytes).max(held));
        }
        let Some(group) = group else { return };
        // Beyond what models may take at all others may be as large as they like.
        let spare = group.limit.saturating_sub(self.ledger.capacity(CPU));
        let foreign = group.used.saturating_sub(ours).saturating_sub(spare);
        self.ledger.set_foreign(CPU, foreign / HELD_STEP_BYTES * HELD_STEP_BYTES);
    }

    /// What is here is wanted, until somebody says otherwise.
    #[must_use]
    pub fn as_wanted(&self) -> Desired {
        let entries = self.models.values().map(|model| Entry::Model(Arc::clone(&model.assignment))).collect();
        Desired { entries, ..Desired::default() }
    }

    /// A worker asks for more memory, or gives back (`id` 0) what it was granted. An error says why there is none; then
    /// the plan sees to it that idle models make room before it asks again.
    pub fn grow(
        &mut self,
        uid: &str,
        worker: WorkerId,
        id: u64,
        more: &[MemoryUse],
        now: Instant,
    ) -> Result<(), Refusal> {
        let Some(devices) = &self.devices else { return Err(Refusal::passing("the devices are not known yet")) };
        if id == 0 {
            if self.ledger.shrink(worker) {
                // Others may have taken what was thought to be there.
                self.look_at.get_or_insert(now);
            }
            return Ok(());
        }
        let need = devices.need(more);
        let granted = self.ledger.grow(worker, &need);
        if let Some(model) = self.models.get_mut(uid) {
            model.wants_more = granted.is_err().then(|| (need.clone(), now));
        }
        granted.map_err(|shortage| Refusal {
            passing: self.ledger.could_grow(worker, &need),
            reason: shortage.to_string(),
        })
    }

    /// The model that a worker belongs to.
    #[must_use]
    pub fn owner_of(&self, worker: WorkerId) -> Option<&str> {
        self.models.iter().find(|(_, model)| model.workers.contains_key(&worker)).map(|(uid, _)| uid.as_str())
    }
}

impl Model {
    fn new(assignment: Arc<ModelAssignment>) -> Self {
        Self {
            source: Sources::of(&assignment.model),
            assignment,
            listener: Listener::Closed,
            published: None,
            route: None,
            file: FileState::Unknown,
            estimates: Vec::new(),
            workers: BTreeMap::new(),
            failure: None,
            failures: 0,
            crashes: 0,
            restarts: 0,
            last_termination: None,
            asleep: false,
            unload_asked: false,
            activity: Activity::default(),
            waiting_since: None,
            yields: false,
            last_load: None,
            wants_more: None,
        }
    }

    /// How long a load takes: as the last one did, else a guess from the file's size.
    #[must_use]
    pub fn load_time(&self) -> Duration {
        let guess = || {
            let bytes = self.file.known().map_or(0, |stored| stored.size_bytes);
            LOAD_OVERHEAD + Duration::from_secs(bytes / LOAD_BYTES_A_SECOND)
        };
        self.last_load.unwrap_or_else(guess)
    }

    /// Whether a worker of any revision takes its requests.
    #[must_use]
    pub fn is_served(&self) -> bool {
        !self.yields && self.workers.values().any(|w| w.leaving.is_none() && matches!(w.phase, Phase::Ready { .. }))
    }

    /// Whether its listener answers for it, or cannot.
    #[must_use]
    pub fn is_published(&self) -> bool {
        matches!(self.listener, Listener::Open(_)) || self.failure.is_some()
    }

    /// "namespace/name".
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}/{}", self.assignment.namespace, self.assignment.name)
    }

    /// The worker of a revision that is to stay.
    #[must_use]
    pub fn staying(&self, revision: &str) -> Option<(WorkerId, &Worker)> {
        let mut stay = self.workers.iter().filter(|(_, worker)| worker.leaving.is_none());
        stay.find(|(_, worker)| worker.revision == revision).map(|(id, worker)| (*id, worker))
    }

    /// The workers of other revisions that nobody has sent away yet.
    pub fn former(&self, revision: &str) -> impl Iterator<Item = (WorkerId, &Worker)> {
        let former = self.workers.iter().filter(move |(_, w)| w.leaving.is_none() && w.revision != revision);
        former.map(|(id, worker)| (*id, worker))
    }

    /// The dry run about this.
    #[must_use]
    pub fn estimate(&self, on: &Trial) -> Option<&Estimate> {
        self.estimates.iter().find(|estimate| estimate.on == *on)
    }

    /// Whether it has not been ready since it failed.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failures > 0
    }

    fn adopt(&mut self, wanted: &Arc<ModelAssignment>) {
        if self.assignment.revision != wanted.revision {
            self.estimates.clear();
            self.failure = None;
            (self.failures, self.crashes) = (0, 0);
        }
        let source = Sources::of(&wanted.model);
        if self.source != source {
            self.source = source;
            self.file = FileState::Unknown;
        }
        if self.assignment.unload.requested_at != wanted.unload.requested_at {
            // One that is not loaded has what its owner wants.
            self.unload_asked = wanted.unload.requested_at.is_some() && !self.workers.is_empty();
        }
        if self.assignment != *wanted {
            self.assignment = Arc::clone(wanted);
        }
    }
}

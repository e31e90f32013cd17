//! What is: the models of this node, their files, workers and what is known about them.
//!
//! [`Observed`] changes in three ways and no other: what is wanted is taken up ([`Observed::adopt`]), a step was begun
//! ([`Observed::begin`]), something happened ([`Observed::note`]). All are pure, with the clock passed in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_crds::conditions::reasons;
use altiplano_crds::model_deployment::{AdapterSpec, ModelSource, ModelSpec};
use altiplano_crds::model_node::{ModelAssignment, RawAssignment, UnsupportedAssignment};

use super::plan::Step;
use crate::devices::Devices;
use crate::front::KeepAlive;
use crate::ledger::{Ledger, Need};
use crate::runner::adopt::Record;
use crate::runner::protocol::{AdapterFile, EstimateReport, MemoryUse, RunnerEvent, RunnerReport};
use crate::runner::supervise::{WorkerEnd, WorkerId};
use crate::store::StoredModel;

/// First wait after a failure; it doubles with each in a row.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);

/// The longest wait.
const LONGEST_BACKOFF: Duration = Duration::from_mins(5);

/// Time of a load that nobody has measured: this, and the file's bytes at this speed.
const LOAD_OVERHEAD: Duration = Duration::from_secs(2);
const LOAD_BYTES_A_SECOND: u64 = 1 << 30;

/// A worker that served this long before it ended counts as a success: the next restart is at once again.
const STABLE: Duration = Duration::from_mins(1);

/// What should be on this node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    /// metadata.generation of the ModelNode that says so.
    pub generation: Option<i64>,
    /// The models, in its order.
    pub entries: Vec<Entry>,
}

/// One model that should be on this node.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// As this build understands it.
    Model(Arc<ModelAssignment>),
    /// One that this build cannot read. What it named goes on as it was.
    Unsupported(UnsupportedAssignment),
}

impl Desired {
    /// Reads the entries one by one. Of two with the same uid the first counts.
    #[must_use]
    pub fn new(generation: Option<i64>, raw: &[RawAssignment]) -> Self {
        let mut seen = BTreeSet::new();
        let parse = |entry: &RawAssignment| match entry.parse() {
            Ok(assignment) => Entry::Model(Arc::new(assignment)),
            Err(unsupported) => Entry::Unsupported(unsupported),
        };
        let entries = raw.iter().map(parse).filter(|entry| seen.insert(entry.uid().to_owned())).collect();
        Self { generation, entries }
    }
}

impl Entry {
    /// Uid of the ModelDeployment.
    #[must_use]
    pub fn uid(&self) -> &str {
        match self {
            Self::Model(assignment) => &assignment.uid,
            Self::Unsupported(unsupported) => &unsupported.uid,
        }
    }
}

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
    /// Number of the worker that is started next.
    pub next_worker: WorkerId,
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
    /// Unloaded by policy, or to make room.
    pub asleep: bool,
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

/// Where a model's files come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// The model's own file.
    pub model: ModelSource,
    /// Its LoRA adapters.
    pub adapters: Vec<AdapterSpec>,
}

impl Sources {
    fn of(model: &ModelSpec) -> Self {
        Self { model: model.source.clone(), adapters: model.adapters.clone() }
    }
}

/// A model's files, each of them there and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredFiles {
    /// Its own.
    pub model: StoredModel,
    /// Its adapters, in the order of the spec.
    pub adapters: Vec<AdapterFile>,
}

impl std::ops::Deref for StoredFiles {
    type Target = StoredModel;

    /// What is asked of the files is nearly always asked of the model's own.
    fn deref(&self) -> &StoredModel {
        &self.model
    }
}

/// A model's files.
#[derive(Clone, Debug, PartialEq)]
pub enum FileState {
    /// Nobody has looked.
    Unknown,
    /// On its way.
    Fetching {
        /// As far as is known.
        percent: Option<u8>,
    },
    /// There and checked.
    Present(Arc<StoredFiles>),
}

/// A dry run.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// The devices that it was made on.
    pub on: Vec<String>,
    /// What it said; `None` while it runs.
    pub report: Option<EstimateReport>,
}

/// A process that holds a model.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Revision of the model in it.
    pub revision: String,
    /// The devices that it was given; empty is the CPU alone.
    pub devices: Vec<String>,
    /// What people should know about where it runs.
    pub note: Option<String>,
    /// Bytes that the dry run predicted.
    pub predicted: Need,
    /// What it reported.
    pub report: Option<RunnerReport>,
    /// Bytes that it measured.
    pub measured: Need,
    /// When it was started.
    pub started: Instant,
    /// How far it is.
    pub phase: Phase,
    /// Requests in it, running and waiting.
    pub requests: u32,
    /// It is on its way out.
    pub leaving: Option<Leaving>,
}

/// How far a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Loading its model.
    Loading {
        /// 0 to 100.
        percent: u8,
    },
    /// Serving.
    Ready {
        /// Since when.
        since: Instant,
    },
}

/// A worker's way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// When it began.
    pub since: Instant,
    /// When its requests must have ended.
    pub deadline: Instant,
    /// It was asked to end.
    pub stopped: bool,
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
    /// A dry run of a revision on some devices ended.
    Estimated(String, Vec<String>, Result<EstimateReport, Trouble>),
    /// A worker said something.
    WorkerSaid(WorkerId, RunnerEvent),
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
        if let Some(model) = self.models.get_mut(step.uid()) {
            model.begin(step, now);
        }
    }

    /// Writes down what happened to a model, or to the node where `uid` is empty.
    pub fn note(&mut self, uid: &str, what: Happened, now: Instant) {
        match what {
            Happened::Probed(Ok(devices)) => {
                self.ledger.set_capacity(devices.capacity());
                self.devices = Some(devices);
                self.probe_error = None;
            }
            Happened::Probed(Err(message)) => self.probe_error = Some(message),
            Happened::Stored(used, capacity) => self.storage = Some((used, capacity)),
            Happened::Withdrawn => {
                if self.models.get(uid).is_some_and(|model| model.listener == Listener::Closing) {
                    self.models.remove(uid);
                }
            }
            Happened::WorkerEnded(worker, end) => {
                self.ledger.release(worker);
                if let Some(model) = self.models.get_mut(uid) {
                    model.worker_ended(worker, &end, now);
                }
            }
            Happened::WorkerSaid(worker, event) => {
                if let (RunnerEvent::Ready(report) | RunnerEvent::Changed(report), Some(devices)) =
                    (&event, &self.devices)
                    && !report.memory.is_empty()
                {
                    let measured = devices.need(&report.memory);
                    if let Some(worker) = self.models.get_mut(uid).and_then(|model| model.workers.get_mut(&worker)) {
                        worker.measured = measured.clone();
                    }
                    self.ledger.settle(worker, measured);
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
            started: now,
            phase: Phase::Loading { percent: 0 },
            requests: 0,
            leaving: None,
        };
        model.workers.insert(worker, worker_state);
    }

    /// What is here is wanted, until somebody says otherwise.
    #[must_use]
    pub fn as_wanted(&self) -> Desired {
        let entries = self.models.values().map(|model| Entry::Model(Arc::clone(&model.assignment))).collect();
        Desired { generation: None, entries }
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
    ) -> Result<(), String> {
        let Some(devices) = &self.devices else { return Err("the devices are not known yet".to_owned()) };
        if id == 0 {
            self.ledger.shrink(worker);
            return Ok(());
        }
        let need = devices.need(more);
        let granted = self.ledger.grow(worker, &need);
        if let Some(model) = self.models.get_mut(uid) {
            model.wants_more = granted.is_err().then_some((need, now));
        }
        granted.map_err(|shortage| shortage.to_string())
    }

    /// The model that a worker belongs to.
    #[must_use]
    pub fn owner_of(&self, worker: WorkerId) -> Option<&str> {
        self.models.iter().find(|(_, model)| model.workers.contains_key(&worker)).map(|(uid, _)| uid.as_str())
    }
}

impl Worker {
    /// How long its load took.
    #[must_use]
    pub fn load_time(&self) -> Option<Duration> {
        self.report.as_ref().map(|report| Duration::from_millis(report.load_milliseconds))
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
            asleep: false,
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
        let guess = || match &self.file {
            FileState::Present(stored) => LOAD_OVERHEAD + Duration::from_secs(stored.size_bytes / LOAD_BYTES_A_SECOND),
            FileState::Unknown | FileState::Fetching { .. } => LOAD_OVERHEAD,
        };
        self.last_load.unwrap_or_else(guess)
    }

    /// Whether a worker of any revision takes its requests.
    #[must_use]
    pub fn is_served(&self) -> bool {
        !self.yields && self.workers.values().any(|w| w.leaving.is_none() && matches!(w.phase, Phase::Ready { .. }))
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

    /// The dry run on these devices.
    #[must_use]
    pub fn estimate(&self, on: &[String]) -> Option<&Estimate> {
        self.estimates.iter().find(|estimate| estimate.on == on)
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
        if self.assignment != *wanted {
            self.assignment = Arc::clone(wanted);
        }
    }

    fn begin(&mut self, step: &Step, now: Instant) {
        match step {
            Step::Publish { .. } => {
                self.published = Some(Arc::clone(&self.assignment));
                if self.listener == Listener::Closed {
                    self.listener = Listener::Opening;
                }
            }
            Step::Fetch { .. } => self.file = FileState::Fetching { percent: None },
            Step::Estimate { on, .. } => self.estimates.push(Estimate { on: on.clone(), report: None }),
            Step::Load { uid: _, revision, worker, target, need, note } => {
                let worker_state = Worker {
                    revision: revision.clone(),
                    devices: target.devices.clone(),
                    note: note.clone(),
                    predicted: need.clone(),
                    report: None,
                    measured: Need::new(),
                    started: now,
                    phase: Phase::Loading { percent: 0 },
                    requests: 0,
                    leaving: None,
                };
                self.workers.insert(*worker, worker_state);
            }
            Step::Route { to, .. } => self.route = Some(to.clone()),
            Step::Unload { .. } => {
                self.asleep = true;
                self.yields = false;
            }
            Step::Yield { .. } => self.yields = true,
            Step::Resume { .. } => self.yields = false,
            Step::Wake { .. } => self.asleep = false,
            Step::Drain { worker, deadline, .. } => {
                if let Some(worker) = self.workers.get_mut(worker) {
                    worker.leaving.get_or_insert(Leaving { since: now, deadline: *deadline, stopped: false });
                }
            }
            Step::Stop { worker, .. } => {
                if let Some(leaving) = self.workers.get_mut(worker).and_then(|worker| worker.leaving.as_mut()) {
                    leaving.stopped = true;
                }
            }
            Step::Remove { .. } => self.listener = Listener::Closing,
        }
    }

    fn note(&mut self, what: Happened, now: Instant) {
        match what {
            Happened::Published(Ok(port)) => {
                if self.listener != Listener::Closing {
                    self.listener = Listener::Open(port);
                }
            }
            Happened::Published(Err(trouble)) => {
                if self.listener == Listener::Opening {
                    self.listener = Listener::Closed;
                }
                self.published = None;
                self.fail(trouble, now);
            }
            Happened::FetchProgress(source, percent) => {
                if let FileState::Fetching { percent: known } = &mut self.file
                    && source == self.source
                {
                    *known = Some(percent);
                }
            }
            Happened::Fetched(source, result) if source == self.source => match result {
                Ok(stored) => self.file = FileState::Present(stored),
                Err(trouble) => {
                    self.file = FileState::Unknown;
                    self.fail(trouble, now);
                }
            },
            Happened::Estimated(revision, on, result) if revision == self.assignment.revision => match result {
                Ok(report) => {
                    self.estimates.retain(|estimate| estimate.on != on);
                    self.estimates.push(Estimate { on, report: Some(report) });
                }
                Err(trouble) => self.fail(trouble, now),
            },
            Happened::Woken => self.asleep = false,
            Happened::Activity(activity) => {
                self.waiting_since = (activity.waiting > 0).then(|| self.waiting_since.unwrap_or(now));
                self.activity = activity;
            }
            // Of a source or revision that is not wanted any more, or not about one model.
            Happened::Fetched(..)
            | Happened::Estimated(..)
            | Happened::Probed(_)
            | Happened::Stored(..)
            | Happened::Withdrawn
            | Happened::WorkerSaid(..)
            | Happened::WorkerEnded(..) => {}
        }
    }

    fn worker_said(&mut self, id: WorkerId, event: RunnerEvent, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        match event {
            RunnerEvent::Loading { percent } => {
                if matches!(worker.phase, Phase::Loading { .. }) {
                    worker.phase = Phase::Loading { percent: percent.min(100) };
                }
            }
            RunnerEvent::Ready(report) => {
                if report.load_milliseconds > 0 {
                    self.last_load = Some(Duration::from_millis(report.load_milliseconds));
                }
                worker.report = Some(report);
                worker.phase = Phase::Ready { since: now };
                if worker.revision == self.assignment.revision {
                    self.failure = None;
                    self.failures = 0;
                }
            }
            RunnerEvent::Changed(report) => worker.report = Some(report),
            RunnerEvent::Activity { running, waiting } => worker.requests = running.saturating_add(waiting),
            // The end that follows has it; the supervisor hears the heart; and the ledger answers.
            RunnerEvent::Failed(_) | RunnerEvent::Heartbeat { .. } | RunnerEvent::Growth { .. } => {}
        }
    }

    fn worker_ended(&mut self, id: WorkerId, end: &WorkerEnd, now: Instant) {
        let Some(worker) = self.workers.remove(&id) else { return };
        // One that was sent away ends as it was told to.
        if worker.leaving.is_some() {
            return;
        }
        if worker.revision != self.assignment.revision {
            self.restarts += u32::from(matches!(worker.phase, Phase::Ready { .. }));
            return;
        }
        match worker.phase {
            Phase::Loading { .. } => {
                let trouble = match &end.failure {
                    Some(failure) => Trouble { reason: failure.reason.clone(), message: failure.message.clone() },
                    None => Trouble {
                        reason: reasons::LOAD_FAILED.to_owned(),
                        message: format!("the worker {} while it loaded the model{}", end.how, log_of(end)),
                    },
                };
                self.fail(trouble, now);
            }
            Phase::Ready { since } => {
                self.restarts += 1;
                self.crashes = if now.duration_since(since) >= STABLE { 1 } else { self.crashes + 1 };
                let why = end.failure.as_ref().map(|failure| format!(": {}", failure.message));
                let message = format!("the worker {}{}", end.how, why.unwrap_or_else(|| log_of(end)));
                let retry_at = now + self.crashes.checked_sub(2).map_or(Duration::ZERO, backoff);
                let reason = end.failure.as_ref().map_or(reasons::WORKER_EXITED, |failure| &failure.reason).to_owned();
                self.failure = Some(Failure { reason, message, retry_at });
            }
        }
    }

    /// Also has file and dry runs looked at again before the next try: the cause may lie in the file.
    fn fail(&mut self, trouble: Trouble, now: Instant) {
        let Trouble { reason, message } = trouble;
        let retry_at = now + backoff(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.failure = Some(Failure { reason, message, retry_at });
        if matches!(self.file, FileState::Present(_)) {
            self.file = FileState::Unknown;
        }
        self.estimates.clear();
    }
}

fn backoff(failures_before: u32) -> Duration {
    FIRST_BACKOFF.saturating_mul(1 << failures_before.min(16)).min(LONGEST_BACKOFF)
}

fn log_of(end: &WorkerEnd) -> String {
    if end.last_lines.is_empty() { String::new() } else { format!(": {}", end.last_lines) }
}

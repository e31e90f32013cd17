//! The node: what should be here against what is.
//!
//! One loop, [`Node::run`]: take in what happened (`observe`), decide (`plan`, pure), do it (`apply`), say it
//! (`status`). It knows no Kubernetes: what is wanted comes through a channel, from a ModelNode (`cluster`) or from
//! files (`crate::serve`), and the status goes out through another.

pub mod apply;
mod card;
pub mod cluster;
pub mod estimates;
mod measure;
pub mod observe;
pub mod plan;
pub mod recall;
pub mod role;
pub mod sockets;
pub mod status;

use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_crds::ModelNodeStatus;
use altiplano_crds::conditions::reasons;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use self::apply::{Executor, Means, Report};
use self::measure::Measurer;
use self::observe::{Activity, Desired, FOREIGN_LOOK, Happened, HostMemory, Model, Observed};
use self::plan::{Limits, Plan, Step, plan};
use self::status::{Identity, status};
use crate::cgroup::{self, GroupMemory};
use crate::devices::Devices;
use crate::front::Expected;
use crate::ledger::bytes;
use crate::runner::grants::Refusal;
use crate::runner::protocol::{ProbedDevice, RunnerCommand, RunnerEvent};
use crate::runner::supervise::{WorkerDid, WorkerMessage};

/// Messages on their way to the loop. A full channel makes a worker's reports wait, nothing else.
const MESSAGES: usize = 256;

/// Plans in one turn of the loop. Each begun step changes what is, so a turn ends when there is nothing left to do.
const PLANS_PER_TURN: usize = 16;

/// How often the memory that is left is looked at.
const MEMORY_WATCH: Duration = Duration::from_secs(1);

/// First wait after the devices could not be looked at, and the longest.
const PROBE_BACKOFF: (Duration, Duration) = (Duration::from_secs(2), Duration::from_mins(10));

/// Why the node's loop ended early.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A task of ours panicked.
    #[error("a task of the node's loop failed")]
    Task(#[source] tokio::task::JoinError),
    /// The front has gone.
    #[error("the listeners have ended")]
    Front,
    /// SIGHUP cannot be listened for.
    #[error("cannot listen for signals")]
    Signal(#[source] std::io::Error),
}

/// Reconciles the models of one machine.
pub struct Node {
    identity: Identity,
    limits: Limits,
    means: Means,
    executor: Executor,
    observed: Observed,
    measurer: Measurer,
    progress: mpsc::Receiver<Report>,
    messages: mpsc::Receiver<WorkerMessage>,
    status: watch::Sender<ModelNodeStatus>,
}

impl Node {
    /// A node with nothing on it. Its status goes to `status`.
    #[must_use]
    pub fn new(identity: Identity, limits: Limits, means: Means, status: watch::Sender<ModelNodeStatus>) -> Self {
        let (report, progress) = mpsc::channel(MESSAGES);
        let (message, messages) = mpsc::channel(MESSAGES);
        let executor = Executor::new(means.clone(), report, message);
        let measurer = Measurer::new(Arc::clone(&means.metrics));
        Self { identity, limits, means, executor, observed: Observed::default(), measurer, progress, messages, status }
    }

    /// Runs until `shutdown`, then drains. `None` in `wanted` means that nobody has said anything yet: what is served
    /// stays.
    pub async fn run(
        mut self,
        mut wanted: watch::Receiver<Option<Desired>>,
        shutdown: CancellationToken,
    ) -> Result<(), NodeError> {
        let mut hangup = signal(SignalKind::hangup()).map_err(NodeError::Signal)?;
        let mut wakes = self.means.front.wakes().ok_or(NodeError::Front)?;
        let mut activity = self.means.front.activity_changes();
        let mut desired = Desired::default();
        let (mut leaving, mut heard, mut published) = (false, false, false);
        let mut probe = Probe::default();
        for record in self.executor.adopt() {
            self.observed.found(record, Instant::now());
        }
        desired.entries = self.observed.as_wanted().entries;
        self.probe(&mut probe);
        self.observed.ends_together = cgroup::ends_together();
        self.executor.measure_storage();
        self.executor.keep_spare(true);
        let mut seen: Option<GroupMemory> = None;
        let mut memory_watch = tokio::time::interval(MEMORY_WATCH);
        memory_watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if !leaving && let Some(wanted) = wanted.borrow_and_update().clone() {
                desired = wanted;
                heard = true;
            }
            let drains = leaving || desired.drains(&self.identity.pod_uid);
            if drains {
                desired.entries.clear();
            }
            let plan = self.turn(&desired);
            published |= heard && self.observed.models.values().all(Model::is_published);
            self.tell_readiness(drains, heard, published);
            if leaving && self.observed.models.is_empty() {
                break;
            }
            self.look_while_short(&plan, &mut probe);
            let next = [plan.wake_at, probe.due(self.observed.look_at)].into_iter().flatten().min();
            tokio::select! {
                changed = wanted.changed(), if !leaving => {
                    // Who decided what should be here is gone: as on shutdown.
                    leaving = changed.is_err();
                }
                report = self.executor.next() => {
                    if let Some(report) = report.map_err(NodeError::Task)? {
                        self.take(report, &mut probe);
                    }
                }
                Some(report) = self.progress.recv() => self.take(report, &mut probe),
                Some(message) = self.messages.recv() => self.worker(message),
                woken = wakes.recv() => match woken {
                    Some(uid) => self.note(&uid, Happened::Woken),
                    None => return Err(NodeError::Front),
                },
                changed = activity.changed() => changed.map_err(|_| NodeError::Front)?,
                () = sleep_until(next) => {}
                _ = memory_watch.tick() => self.watch_memory(&mut seen),
                () = hung_up(&mut hangup) => {
                    probe.afresh = true;
                    self.probe(&mut probe);
                }
                () = shutdown.cancelled(), if !leaving => leaving = true,
            }
            // What else has come meanwhile goes into the same plan.
            while let Ok(message) = self.messages.try_recv() {
                self.worker(message);
            }
            if probe.due(self.observed.look_at).is_some_and(|at| Instant::now() >= at) {
                self.probe(&mut probe);
            }
        }
        let Self { executor, progress, messages, .. } = self;
        drop((progress, messages));
        executor.shutdown().await;
        Ok(())
    }

    /// Observe, plan, apply, until there is nothing to do; then say what is.
    fn turn(&mut self, desired: &Desired) -> Plan {
        self.observed.adopt(desired);
        self.count_requests();
        let mut decided = Plan::default();
        for _ in 0..PLANS_PER_TURN {
            let now = Instant::now();
            decided = plan(desired, &self.observed, self.limits, now);
            if decided.steps.is_empty() {
                break;
            }
            let steps = std::mem::take(&mut decided.steps);
            for step in &steps {
                self.measurer.step(step, &self.observed, now);
                self.executor.run(step.clone(), &self.observed);
                self.observed.begin(step, now);
            }
            if steps.iter().any(|step| matches!(step, Step::Route { .. })) {
                // Who lost its route has no new requests from here on, and may have none at all.
                self.count_requests();
            }
        }
        // It was true a moment ago, not for later plans.
        self.observed.short = None;
        self.measurer.measure(&self.observed, &decided);
        for (uid, model) in &self.observed.models {
            let ready_at = decided.verdicts.get(uid).and_then(|verdict| verdict.ready_at);
            self.means.front.expect(uid, Expected { load: model.load_time(), ready_at });
            self.means.front.describe(uid, card::card(model));
        }
        let now = status(&self.identity, desired, &self.observed, &decided);
        self.status.send_if_modified(|last| {
            let changed = *last != now;
            if changed {
                *last = now;
            }
            changed
        });
        decided
    }

    fn count_requests(&mut self) {
        let now = Instant::now();
        let uids: Vec<String> = self.observed.models.keys().cloned().collect();
        for uid in uids {
            let Some(seen) = self.means.front.activity(&uid) else { continue };
            let crate::front::Activity { running, waiting, last_request, keep_alive } = seen;
            let activity = Activity { running, waiting, last_request, keep_alive };
            self.observed.note(&uid, Happened::Activity(activity), now);
        }
    }

    fn take(&mut self, Report { uid, what }: Report, probe: &mut Probe) {
        match &what {
            Happened::Probed(Ok(devices)) => {
                let ids: Vec<_> = devices.list.iter().map(|device| &device.id).collect();
                if self.observed.devices.as_ref().is_none_or(|known| !known.list.iter().map(|d| &d.id).eq(ids)) {
                    for ProbedDevice { id, description, driver, memory_total_bytes, .. } in &devices.list {
                        let memory = bytes(*memory_total_bytes);
                        tracing::info!(id, name = description, driver, memory, "looked at the devices");
                    }
                }
                *probe = Probe { last: Some(Instant::now()), afresh: probe.afresh, ..Probe::default() };
            }
            Happened::Probed(Err(error)) => {
                probe.failed();
                tracing::warn!(error, "cannot look at the devices");
            }
            Happened::Fetched(_, Ok(stored)) => {
                tracing::info!(uid, path = %stored.path.display(), bytes = stored.size_bytes, "the file is there");
                self.executor.measure_storage();
            }
            Happened::Fetched(_, Err(trouble)) | Happened::Estimated(_, _, Err(trouble)) => {
                tracing::warn!(uid, reason = trouble.reason, message = trouble.message, "the model cannot be had");
            }
            _ => {}
        }
        self.note(&uid, what);
    }

    fn note(&mut self, uid: &str, what: Happened) {
        self.measurer.count(uid, &what, &self.observed);
        self.observed.note(uid, what, Instant::now());
    }

    fn worker(&mut self, WorkerMessage { worker, what }: WorkerMessage) {
        let uid = self.observed.owner_of(worker).unwrap_or_default().to_owned();
        let what = match what {
            WorkerDid::Said(RunnerEvent::Growth { id, memory }) => {
                let refusal = self.observed.grow(&uid, worker, id, &memory, Instant::now()).err();
                let (refused, passing) =
                    refusal.map_or((None, false), |Refusal { reason, passing }| (Some(reason), passing));
                tracing::info!(uid, worker, refused, passing, "the worker asked for more memory");
                if id > 0 {
                    self.executor.tell(worker, RunnerCommand::Growth { id, refused, passing });
                }
                if passing {
                    self.executor.tell_others(worker, &RunnerCommand::Shrink);
                }
                return;
            }
            WorkerDid::Said(event) => {
                if let RunnerEvent::Ready(report) = &event {
                    self.executor.learn(worker, report);
                }
                Happened::WorkerSaid(worker, event)
            }
            WorkerDid::Ended(end) => {
                tracing::info!(uid, worker, how = end.how, failure = ?end.failure, "worker ended");
                self.executor.forget_worker(worker);
                Happened::WorkerEnded(worker, end)
            }
        };
        self.note(&uid, what);
    }

    /// Ready is more than alive: it knows its devices and what should be here, and has once answered for all of it.
    fn tell_readiness(&self, drains: bool, heard: bool, published: bool) {
        let readiness = if drains {
            Err("the agent is draining".to_owned())
        } else if !heard {
            Err("the agent has not heard yet what should be on this node".to_owned())
        } else if !published {
            Err("the models' ports are being opened".to_owned())
        } else if self.observed.devices.is_none() {
            Err(self.observed.probe_error.clone().unwrap_or_else(|| "the devices are being looked at".to_owned()))
        } else {
            Ok(())
        };
        self.means.front.set_ready(readiness);
    }

    /// Looks at the devices: at those that are known, or at what there is.
    fn probe(&mut self, probe: &mut Probe) {
        if probe.running {
            // It may have looked before that for which it is asked to look again.
            self.observed.look_at.get_or_insert_with(Instant::now);
            return;
        }
        (probe.again_at, probe.running) = (None, true);
        self.observed.look_at = None;
        let afresh = std::mem::take(&mut probe.afresh);
        self.executor.probe(self.observed.devices.as_ref().filter(|_| !afresh).map(Devices::report));
    }

    /// What others hold of a device they give back without a word, so somebody who lacks it has it looked for.
    fn look_while_short(&self, plan: &Plan, probe: &mut Probe) {
        let lacks = |verdict: &plan::Verdict| verdict.reason.as_deref() == Some(reasons::INSUFFICIENT_MEMORY);
        let mut models = self.observed.models.values();
        let wishes = |model: &Model| model.wants_more.as_ref().is_some_and(|(_, asked)| asked.elapsed() < FOREIGN_LOOK);
        if self.observed.others_hold_memory() && (plan.verdicts.values().any(lacks) || models.any(wishes)) {
            let last = probe.last.unwrap_or_else(Instant::now);
            probe.again_at.get_or_insert(last + FOREIGN_LOOK);
        }
    }

    /// Reads files of the kernel, which takes microseconds.
    fn watch_memory(&mut self, seen: &mut Option<GroupMemory>) {
        let held = self.executor.held();
        let group = cgroup::tightest();
        self.observed.hold(&held, group);
        let Some(group) = group else { return };
        self.means.metrics.host_memory(group);
        if HostMemory::is_short(group) || HostMemory::is_stalled(group, *seen) {
            self.executor.keep_spare(false);
            self.note("", Happened::Measured(HostMemory { group, held }));
        }
        *seen = Some(group);
    }
}

/// When the devices are looked at again.
#[derive(Default)]
struct Probe {
    failures: u32,
    again_at: Option<Instant>,
    running: bool,
    /// The next one is to see what devices there are, not only what is free of those that are known.
    afresh: bool,
    /// When the last one ended.
    last: Option<Instant>,
}

impl Probe {
    /// When to look, where something is to be looked at by `look_at`.
    fn due(&self, look_at: Option<Instant>) -> Option<Instant> {
        if self.running { None } else { self.again_at.into_iter().chain(look_at).min() }
    }

    fn failed(&mut self) {
        self.running = false;
        let (first, longest) = PROBE_BACKOFF;
        self.again_at = Some(Instant::now() + first.saturating_mul(1 << self.failures.min(16)).min(longest));
        self.failures = self.failures.saturating_add(1);
    }
}

async fn hung_up(hangup: &mut Signal) {
    // `None`: no more signals can come.
    if hangup.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

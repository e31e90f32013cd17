//! Does what the plan says. Chooses nothing: every step becomes a task whose result comes back as something that
//! happened.

mod dry_run;
mod files;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::conditions::reasons;
use altiplano_crds::model_deployment::EngineSpec;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use self::dry_run::{Question, estimate, processes, save};
use self::files::{Way, files, tell_progress, unstored};
use super::estimates::Estimates;
use super::observe::{Happened, Model, Observed, RouteTo, Sources, StoredFiles, Trouble};
use super::plan::Step;
use crate::devices::{Devices, Share, Target, Trial};
use crate::front::{Front, PublishedModel, Route};
use crate::metrics::AgentMetrics;
use crate::runner::adopt::{self, Record};
use crate::runner::protocol::{ProbeReport, RunnerCommand, RunnerConfig, RunnerFailure, RunnerReport};
use crate::runner::spawn::{Runner, SpawnError};
use crate::runner::supervise::{Start, WorkerHandle, WorkerId, WorkerMessage, supervise, take_over};
use crate::store::{Progress, Store, StoreError, StoredModel};

/// How long looking at the devices may take: the first touch of a GPU driver is slow.
const PROBE_TIMEOUT: Duration = Duration::from_mins(1);

/// How long the answers of a model's last requests may take once its worker is gone.
const WITHDRAW_GRACE: Duration = Duration::from_secs(1);

/// Downloads at the same time.
const DOWNLOADS: usize = 4;

/// Dry runs at the same time.
const DRY_RUNS: usize = 2;

/// Something that happened to a model, or to the node where `uid` is empty.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) uid: String,
    pub(super) what: Happened,
}

/// What steps need.
#[derive(Clone)]
pub struct Means {
    /// Starts workers.
    pub runner: Runner,
    /// Fetches files.
    pub store: Store,
    /// Listens.
    pub front: Front,
    /// What is measured.
    pub metrics: Arc<AgentMetrics>,
    /// Directory of the workers' sockets. Short: a socket's path has 107 bytes.
    pub sockets: PathBuf,
    /// CPU threads of a worker that says nothing about it.
    pub threads: u32,
    /// Bytes of host memory that models may take.
    pub memory_limit: u64,
    /// Bytes of each GPU that models may take; `None`: all there is.
    pub device_memory_limit: Option<u64>,
    /// What models take, as far as it is known.
    pub estimates: Arc<Estimates>,
}

/// Runs steps.
pub(super) struct Executor {
    means: Means,
    tasks: JoinSet<Report>,
    supervisors: JoinSet<()>,
    workers: HashMap<WorkerId, WorkerHandle>,
    fetches: HashMap<String, CancellationToken>,
    progress: mpsc::Sender<Report>,
    messages: mpsc::Sender<WorkerMessage>,
    /// How each worker's memory was estimated.
    asked: HashMap<WorkerId, (Question, Target)>,
    downloads: Arc<Semaphore>,
    dry_runs: Arc<Semaphore>,
}

impl Executor {
    pub(super) fn new(means: Means, progress: mpsc::Sender<Report>, messages: mpsc::Sender<WorkerMessage>) -> Self {
        Self {
            means,
            tasks: JoinSet::new(),
            supervisors: JoinSet::new(),
            workers: HashMap::new(),
            fetches: HashMap::new(),
            progress,
            messages,
            asked: HashMap::new(),
            downloads: Arc::new(Semaphore::new(DOWNLOADS)),
            dry_runs: Arc::new(Semaphore::new(DRY_RUNS)),
        }
    }

    /// Looks at the devices: at those that are known, or at what there is.
    pub(super) fn probe(&mut self, known: Option<ProbeReport>) {
        let (runner, limit) = (self.means.runner.clone(), self.means.memory_limit);
        let (estimates, device_limit) = (Arc::clone(&self.means.estimates), self.means.device_memory_limit);
        self.tasks.spawn(async move {
            let devices = match known {
                Some(known) => runner.look(&known, PROBE_TIMEOUT).await,
                None => runner.probe(PROBE_TIMEOUT).await,
            };
            let devices = match devices {
                Ok(report) => {
                    let processes = processes(&runner, &estimates, &report).await;
                    let devices = Devices::new(report, limit).with_process_bytes(processes);
                    Ok(devices.limited(device_limit.unwrap_or(u64::MAX)))
                }
                Err(error) => Err(trouble_of(&error).message),
            };
            Report { uid: String::new(), what: Happened::Probed(devices) }
        });
    }

    /// Looks at the room for files.
    pub(super) fn measure_storage(&mut self) {
        let store = self.means.store.clone();
        self.tasks.spawn(async move {
            let what = match store.usage().await {
                Ok(usage) => Happened::Stored(usage.used_bytes, usage.capacity_bytes),
                Err(error) => {
                    tracing::warn!(%error, "cannot measure the store");
                    Happened::Stored(0, 0)
                }
            };
            Report { uid: String::new(), what }
        });
    }

    /// Bytes of host memory that the workers held at their last heartbeats.
    pub(super) fn held(&self) -> BTreeMap<WorkerId, u64> {
        self.workers.iter().map(|(worker, handle)| (*worker, handle.held_bytes())).collect()
    }

    /// The next task that ended, with its report if it makes one; pending while there is none.
    pub(super) async fn next(&mut self) -> Result<Option<Report>, JoinError> {
        tokio::select! {
            Some(report) = self.tasks.join_next() => report.map(Some),
            Some(supervisor) = self.supervisors.join_next() => supervisor.map(|()| None),
            else => std::future::pending().await,
        }
    }

    /// A worker has ended.
    pub(super) fn forget_worker(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
        self.asked.remove(&worker);
    }

    /// A model has been loaded: what it took is what it will take.
    pub(super) fn learn(&mut self, worker: WorkerId, report: &RunnerReport) {
        let Some((question, target)) = self.asked.remove(&worker) else { return };
        let (estimates, memory) = (Arc::clone(&self.means.estimates), target.translate_back(report.memory.clone()));
        self.supervisors.spawn(async move {
            if let Some(key) = question.key().await
                && estimates.measured(&key, &memory)
            {
                save(&estimates).await;
            }
        });
    }

    fn supervise(&mut self, record: Record, start: Start) {
        let (runner, messages) = (self.means.runner.clone(), self.messages.clone());
        let worker = record.worker;
        let (handle, run) = supervise(runner, record, start, messages);
        self.workers.insert(worker, handle);
        self.supervisors.spawn(run);
    }

    /// Takes over the workers that a dead agent has left behind. Blocking, for milliseconds.
    pub(super) fn adopt(&mut self) -> Vec<Record> {
        let records = match adopt::records(&self.means.sockets) {
            Ok(records) => records,
            Err(error) => {
                tracing::warn!(%error, "cannot look for workers that another agent left");
                return Vec::new();
            }
        };
        let mut taken = Vec::new();
        for record in records {
            match take_over(&record) {
                Ok(process) => {
                    tracing::info!(uid = record.assignment.uid, worker = record.worker, "took over a worker");
                    self.supervise(record.clone(), Start::Running(process));
                    taken.push(record);
                }
                // It has ended, with its agent or before.
                Err(error) => {
                    tracing::info!(%error, worker = record.worker, "a worker of the former agent is gone");
                    adopt::clean_up(&record.config.socket);
                }
            }
        }
        taken
    }

    /// Answers a worker.
    pub(super) fn tell(&self, worker: WorkerId, command: RunnerCommand) {
        if let Some(handle) = self.workers.get(&worker) {
            handle.tell(command);
        }
    }

    /// Tells all workers but one.
    pub(super) fn tell_others(&self, worker: WorkerId, command: &RunnerCommand) {
        for (_, handle) in self.workers.iter().filter(|(other, _)| **other != worker) {
            handle.tell(command.clone());
        }
    }

    /// Begins a step. `observed` is as it was before it.
    pub(super) fn run(&mut self, step: Step, observed: &Observed) {
        let Some(model) = observed.models.get(step.uid()) else { return };
        tracing::debug!(model = model.label(), ?step, "step");
        match step {
            Step::Publish { uid } => self.publish(uid, model),
            Step::Fetch { uid } => self.fetch(uid, model.source.clone()),
            Step::Peek { uid } => self.peek(uid, model.source.clone()),
            Step::Estimate { uid, revision, on: Trial { devices, parts } } => {
                let Some(config) = self.config(model, WorkerId::MAX, devices) else { return };
                self.estimate(uid, revision, Question::new(RunnerConfig { parts, ..config }, model, observed));
            }
            Step::Load { uid: _, revision, worker, target, need, note } => {
                let Some(mut config) = self.config(model, worker, target.devices.clone()) else { return };
                if let Share::Part(part) = target.share {
                    config = config.with_part(part);
                }
                let estimated = RunnerConfig { devices: target.estimate_on.clone(), ..config.clone() };
                self.asked.insert(worker, (Question::new(estimated, model, observed), target));
                let devices = observed.devices.as_ref();
                let reserved = need.iter().filter(|(device, _)| devices.is_some_and(|all| all.has_driver(device)));
                // It opens the device before it looks.
                let process = |device| devices.and_then(|all| all.process_bytes.get(device)).copied().unwrap_or(0);
                config.reserved =
                    reserved.map(|(device, bytes)| (device.clone(), bytes.saturating_sub(process(device)))).collect();
                tracing::info!(
                    model = model.label(),
                    revision,
                    worker,
                    devices = ?config.devices,
                    note,
                    "loading the model"
                );
                let assignment = model.assignment.as_ref().clone();
                self.supervise(Record { worker, config, assignment, predicted: need, note }, Start::New);
            }
            Step::Route { uid, to } => self.means.front.route(&uid, self.route(to)),
            Step::Unload { uid: _, why, for_room: _ } => {
                tracing::info!(model = model.label(), why, "unloading the model");
            }
            Step::Yield { uid: _ } => {
                tracing::info!(model = model.label(), "another model waits for its memory: new requests wait");
            }
            Step::Resume { uid: _ } => tracing::info!(model = model.label(), "it takes requests again"),
            Step::Wake { uid: _ } => tracing::info!(model = model.label(), "waking the model"),
            Step::Shrink { uid: _, worker, why } => {
                tracing::info!(model = model.label(), worker, why, "asking for what the context has grown by");
                self.tell(worker, RunnerCommand::Shrink);
            }
            Step::Drain { uid: _, worker, deadline: _ } => {
                tracing::info!(model = model.label(), worker, "draining the worker");
            }
            Step::Stop { uid: _, worker, kill_at } => {
                if let Some(handle) = self.workers.get(&worker) {
                    handle.stop(kill_at);
                }
            }
            Step::End { uid: _, worker, message } => {
                tracing::error!(model = model.label(), worker, message, "ending the worker");
                if let Some(handle) = self.workers.get(&worker) {
                    handle.end(RunnerFailure { reason: reasons::OUT_OF_MEMORY.to_owned(), message });
                }
            }
            Step::Remove { uid } => {
                if let Some(fetch) = self.fetches.remove(&uid) {
                    fetch.cancel();
                }
                let front = self.means.front.clone();
                self.tasks.spawn(async move {
                    front.withdraw(&uid, WITHDRAW_GRACE).await;
                    Report { uid, what: Happened::Withdrawn }
                });
            }
        }
    }

    /// Has a spare runner started, or ended because memory is short.
    pub(super) fn keep_spare(&self, keep: bool) {
        if keep {
            self.means.runner.prepare_spare();
        } else {
            self.means.runner.end_spare();
        }
    }

    /// Ends everything that still runs. Dropping the handles kills workers that are left.
    pub(super) async fn shutdown(mut self) {
        self.means.runner.close_spare();
        self.fetches.values().for_each(CancellationToken::cancel);
        self.workers.clear();
        // Their last messages have nobody to go to, so nobody must wait for it.
        drop((self.progress, self.messages));
        self.tasks.shutdown().await;
        while let Some(result) = self.supervisors.join_next().await {
            if let Err(error) = result {
                tracing::error!(%error, "a worker's supervisor failed");
            }
        }
    }

    fn publish(&mut self, uid: String, model: &Model) {
        let (front, assignment) = (self.means.front.clone(), Arc::clone(&model.assignment));
        self.tasks.spawn(async move {
            let model = PublishedModel {
                uid: uid.clone(),
                namespace: assignment.namespace.clone(),
                name: assignment.name.clone(),
                served_name: assignment.served_name.clone(),
                adapters: assignment.model.adapters.iter().map(|adapter| adapter.name.clone()).collect(),
                traffic: assignment.traffic.clone(),
            };
            let port = front.publish(model).await;
            let port = port.map_err(|error| Trouble { reason: "PortUnavailable".to_owned(), message: chain(&error) });
            Report { uid, what: Happened::Published(port) }
        });
    }

    fn fetch(&mut self, uid: String, source: Sources) {
        let cancel = CancellationToken::new();
        if let Some(former) = self.fetches.insert(uid.clone(), cancel.clone()) {
            former.cancel();
        }
        let (store, reports) = (self.means.store.clone(), self.progress.clone());
        let downloads = Arc::clone(&self.downloads);
        self.tasks.spawn(async move {
            // The semaphore is never closed.
            let _permit = downloads.acquire_owned().await;
            let (progress, seen) = watch::channel(Progress::default());
            let result = tokio::select! {
                result = files(&store, &source, Way::Whole(&progress, &cancel)) => result,
                () = tell_progress(seen, &reports, &uid, &source) => Err(unstored(None, &StoreError::Cancelled)),
            };
            Report { uid, what: Happened::Fetched(source, result.map(Arc::new)) }
        });
    }

    /// Fetches the headers of the model's files; a file whose header is too long for that, whole.
    fn peek(&mut self, uid: String, source: Sources) {
        let (store, downloads) = (self.means.store.clone(), Arc::clone(&self.downloads));
        self.tasks.spawn(async move {
            // The semaphore is never closed.
            let _permit = downloads.acquire_owned().await;
            let result = files(&store, &source, Way::Headers).await;
            Report { uid, what: Happened::Peeked(source, result.map(Arc::new)) }
        });
    }

    fn estimate(&mut self, uid: String, revision: String, question: Question) {
        let (runner, known) = (self.means.runner.clone(), Arc::clone(&self.means.estimates));
        let dry_runs = Arc::clone(&self.dry_runs);
        self.tasks.spawn(async move {
            let _permit = dry_runs.acquire_owned().await;
            let result = estimate(&runner, &known, &question).await.map_err(|error| trouble_of(&error));
            let RunnerConfig { devices, parts, .. } = question.config;
            Report { uid, what: Happened::Estimated(revision, Trial { devices, parts }, result) }
        });
    }

    fn config(&self, model: &Model, worker: WorkerId, devices: Vec<String>) -> Option<RunnerConfig> {
        let Some(stored) = model.file.known() else {
            tracing::error!(model = model.label(), "planned to load a file that is not there");
            return None;
        };
        let wanted = &model.assignment;
        let StoredFiles { model: StoredModel { path, .. }, projector, draft, adapters } = stored.as_ref();
        let layers = if devices.is_empty() { Some(0) } else { wanted.engine.gpu_layers };
        Some(RunnerConfig {
            uid: wanted.uid.clone(),
            revision: wanted.revision.clone(),
            namespace: wanted.namespace.clone(),
            name: wanted.name.clone(),
            served_name: wanted.served_name.clone(),
            model_path: path.clone(),
            projector: projector.clone(),
            draft_path: draft.as_ref().map(|draft| draft.path.clone()),
            adapters: adapters.clone(),
            chat_template: wanted.model.chat_template.clone(),
            socket: self.socket(worker),
            context: wanted.context.clone(),
            engine: wanted.engine.clone(),
            traffic: wanted.traffic.clone(),
            devices,
            gpu_layers: layers.and_then(|layers| u32::try_from(layers).ok()),
            expert_layers_on_cpu: 0,
            parts: false,
            threads: threads(&wanted.engine, self.means.threads),
            reserved: BTreeMap::new(),
        })
    }

    fn socket(&self, worker: WorkerId) -> PathBuf {
        self.means.sockets.join(format!("{worker}.sock"))
    }

    fn route(&self, to: RouteTo) -> Route {
        match to {
            RouteTo::Worker(worker) => Route::Ready { socket: self.socket(worker) },
            RouteTo::Unloaded => Route::Unloaded,
            RouteTo::Loading => Route::Loading,
            RouteTo::Draining => Route::Draining,
            RouteTo::Unavailable { reason, message } => Route::Unavailable { reason, message },
        }
    }
}

fn threads(engine: &EngineSpec, default: u32) -> u32 {
    engine.threads.and_then(|threads| u32::try_from(threads).ok()).unwrap_or(default)
}

fn trouble_of(error: &SpawnError) -> Trouble {
    Trouble { reason: error.reason().to_owned(), message: chain(error) }
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

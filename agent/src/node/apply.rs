//! Does what the plan says. Chooses nothing: every step becomes a task whose result comes back as something that
//! happened.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use altiplano_crds::conditions::reasons;
use altiplano_crds::model_deployment::{AdapterSpec, EngineSpec, ModelSource};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::estimates::{self, Estimates};
use super::observe::{Happened, Model, Observed, RouteTo, Sources, StoredFiles, Trouble};
use super::plan::Step;
use crate::devices::{Devices, Share, Target, Trial};
use crate::engine::llama_cpp_version;
use crate::front::{Front, PublishedModel, Route};
use crate::ledger::Need;
use crate::metrics::AgentMetrics;
use crate::runner::adopt::{self, Record};
use crate::runner::protocol::{
    AdapterFile, EstimateReport, ProbeReport, ProbedDevice, RunnerCommand, RunnerConfig, RunnerFailure, RunnerReport,
};
use crate::runner::spawn::{Runner, SpawnError};
use crate::runner::supervise::{Start, WorkerHandle, WorkerId, WorkerMessage, supervise, take_over};
use crate::store::{Progress, Source, Store, StoreError, StoredModel};

/// How long a dry run may take; it reads no weights.
const ESTIMATE_TIMEOUT: Duration = Duration::from_mins(1);

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

    /// Looks at the devices.
    pub(super) fn probe(&mut self) {
        let (runner, limit) = (self.means.runner.clone(), self.means.memory_limit);
        let (estimates, device_limit) = (Arc::clone(&self.means.estimates), self.means.device_memory_limit);
        self.tasks.spawn(async move {
            let devices = runner.probe(PROBE_TIMEOUT).await;
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

/// How much of files is wanted.
#[derive(Clone, Copy)]
enum Way<'a> {
    /// All of them, and word of the progress of the model's own.
    Whole(&'a watch::Sender<Progress>, &'a CancellationToken),
    /// What they say of themselves.
    Headers,
}

impl Way<'_> {
    async fn file(self, store: &Store, source: &ModelSource, is_own: bool) -> Result<StoredModel, StoreError> {
        let source = Source::from(source);
        let quiet = watch::Sender::default();
        match self {
            Self::Whole(progress, cancel) => {
                store.ensure(&source, if is_own { progress } else { &quiet }, cancel).await
            }
            Self::Headers => match store.peek(&source).await? {
                Some(peeked) => Ok(peeked),
                None => store.ensure(&source, &quiet, &CancellationToken::new()).await,
            },
        }
    }
}

/// Sees to the model's own file and then to its projector, draft model and adapters, which are smaller.
async fn files(store: &Store, sources: &Sources, way: Way<'_>) -> Result<StoredFiles, Trouble> {
    let Sources { model, projector, draft, adapters: adapter_specs } = sources;
    let model = way.file(store, model, true).await.map_err(|error| unstored(None, &error))?;
    let projector = match projector {
        None => None,
        Some(source) => {
            let stored = way.file(store, source, false).await;
            Some(stored.map_err(|error| unstored(Some("projector"), &error))?.path)
        }
    };
    let draft = match draft {
        None => None,
        Some(source) => {
            let stored = way.file(store, source, false).await;
            Some(stored.map_err(|error| unstored(Some("draft"), &error))?)
        }
    };
    let mut adapters = Vec::with_capacity(adapter_specs.len());
    for AdapterSpec { name, source, scale_percent } in adapter_specs {
        let stored = way.file(store, source, false).await;
        let stored = stored.map_err(|error| unstored(Some(&format!("adapter {name}")), &error))?;
        let scale_percent = u32::try_from(*scale_percent).unwrap_or(0);
        adapters.push(AdapterFile { name: name.clone(), path: stored.path, scale_percent });
    }
    Ok(StoredFiles { model, projector, draft, adapters })
}

/// Why a file is not there; `what` names one that is not the model's own.
fn unstored(what: Option<&str>, error: &StoreError) -> Trouble {
    let message = what.map_or_else(|| chain(error), |what| format!("{what}: {}", chain(error)));
    Trouble { reason: error.reason().to_owned(), message }
}

/// Passes on whole steps of progress; never ends.
async fn tell_progress(
    mut seen: watch::Receiver<Progress>,
    reports: &mpsc::Sender<Report>,
    uid: &str,
    source: &Sources,
) {
    let mut last = None;
    while seen.changed().await.is_ok() {
        let step = seen.borrow_and_update().percent().map(|percent| percent / 5 * 5);
        if let Some(percent) = step
            && step != last
        {
            last = step;
            let what = Happened::FetchProgress(source.clone(), percent);
            // A full channel drops it: the next one is better anyway.
            let _ = reports.try_send(Report { uid: uid.to_owned(), what });
        }
    }
    std::future::pending::<()>().await;
}

async fn estimate(runner: &Runner, known: &Arc<Estimates>, question: &Question) -> Result<EstimateReport, SpawnError> {
    let key = question.key().await;
    if let Some(report) = key.as_ref().and_then(|key| known.get(key)) {
        return Ok(report);
    }
    let report = runner.estimate(&question.config, ESTIMATE_TIMEOUT).await?;
    if let Some(key) = key {
        known.predicted(&key, report.clone());
        save(known).await;
    }
    Ok(report)
}

async fn save(known: &Arc<Estimates>) {
    let known = Arc::clone(known);
    if let Err(error) = tokio::task::spawn_blocking(move || known.save()).await {
        tracing::error!(%error, "remembering what models take failed");
    }
}

/// What a process takes of each GPU by opening it: measured once for each device and driver.
async fn processes(runner: &Runner, known: &Arc<Estimates>, report: &ProbeReport) -> Need {
    let gpus: Vec<&ProbedDevice> = report.devices.iter().filter(|device| device.kind == "GPU").collect();
    let name = |gpu: &ProbedDevice| format!("{} {} {}", gpu.id, gpu.description, gpu.driver);
    if gpus.iter().any(|gpu| known.process(&name(gpu)).is_none()) {
        match runner.process_bytes(PROBE_TIMEOUT).await {
            Ok(measured) => {
                for gpu in &gpus {
                    known.process_measured(name(gpu), measured.get(&gpu.id).copied().unwrap_or(0));
                }
                save(known).await;
            }
            Err(error) => tracing::warn!(%error, "cannot measure what a process takes of a device"),
        }
    }
    gpus.iter().filter_map(|gpu| Some((gpu.id.clone(), known.process(&name(gpu))?))).collect()
}

/// What is asked of a dry run.
struct Question {
    config: RunnerConfig,
    /// Digests of the files, by path, where they are known.
    digests: Vec<(PathBuf, String)>,
    /// Names and drivers of the devices.
    drivers: Vec<String>,
}

impl Question {
    fn new(config: RunnerConfig, model: &Model, observed: &Observed) -> Self {
        let files = model.file.known().map_or([None, None], |stored| [Some(&stored.model), stored.draft.as_ref()]);
        let digest = |file: &StoredModel| Some((file.path.clone(), file.sha256.clone()?));
        let devices = observed.devices.iter().flat_map(|devices| &devices.list);
        let devices = devices.filter(|device| config.devices.contains(&device.id));
        Self {
            digests: files.into_iter().flatten().filter_map(digest).collect(),
            drivers: devices.map(|device| format!("{} {}", device.description, device.driver)).collect(),
            config,
        }
    }

    /// Everything that the answer depends on; `None` for a file that is gone.
    async fn key(&self) -> Option<String> {
        let RunnerConfig {
            model_path,
            projector,
            draft_path,
            adapters,
            context,
            engine,
            devices,
            gpu_layers,
            expert_layers_on_cpu,
            parts,
            threads,
            ..
        } = &self.config;
        let mut files = Vec::new();
        let adapter_paths = adapters.iter().map(|adapter| &adapter.path);
        for path in std::iter::once(model_path).chain(projector).chain(draft_path).chain(adapter_paths) {
            let digest = self.digests.iter().find(|(of, _)| of == path).map(|(_, digest)| digest.clone());
            files.push(if let Some(digest) = digest {
                (digest, 0, String::new())
            } else {
                let metadata = tokio::fs::metadata(path).await.ok()?;
                let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
                (path.display().to_string(), metadata.len(), modified.to_string())
            });
        }
        let versions = (env!("CARGO_PKG_VERSION"), llama_cpp_version());
        let part = (gpu_layers, expert_layers_on_cpu, parts);
        estimates::key(&(versions, files, context, engine, (devices, &self.drivers), part, threads))
    }
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

/// A directory for sockets of its own: below `state`, or below the system's where that path is too long for a socket.
/// Agents below one `init` have the same one, so that each finds its predecessor's workers. What dead agents left
/// elsewhere is removed.
pub fn socket_directory(state: &Path) -> std::io::Result<(PathBuf, std::fs::File)> {
    /// Longest directory whose sockets fit into `sun_path` (108 bytes with the end, 24 for the file's name).
    const MAX_DIRECTORY_BYTES: usize = 80;
    let init = adopt::init().and_then(|init| directory_of(init.as_raw_nonzero().get()));
    let name = init.unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string()[..8].to_owned());
    let mut run = state.join("run");
    if run.as_os_str().len() + 1 + name.len() > MAX_DIRECTORY_BYTES {
        run = std::env::temp_dir().join("altiplano");
    }
    std::fs::create_dir_all(&run)?;
    for entry in std::fs::read_dir(&run)?.flatten() {
        // Only one that nobody holds the lock of, nor is about to.
        if !may_be_adopted(&entry.file_name().to_string_lossy())
            && let Ok(lock) = std::fs::File::open(entry.path().join("lock"))
            && rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    let directory = run.join(name);
    {
        use std::os::unix::fs::DirBuilderExt as _;
        match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    let lock = std::fs::File::create(directory.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    Ok((directory, lock))
}

/// Name of the directory of the agents below an `init`: its number and when it was started, by which no later process
/// of that number can be taken for it.
fn directory_of(init: i32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{init}/stat")).ok()?;
    // The program's name may have anything in it, also a parenthesis.
    let (_, fields) = stat.rsplit_once(')')?;
    let started: u64 = fields.split_whitespace().nth(19)?.parse().ok()?;
    Some(format!("i{init}-{started:x}"))
}

/// Whether the directory's `init` still lives, so that another agent may come for what is in it.
fn may_be_adopted(directory: &str) -> bool {
    let init = directory.strip_prefix('i').and_then(|rest| rest.split_once('-')?.0.parse().ok());
    init.and_then(directory_of).is_some_and(|name| name == directory)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FlockOperation, flock};

    use super::*;

    #[test]
    fn what_others_left_or_hold_stops_no_start() {
        let folder = tempfile::tempdir().unwrap();
        let made = |name: &str| {
            let directory = folder.path().join("run").join(name);
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("0.sock"), "").unwrap();
            (std::fs::File::create(directory.join("lock")).unwrap(), directory)
        };
        let ((_, stale), (held, living), (_, orphaned)) = (made("stale"), made("living"), made("i999999999-1"));
        flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
        let (first, first_lock) = socket_directory(folder.path()).unwrap();
        assert!(!stale.exists() && !orphaned.exists(), "what the dead left is gone");
        assert!(living.join("0.sock").exists(), "what another agent uses stays");
        let (second, _second_lock) = socket_directory(folder.path()).unwrap();
        assert!(first != second && first.exists() && second.exists(), "{first:?} {second:?}");
        drop(first_lock);
        socket_directory(folder.path()).unwrap();
        assert!(!first.exists() && second.exists());
    }
}

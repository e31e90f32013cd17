//! The worker process: one model, served on a Unix socket until the agent goes or says so.
//!
//! Standard output belongs to [`RunnerEvent`]s (or the report that was asked for), standard error to the log.

use std::io::{self, BufRead, Read, Write};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::adopt::Door;
use super::grants;
use super::protocol::{RunnerCommand, RunnerConfig, RunnerEvent, RunnerFailure};
use super::socket::Listener;
use super::spare::{RUNNER, SPARE};
use crate::cgroup;
use crate::engine::{self, Activity, Engine, EngineError};
use crate::nvml;

/// What a worker process is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Load the model and serve it.
    Serve,
    /// Print the devices.
    Probe {
        /// Keep them open until standard input ends.
        stay: bool,
    },
    /// Print the devices that standard input names, with what is free of them now.
    Look,
    /// Print what the model would take.
    Estimate,
    /// Print what changes of the context's size cost.
    MeasureResizes,
    /// Print how fast llama.cpp's bare calls are.
    MeasureBatches,
}

/// Why a worker ends with a non-zero code.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The configuration cannot be read.
    #[error("cannot read the configuration from standard input")]
    Config(#[source] io::Error),
    /// The configuration is not what this version expects.
    #[error("the configuration does not parse")]
    Parse(#[source] serde_json::Error),
    /// The engine cannot start or go on.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The API cannot be set up.
    #[error("cannot set up the API")]
    Api(#[from] crate::api::ApiStateError),
    /// The socket cannot be had.
    #[error("cannot serve on {path}")]
    Socket {
        /// The socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something the process needs of the system.
    #[error("cannot set up the process")]
    System(#[source] io::Error),
    /// The agent reads no more.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
}

impl ChildError {
    fn failure(&self) -> RunnerFailure {
        let reason = match self {
            Self::Config(_) | Self::Parse(_) | Self::Api(_) => "InvalidConfig",
            Self::Engine(error) => error.reason(),
            Self::Socket { .. } => "SocketFailed",
            Self::System(_) | Self::Output(_) => "Internal",
        };
        let mut message = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        RunnerFailure { reason: reason.to_owned(), message }
    }
}

/// How long a worker whose agent is gone gives its thread to end a step.
const ORPHAN_GRACE: Duration = Duration::from_secs(5);

/// Least time between two reports of activity that tell only of another number.
const ACTIVITY_PAUSE: Duration = Duration::from_secs(1);

/// Time between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Longest configuration line: chat templates are bounded, so is this.
const CONFIG_BYTES: u64 = 1 << 20;

/// Runs a worker process to its end. On an error the last event on standard output says why.
pub fn run(mode: Mode) -> Result<(), ChildError> {
    let events = Events::default();
    let result = match mode {
        Mode::Probe { stay } => {
            let answer = engine::probe().map_err(ChildError::from).and_then(|report| events.write(&report));
            if stay {
                // Its end is all that is waited for.
                let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            }
            answer
        }
        Mode::Look => {
            let report = read_config().and_then(|known| match nvml::look().and_then(|seen| seen.again(known)) {
                Some(report) => Ok(report),
                None => Ok(engine::probe()?),
            });
            report.and_then(|report| events.write(&report))
        }
        Mode::Estimate => {
            let report = read_config().and_then(|config| {
                choose_backends(&config);
                Ok(engine::estimate(&config)?)
            });
            report.and_then(|report| events.write(&report))
        }
        Mode::MeasureResizes => read_config()
            .and_then(|config| Ok(engine::measure_resizes(&config)?))
            .and_then(|report| events.write(&report)),
        Mode::MeasureBatches => read_config()
            .and_then(|asked| Ok(engine::measure_batches(&asked)?))
            .and_then(|report| events.write(&report)),
        Mode::Serve => {
            volunteer();
            call_it(SPARE);
            if io::stdin().lock().fill_buf().is_ok_and(<[u8]>::is_empty) {
                // An agent that never needed it is gone.
                return Ok(());
            }
            call_it(RUNNER);
            read_config().and_then(|config| {
                choose_backends(&config);
                serve(&config, &events)
            })
        }
    };
    if let Err(error) = &result {
        // If that fails too the exit code is all that is left.
        let _ = events.write(&RunnerEvent::Failed(error.failure()));
    }
    result
}

/// A GPU's drivers take 60 MB and a quarter of a second to say what nobody asks. Called while there is one thread.
fn choose_backends(config: &RunnerConfig) {
    if !config.uses_gpu() {
        engine::without_gpus();
    }
}

/// The process's name, as `ps` shows it.
fn call_it(name: &str) {
    // For people, who can do without it.
    let _ = std::fs::write("/proc/self/comm", name);
}

/// Should the kernel run out of memory after all, it ends a worker rather than the agent.
fn volunteer() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "900") {
        tracing::debug!(%error, "the kernel may end the agent before this worker");
    }
}

fn read_config<T: DeserializeOwned>() -> Result<T, ChildError> {
    let mut line = String::new();
    io::stdin().lock().take(CONFIG_BYTES).read_line(&mut line).map_err(ChildError::Config)?;
    serde_json::from_str(&line).map_err(ChildError::Parse)
}

/// One JSON object a line on standard output.
#[derive(Clone, Default)]
struct Events {
    // Lines of two threads must not mix.
    said: Arc<Mutex<Said>>,
}

/// What another agent must be told again.
#[derive(Default)]
struct Said {
    state: Option<RunnerEvent>,
    activity: Option<RunnerEvent>,
    /// Another agent may come, so one that does not listen is no reason to end.
    may_be_adopted: bool,
}

impl Events {
    fn write(&self, event: &impl Serialize) -> Result<(), ChildError> {
        let _lock = self.lock();
        write_line(event)
    }

    /// Also what is not heard is remembered for the next agent.
    fn say(&self, event: &RunnerEvent) -> Result<(), ChildError> {
        let mut said = self.lock();
        match event {
            RunnerEvent::Loading { .. } | RunnerEvent::Ready(_) => said.state = Some(event.clone()),
            RunnerEvent::Changed(report) => said.state = Some(RunnerEvent::Ready(report.clone())),
            RunnerEvent::Activity { .. } => said.activity = Some(event.clone()),
            RunnerEvent::Heartbeat { .. } | RunnerEvent::Growth { .. } | RunnerEvent::Failed(_) => {}
        }
        match write_line(event) {
            Err(_) if said.may_be_adopted => Ok(()),
            result => result,
        }
    }

    /// Tells another agent how things are.
    fn repeat(&self) {
        let said = self.lock();
        for event in [&said.state, &said.activity].into_iter().flatten() {
            if let Err(error) = write_line(event) {
                tracing::warn!(%error, "the new agent does not listen");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write_line(event: &impl Serialize) -> Result<(), ChildError> {
    let mut line = serde_json::to_vec(event).map_err(|error| ChildError::Output(error.into()))?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).map_err(ChildError::Output)
}

fn serve(config: &RunnerConfig, events: &Events) -> Result<(), ChildError> {
    let (orphaned_sender, orphaned) = watch::channel(false);
    let (grants, commands) = {
        let events = events.clone();
        grants::Agent::new(move |event: &RunnerEvent| events.say(event).is_ok())
    };
    let door = Door::open(&config.socket).map_err(ChildError::System)?;
    events.lock().may_be_adopted = door.is_some();
    let loaded: Arc<OnceLock<Engine>> = Arc::default();
    let ears = Ears { answers: commands, engine: Arc::clone(&loaded) };
    watch_agent(orphaned_sender, ears, door, events.clone()).map_err(ChildError::System)?;
    beat(events.clone(), Arc::clone(&loaded)).map_err(ChildError::System)?;

    let progress = events.clone();
    let engine = Engine::start_with(config, Some(Arc::new(grants)), &move |percent| {
        // Every twentieth part is enough for a status.
        if percent.is_multiple_of(5) {
            let _ = progress.say(&RunnerEvent::Loading { percent });
        }
    })?;
    // Set once, here.
    let _ = loaded.set(engine.clone());
    // One thread moves tokens: of two, each wakes the other for every token, and the model computes on the same cores.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(ChildError::System)?;
    let result = runtime.block_on(serve_engine(config, engine, events, orphaned));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Says every two seconds how the engine is, from now on; the engine comes later.
fn beat(events: Events, engine: Arc<OnceLock<Engine>>) -> io::Result<()> {
    thread::Builder::new().name("heartbeat".to_owned()).spawn(move || {
        loop {
            // An agent that cannot be told is gone, which another thread sees to.
            let _ = events.say(&pulse(engine.get()));
            thread::sleep(HEARTBEAT);
        }
    })?;
    Ok(())
}

/// How the engine is now.
fn pulse(engine: Option<&Engine>) -> RunnerEvent {
    let (step, seconds) = engine.map_or((0, 0), |engine| {
        let stats = engine.stats();
        (stats.steps, stats.step_age.as_secs())
    });
    RunnerEvent::Heartbeat { step, seconds, held_bytes: cgroup::held_bytes().unwrap_or(0) }
}

/// The agent holds the other end of standard input for as long as it lives, and writes commands to it.
/// One that is gone may be followed by another, which comes in by the door.
fn watch_agent(orphaned: watch::Sender<bool>, ears: Ears, door: Option<Door>, events: Events) -> io::Result<()> {
    thread::Builder::new().name("agent-watch".to_owned()).spawn(move || {
        ears.hear();
        while door.as_ref().is_some_and(Door::wait) {
            tracing::info!("another agent has taken over");
            events.repeat();
            ears.hear();
        }
        orphaned.send_replace(true);
        // Also out of a load or a step that takes long: nobody is there to use it.
        thread::sleep(ORPHAN_GRACE);
        tracing::warn!("the agent is gone, and the worker does not end by itself");
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    })?;
    Ok(())
}

/// Where commands go.
struct Ears {
    answers: SyncSender<RunnerCommand>,
    /// Once it is loaded.
    engine: Arc<OnceLock<Engine>>,
}

impl Ears {
    /// Takes commands until there is nobody to give any.
    fn hear(&self) {
        loop {
            let mut line = String::new();
            match io::stdin().lock().take(CONFIG_BYTES).read_line(&mut line) {
                Ok(0) => return,
                Ok(_) => match serde_json::from_str(&line) {
                    Ok(RunnerCommand::Shrink) => {
                        if let Some(engine) = self.engine.get() {
                            engine.shrink(0);
                        }
                    }
                    // A full queue means that nobody waits for answers.
                    Ok(answer @ RunnerCommand::Growth { .. }) => drop(self.answers.try_send(answer)),
                    Err(error) => tracing::warn!(%error, "the agent said something that is no command"),
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

async fn serve_engine(
    config: &RunnerConfig,
    engine: Engine,
    events: &Events,
    mut orphaned: watch::Receiver<bool>,
) -> Result<(), ChildError> {
    let listener = bind(config)?;
    let router =
        crate::api::router(crate::api::ApiState::new(engine.clone(), config, crate::api::ApiOptions::default())?);
    let mut terminate = signal(SignalKind::terminate()).map_err(ChildError::System)?;
    let (stop_sender, mut stop) = watch::channel(false);
    let server = tokio::spawn({
        let stopped = async move {
            let _ = stop.wait_for(|stop| *stop).await;
        };
        async move { axum::serve(Listener(listener), router).with_graceful_shutdown(stopped).await }
    });
    events.say(&RunnerEvent::Ready(engine.report()))?;
    let reporter = tokio::spawn(report(engine.clone(), events.clone()));

    let mut orphaned_meanwhile = orphaned.clone();
    let drain = Duration::from_secs(u64::try_from(config.traffic.request_timeout_seconds).unwrap_or(0));
    let result = tokio::select! {
        failed = engine.ended() => failed.map_err(ChildError::from),
        _ = orphaned.wait_for(|gone| *gone) => {
            tracing::info!("the agent is gone");
            end(&engine, Duration::ZERO).await;
            Ok(())
        }
        _ = terminate.recv() => {
            tracing::info!("draining");
            tokio::select! {
                () = end(&engine, drain) => {}
                // A second signal, or nobody left to drain for.
                _ = terminate.recv() => end(&engine, Duration::ZERO).await,
                _ = orphaned_meanwhile.wait_for(|gone| *gone) => end(&engine, Duration::ZERO).await,
            }
            Ok(())
        }
        error = reporting(reporter) => Err(error),
    };
    stop_sender.send_replace(true);
    // The engine has ended, so what is left are last bytes; a client that does not read them cannot hold us up.
    if tokio::time::timeout(Duration::from_secs(2), server).await.is_err() {
        tracing::warn!("a connection was still open");
    }
    let _ = std::fs::remove_file(&config.socket);
    result
}

async fn end(engine: &Engine, time: Duration) {
    let engine = engine.clone();
    let deadline = Instant::now() + time;
    if tokio::task::spawn_blocking(move || engine.shutdown(deadline)).await.is_err() {
        tracing::error!("the shutdown panicked");
    }
}

async fn reporting(reporter: tokio::task::JoinHandle<ChildError>) -> ChildError {
    reporter.await.unwrap_or_else(|error| ChildError::System(io::Error::other(error)))
}

/// Tells the agent of every change; ends only when the agent cannot be told.
async fn report(engine: Engine, events: Events) -> ChildError {
    let mut reports = engine.watch();
    let mut activity = engine.activity();
    reports.mark_unchanged();
    let mut told = Activity::default();
    let mut next = tokio::time::Instant::now();
    loop {
        let now = *activity.borrow_and_update();
        let crossed = (told.running + told.waiting == 0) != (now.running + now.waiting == 0);
        if now != told && (crossed || tokio::time::Instant::now() >= next) {
            let Activity { running, waiting } = now;
            if let Err(error) = events.say(&RunnerEvent::Activity { running, waiting }) {
                return error;
            }
            told = now;
            next = tokio::time::Instant::now() + ACTIVITY_PAUSE;
        }
        tokio::select! {
            changed = activity.changed() => if changed.is_err() { std::future::pending::<()>().await },
            () = tokio::time::sleep_until(next), if now != told => {}
            changed = reports.changed() => {
                if changed.is_err() {
                    // The engine has ended; whoever waits for that acts.
                    std::future::pending::<()>().await;
                }
                let report = reports.borrow_and_update().clone();
                // First what is held now: what was held before counts beside what is reported.
                for event in [pulse(Some(&engine)), RunnerEvent::Changed(report)] {
                    if let Err(error) = events.say(&event) {
                        return error;
                    }
                }
            }
        }
    }
}

/// Only this user may connect, from the first moment on.
fn bind(config: &RunnerConfig) -> Result<UnixListener, ChildError> {
    let path = &config.socket;
    let failed = |source| ChildError::Socket { path: path.display().to_string(), source };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        Ok(()) | Err(_) => {}
    }
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    bound.map_err(failed)
}

//! Watches one worker from its start to its end.

use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::io::BufReader;
use tokio::process::{Child, ChildStderr, ChildStdout};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::lines::{Tail, next_line};
use super::log;
use super::protocol::{RunnerConfig, RunnerEvent, RunnerFailure};
use super::spawn::{Runner, SpawnError, describe};

/// How long a worker that has exited may keep its pipes open (through children of its own).
const PIPES_GRACE: Duration = Duration::from_secs(2);

/// Number of a worker, unique in the life of an agent.
pub type WorkerId = u64;

/// What a worker did.
#[derive(Debug)]
pub struct WorkerMessage {
    /// Which one.
    pub worker: WorkerId,
    /// What.
    pub what: WorkerDid,
}

/// What a worker did.
#[derive(Debug)]
pub enum WorkerDid {
    /// It said something.
    Said(RunnerEvent),
    /// It is gone; nothing follows.
    Ended(WorkerEnd),
}

/// How a worker ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerEnd {
    /// "exited with code 1" or "was killed by SIGKILL".
    pub how: String,
    /// Why, when it said so itself.
    pub failure: Option<RunnerFailure>,
    /// The end of its log.
    pub last_lines: String,
}

/// A worker's process, for stopping it. Dropping it kills the worker.
#[derive(Debug)]
pub struct WorkerHandle {
    stop: watch::Sender<Option<Instant>>,
}

impl WorkerHandle {
    /// SIGTERM now, SIGKILL at `kill_at`. Called again, the earlier time counts.
    pub fn stop(&self, kill_at: std::time::Instant) {
        let kill_at = Instant::from_std(kill_at);
        self.stop.send_if_modified(|stop| {
            let earlier = stop.is_none_or(|at| kill_at < at);
            if earlier {
                *stop = Some(kill_at);
            }
            earlier
        });
    }
}

/// A handle and the future that must be run until the worker has ended.
///
/// The future sends what the worker does to `messages`, [`WorkerDid::Ended`] last, always.
pub fn supervise(
    runner: Runner,
    worker: WorkerId,
    config: RunnerConfig,
    messages: mpsc::Sender<WorkerMessage>,
) -> (WorkerHandle, impl Future<Output = ()> + Send) {
    let (stop, stopped) = watch::channel(None);
    let run = async move {
        let label = format!("{}/{}", config.namespace, config.name);
        let end = match runner.start(&config).await {
            Ok(child) => watch_child(child, worker, &label, &messages, stopped).await,
            Err(error) => not_started(&error),
        };
        if let Err(error) = std::fs::remove_file(&config.socket)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(socket = %config.socket.display(), %error, "cannot remove the socket of a worker that ended");
        }
        // Nobody to tell means that the agent is ending.
        let _ = messages.send(WorkerMessage { worker, what: WorkerDid::Ended(end) }).await;
    };
    (WorkerHandle { stop }, run)
}

fn not_started(error: &SpawnError) -> WorkerEnd {
    let mut message = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        message = format!("{message}: {source}");
    }
    let failure = RunnerFailure { reason: error.reason().to_owned(), message };
    WorkerEnd { how: "was not started".to_owned(), failure: Some(failure), last_lines: String::new() }
}

async fn watch_child(
    mut child: Child,
    worker: WorkerId,
    label: &str,
    messages: &mpsc::Sender<WorkerMessage>,
    mut stopped: watch::Receiver<Option<Instant>>,
) -> WorkerEnd {
    // The worker ends when this does: held open until we want that.
    let stdin = child.stdin.take();
    let events = read_events(child.stdout.take(), worker, messages);
    let log = read_log(child.stderr.take(), label, worker);
    let mut pipes = std::pin::pin!(async { tokio::join!(events, log) });
    let mut outputs = None;

    let status = {
        let ended = wait_or_stop(&mut child, worker, &mut stopped);
        let mut ended = std::pin::pin!(ended);
        loop {
            tokio::select! {
                status = &mut ended => break status,
                read = &mut pipes, if outputs.is_none() => outputs = Some(read),
            }
        }
    };
    drop(stdin);
    // What it wrote before it ended is still in the pipes.
    let (failure, tail) = match outputs {
        Some(outputs) => outputs,
        None => tokio::time::timeout(PIPES_GRACE, &mut pipes).await.unwrap_or_default(),
    };
    let how = match status {
        Ok(status) => describe(status),
        Err(error) => format!("cannot be waited for ({error})"),
    };
    WorkerEnd { how, failure, last_lines: tail.text() }
}

async fn wait_or_stop(
    child: &mut Child,
    worker: WorkerId,
    stopped: &mut watch::Receiver<Option<Instant>>,
) -> std::io::Result<ExitStatus> {
    // An error means that the handle is gone, and with it everybody who wants this worker.
    let asked = tokio::select! {
        status = child.wait() => return status,
        asked = stopped.wait_for(Option::is_some) => asked.is_ok(),
    };
    if asked {
        terminate(child, worker);
        loop {
            let kill_at = stopped.borrow_and_update().unwrap_or_else(Instant::now);
            tokio::select! {
                status = child.wait() => return status,
                () = tokio::time::sleep_until(kill_at) => break,
                changed = stopped.changed() => if changed.is_err() { break },
            }
        }
    }
    tracing::warn!(worker, "worker has not ended in time and is killed");
    child.start_kill()?;
    child.wait().await
}

fn terminate(child: &Child, worker: WorkerId) {
    let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) else { return };
    // The child has not been waited for, so the number is still its own.
    if let Err(error) = rustix::process::kill_process(pid, Signal::TERM) {
        tracing::warn!(worker, %error, "cannot signal worker");
    }
}

async fn read_events(
    stdout: Option<ChildStdout>,
    worker: WorkerId,
    messages: &mpsc::Sender<WorkerMessage>,
) -> Option<RunnerFailure> {
    let mut reader = BufReader::new(stdout?);
    let mut failure = None;
    loop {
        let line = match next_line(&mut reader).await {
            Ok(Some(line)) => line,
            Ok(None) => return failure,
            Err(error) => {
                tracing::warn!(worker, %error, "cannot read what a worker reports");
                return failure;
            }
        };
        match serde_json::from_str(&line) {
            Ok(RunnerEvent::Failed(why)) => failure = Some(why),
            Ok(event) => {
                if messages.send(WorkerMessage { worker, what: WorkerDid::Said(event) }).await.is_err() {
                    return failure;
                }
            }
            Err(error) => tracing::warn!(worker, %error, line, "worker reports something that is no event"),
        }
    }
}

async fn read_log(stderr: Option<ChildStderr>, label: &str, worker: WorkerId) -> Tail {
    let mut tail = Tail::default();
    let Some(stderr) = stderr else { return tail };
    let mut reader = BufReader::new(stderr);
    while let Ok(Some(line)) = next_line(&mut reader).await {
        log::pass_on(&line, label, worker, &mut tail);
    }
    tail
}

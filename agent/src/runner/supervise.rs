//! Watches one worker from its start to its end.

use std::time::Duration;

use tokio::io::{AsyncWriteExt, BufReader};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::adopt::{self, Handover, Record};
use super::lines::{Tail, next_line};
use super::log;
use super::process::{Input, Life, Output, Process};
use super::protocol::{RunnerCommand, RunnerEvent, RunnerFailure};
use super::spawn::{Runner, SpawnError};

/// How long a worker that has exited may keep its pipes open (through children of its own).
const PIPES_GRACE: Duration = Duration::from_secs(2);

/// Commands that a worker has not read yet.
const COMMANDS: usize = 16;

/// How long a worker may be silent, and how long one step of its engine may take, before it is taken to hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Without a heartbeat, which comes every two seconds.
    pub silence: Duration,
    /// In one step.
    pub step: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { silence: Duration::from_secs(30), step: Duration::from_mins(10) }
    }
}

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
    end: watch::Sender<Option<RunnerFailure>>,
    heart: watch::Receiver<Beat>,
    commands: mpsc::Sender<RunnerCommand>,
}

impl WorkerHandle {
    /// Tells the worker something. One that does not read what it is told hears no more of it.
    pub fn tell(&self, command: RunnerCommand) {
        let _ = self.commands.try_send(command);
    }

    /// Bytes of host memory that it held at its last heartbeat, mapped weights left out.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.heart.borrow().held_bytes
    }

    /// SIGKILL now: it has failed, as `why` says.
    pub fn end(&self, why: RunnerFailure) {
        self.end.send_replace(Some(why));
    }

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
///
/// The worker is started with the record's configuration, or where it runs already taken over from a dead agent.
pub fn supervise(
    runner: Runner,
    record: Record,
    start: Start,
    messages: mpsc::Sender<WorkerMessage>,
) -> (WorkerHandle, impl Future<Output = ()> + Send) {
    let (stop, stopped) = watch::channel(None);
    let (end, ended) = watch::channel(None);
    let (beats, heart) = watch::channel(Beat { heard: Instant::now(), step: 0, seconds: 0, held_bytes: 0 });
    let (commands, told) = mpsc::channel(COMMANDS);
    let run = async move {
        let (worker, config) = (record.worker, &record.config);
        let label = format!("{}/{}", config.namespace, config.name);
        let process = match start {
            Start::New => start_new(&runner, &record).await,
            Start::Running(handover) => handover.0.process().map_err(SpawnError::Start),
        };
        let end = match process {
            Ok(process) => {
                let watched = Watched { worker, label: &label, patience: runner.patience() };
                beats.send_modify(|beat| beat.heard = Instant::now());
                let orders = Orders { stopped, ended, told };
                watch_process(process, watched, &messages, orders, &beats).await
            }
            Err(error) => not_started(&error),
        };
        adopt::clean_up(&config.socket);
        // Nobody to tell means that the agent is ending.
        let _ = messages.send(WorkerMessage { worker, what: WorkerDid::Ended(end) }).await;
    };
    (WorkerHandle { stop, end, heart, commands }, run)
}

/// How a worker comes under supervision.
pub enum Start {
    /// As a new process.
    New,
    /// It runs: a dead agent has left it.
    Running(TakenOver),
}

/// A worker whose pipes are ours now.
pub struct TakenOver(Handover);

/// Takes over the worker of a record that a dead agent has left. Blocking, for milliseconds.
pub fn take_over(record: &Record) -> std::io::Result<TakenOver> {
    adopt::take_over(&record.config.socket).map(TakenOver)
}

async fn start_new(runner: &Runner, record: &Record) -> Result<Process, SpawnError> {
    // Only then can another agent find it.
    if adopt::init().is_some() {
        adopt::write(record).await.map_err(SpawnError::Configure)?;
    }
    runner.start(&record.config).await.map(Process::of)
}

fn not_started(error: &SpawnError) -> WorkerEnd {
    let mut message = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        message = format!("{message}: {source}");
    }
    let failure = RunnerFailure { reason: error.reason().to_owned(), message };
    WorkerEnd { how: "was not started".to_owned(), failure: Some(failure), last_lines: String::new() }
}

/// Which worker is watched, and with how much patience.
#[derive(Clone, Copy)]
struct Watched<'a> {
    worker: WorkerId,
    label: &'a str,
    patience: Patience,
}

/// What the handle asks for.
struct Orders {
    stopped: watch::Receiver<Option<Instant>>,
    ended: watch::Receiver<Option<RunnerFailure>>,
    told: mpsc::Receiver<RunnerCommand>,
}

/// The engine's last heartbeat.
#[derive(Clone, Copy, Debug)]
struct Beat {
    heard: Instant,
    step: u64,
    seconds: u64,
    held_bytes: u64,
}

async fn watch_process(
    process: Process,
    watched: Watched<'_>,
    messages: &mpsc::Sender<WorkerMessage>,
    orders: Orders,
    heart: &watch::Sender<Beat>,
) -> WorkerEnd {
    let Process { mut life, stdin, stdout, stderr } = process;
    let Watched { worker, label, patience } = watched;
    let Orders { mut stopped, ended, told } = orders;
    let beats = heart.subscribe();
    let events = read_events(stdout, worker, messages, heart);
    let log = read_log(stderr, label, worker);
    let mut pipes = std::pin::pin!(async { tokio::join!(events, log) });
    let mut outputs = None;
    // The worker ends when its standard input does: held open until we want that.
    let mut commands = std::pin::pin!(write_commands(stdin, told));

    let (how, judged) = {
        let failed = async {
            tokio::select! {
                failure = hang(beats, patience) => failure,
                failure = ordered(ended) => failure,
            }
        };
        let mut ended = std::pin::pin!(wait_or_stop(&mut life, worker, &mut stopped, failed));
        loop {
            tokio::select! {
                end = &mut ended => break end,
                read = &mut pipes, if outputs.is_none() => outputs = Some(read),
                () = &mut commands => {}
            }
        }
    };
    // What it wrote before it ended is still in the pipes.
    let (failure, tail) = match outputs {
        Some(outputs) => outputs,
        None => tokio::time::timeout(PIPES_GRACE, &mut pipes).await.unwrap_or_default(),
    };
    WorkerEnd { how, failure: judged.or(failure), last_lines: tail.text() }
}

/// How it ended, and why it was made to where it was.
async fn wait_or_stop(
    life: &mut Life,
    worker: WorkerId,
    stopped: &mut watch::Receiver<Option<Instant>>,
    failed: impl Future<Output = RunnerFailure>,
) -> (String, Option<RunnerFailure>) {
    let mut why = None;
    // An error means that the handle is gone, and with it everybody who wants this worker.
    let asked = tokio::select! {
        how = life.wait() => return (how, None),
        asked = stopped.wait_for(Option::is_some) => asked.is_ok(),
        failure = failed => {
            why = Some(failure);
            false
        }
    };
    if asked {
        life.terminate(worker);
        loop {
            let kill_at = stopped.borrow_and_update().unwrap_or_else(Instant::now);
            tokio::select! {
                how = life.wait() => return (how, None),
                () = tokio::time::sleep_until(kill_at) => break,
                changed = stopped.changed() => if changed.is_err() { break },
            }
        }
    }
    tracing::warn!(worker, reason = why.as_ref().map(|failure| &failure.message), "worker is killed");
    life.kill(worker);
    (life.wait().await, why)
}

/// Resolves when the handle says that the worker is to end.
async fn ordered(mut ended: watch::Receiver<Option<RunnerFailure>>) -> RunnerFailure {
    let failure = ended.wait_for(Option::is_some).await.ok().and_then(|failure| failure.clone());
    match failure {
        Some(failure) => failure,
        // The handle is gone, which ends the worker in another way.
        None => std::future::pending().await,
    }
}

/// Resolves when the heartbeat says that the worker hangs, or is not heard any more.
async fn hang(mut beats: watch::Receiver<Beat>, patience: Patience) -> RunnerFailure {
    let hangs = |message: String| RunnerFailure { reason: "WorkerHung".to_owned(), message };
    loop {
        let Beat { heard, step, seconds, .. } = *beats.borrow_and_update();
        if seconds >= patience.step.as_secs() {
            return hangs(format!("step {} of its engine has taken {seconds} s and does not end", step + 1));
        }
        tokio::select! {
            changed = beats.changed() => if changed.is_err() {
                // It closed its output; its end will follow.
                std::future::pending::<()>().await;
            },
            () = tokio::time::sleep_until(heard + patience.silence) => {
                let silence = patience.silence.as_secs();
                return hangs(format!("nothing was heard of it for {silence} s: its process is stopped or hangs"));
            }
        }
    }
}

/// Ends only with an error of the pipe, and then never: the input stays open.
async fn write_commands(mut stdin: Option<Input>, mut told: mpsc::Receiver<RunnerCommand>) {
    while let Some(command) = told.recv().await {
        let (Some(input), Ok(mut line)) = (stdin.as_mut(), serde_json::to_vec(&command)) else { break };
        line.push(b'\n');
        if input.write_all(&line).await.is_err() || input.flush().await.is_err() {
            break;
        }
    }
    std::future::pending::<()>().await;
}

async fn read_events(
    stdout: Option<Output>,
    worker: WorkerId,
    messages: &mpsc::Sender<WorkerMessage>,
    heart: &watch::Sender<Beat>,
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
            Ok(RunnerEvent::Heartbeat { step, seconds, held_bytes }) => {
                heart.send_replace(Beat { heard: Instant::now(), step, seconds, held_bytes });
            }
            Ok(event) => {
                if messages.send(WorkerMessage { worker, what: WorkerDid::Said(event) }).await.is_err() {
                    return failure;
                }
            }
            Err(error) => tracing::warn!(worker, %error, line, "worker reports something that is no event"),
        }
    }
}

async fn read_log(stderr: Option<Output>, label: &str, worker: WorkerId) -> Tail {
    let mut tail = Tail::default();
    let Some(stderr) = stderr else { return tail };
    let mut reader = BufReader::new(stderr);
    while let Ok(Some(line)) = next_line(&mut reader).await {
        log::pass_on(&line, label, worker, &mut tail);
    }
    tail
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Beats: (milliseconds after the one before, step, seconds in it).
    async fn judged(beats: &[(u64, u64, u64)], patience: Patience) -> String {
        let (heart, seen) = watch::channel(Beat { heard: Instant::now(), step: 0, seconds: 0, held_bytes: 0 });
        let tell = async {
            for (after, step, seconds) in beats {
                tokio::time::sleep(Duration::from_millis(*after)).await;
                heart.send_replace(Beat { heard: Instant::now(), step: *step, seconds: *seconds, held_bytes: 0 });
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            failure = hang(seen, patience) => failure.message,
            () = tell => String::new(),
        }
    }

    #[tokio::test]
    async fn a_heartbeat_that_stops_or_a_step_that_does_not_end_is_a_hang() {
        let patience = Patience { silence: Duration::from_secs(2), step: Duration::from_secs(20) };
        let silent = judged(&[(20, 1, 0), (30, 9, 3)], patience).await;
        assert_eq!(silent, "nothing was heard of it for 2 s: its process is stopped or hangs");
        let patience = Patience { silence: Duration::from_mins(10), ..patience };
        let slow = judged(&[(1, 6, 18), (1, 6, 19), (1, 6, 21), (1, 6, 23)], patience).await;
        assert!(slow.starts_with("step 7 of its engine has taken 2") && slow.ends_with("does not end"), "{slow}");
    }
}

//! Starts this binary as `runner`: a worker that stays, or a child that answers one question and ends.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use super::lines::{Tail, next_line};
use super::log;
use super::protocol::{EstimateReport, ProbeReport, ProbedDevice, RunnerConfig, RunnerEvent, RunnerFailure};
use super::spare::{self, Spare};
use super::supervise::Patience;

/// Most bytes that a child may answer.
const MAX_ANSWER_BYTES: u64 = 1024 * 1024;

/// No driver takes more for a process; a greater difference is another process's doing (4 GiB).
const MAX_PROCESS_BYTES: u64 = 4 << 30;

/// Why a child could not be started or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The system did not start it.
    #[error("cannot start a runner process")]
    Start(#[source] std::io::Error),
    /// Its configuration could not be handed over.
    #[error("cannot hand a runner process its configuration")]
    Configure(#[source] std::io::Error),
    /// It said itself why it could not answer.
    #[error("{}", .0.message)]
    Refused(RunnerFailure),
    /// It ended without an answer.
    #[error("the runner process {how} without an answer{}", after(.last_lines))]
    Ended {
        /// Exit code or signal.
        how: String,
        /// The end of its log.
        last_lines: String,
    },
    /// It took too long and was killed.
    #[error("the runner process did not answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    /// It answered with something else.
    #[error("the runner process gave an answer that cannot be read")]
    Answer(#[source] serde_json::Error),
}

impl SpawnError {
    /// In CamelCase, for a status.
    #[must_use]
    pub fn reason(&self) -> &str {
        match self {
            Self::Refused(failure) => &failure.reason,
            Self::Start(_) | Self::Configure(_) => "RunnerNotStarted",
            Self::Ended { .. } | Self::Answer(_) => altiplano_crds::conditions::reasons::LOAD_FAILED,
            Self::TimedOut(_) => "RunnerTimedOut",
        }
    }
}

fn after(last_lines: &str) -> String {
    if last_lines.is_empty() { String::new() } else { format!(": {last_lines}") }
}

/// How to start runners.
#[derive(Clone, Debug)]
pub struct Runner {
    executable: PathBuf,
    patience: Patience,
    spare: Spare,
}

impl Runner {
    /// Runners are this very binary.
    pub fn current() -> std::io::Result<Self> {
        std::env::current_exe().map(Self::of)
    }

    /// Runners are the `altiplano-agent` at this path.
    #[must_use]
    pub fn of(executable: PathBuf) -> Self {
        Self { executable, patience: Patience::default(), spare: Spare::default() }
    }

    /// With another patience for workers that seem to hang.
    #[must_use]
    pub fn with_patience(self, patience: Patience) -> Self {
        Self { patience, ..self }
    }

    /// With workers that seem to hang.
    pub(super) fn patience(&self) -> Patience {
        self.patience
    }

    /// The devices, as llama.cpp sees them.
    pub async fn probe(&self, timeout: Duration) -> Result<ProbeReport, SpawnError> {
        self.ask(command(&self.executable, Some("--probe")), None::<&()>, timeout).await
    }

    /// The same devices, with what is free of them now: without opening them, where the driver's library knows.
    pub async fn look(&self, known: &ProbeReport, timeout: Duration) -> Result<ProbeReport, SpawnError> {
        self.ask(command(&self.executable, Some("--look")), Some(known), timeout).await
    }

    /// Bytes that a process takes of each GPU by opening it: what is free while another holds it open, less what was free
    /// before.
    pub async fn process_bytes(&self, timeout: Duration) -> Result<BTreeMap<String, u64>, SpawnError> {
        let measured = async {
            let mut command = command(&self.executable, Some("--probe"));
            // It stays until its standard input ends.
            let mut holder = command.arg("--stay").spawn().map_err(SpawnError::Start)?;
            let mut first = Vec::new();
            if let Some(stdout) = holder.stdout.take() {
                let mut stdout = BufReader::new(stdout.take(MAX_ANSWER_BYTES));
                stdout.read_until(b'\n', &mut first).await.map_err(SpawnError::Start)?;
            }
            let first: ProbeReport = serde_json::from_slice(&first).map_err(SpawnError::Answer)?;
            let second = self.probe(timeout).await?;
            drop(holder.stdin.take());
            holder.wait().await.map_err(SpawnError::Start)?;
            Ok(first
                .devices
                .iter()
                .filter(|device| device.kind == "GPU")
                .filter_map(|one| {
                    // Two that did not look in the same way cannot be compared.
                    let alike = |other: &&ProbedDevice| other.id == one.id && other.unopened == one.unopened;
                    let other = second.devices.iter().find(alike)?;
                    let free = |device: &ProbedDevice| device.memory_free_bytes.min(device.memory_total_bytes);
                    Some((one.id.clone(), free(one).saturating_sub(free(other)).min(MAX_PROCESS_BYTES)))
                })
                .collect())
        };
        tokio::time::timeout(timeout, measured).await.unwrap_or(Err(SpawnError::TimedOut(timeout)))
    }

    /// The memory that a worker with this configuration would take.
    pub async fn estimate(&self, config: &RunnerConfig, timeout: Duration) -> Result<EstimateReport, SpawnError> {
        self.ask(command(&self.executable, Some("--estimate")), Some(config), timeout).await
    }

    /// Has a spare runner started in a moment, for the next load.
    pub fn prepare_spare(&self) {
        let executable = self.executable.clone();
        self.spare.prepare(spare::PAUSE, move || command(&executable, None));
    }

    /// Ends the spare runner: its memory is needed.
    pub fn end_spare(&self) {
        self.spare.end();
    }

    /// Ends the spare runner, and starts none again.
    pub fn close_spare(&self) {
        self.spare.close();
    }

    /// Hands the spare runner its configuration, or starts a worker.
    pub(super) async fn start(&self, config: &RunnerConfig) -> Result<Child, SpawnError> {
        let spare = self.spare.take();
        self.prepare_spare();
        if let Some(mut child) = spare {
            match configure(&mut child, config).await {
                Ok(()) => return Ok(child),
                // It has ended just now.
                Err(error) => tracing::warn!(%error, "the spare runner does not listen; another one is started"),
            }
        }
        let mut child = command(&self.executable, None).spawn().map_err(SpawnError::Start)?;
        configure(&mut child, config).await.map_err(SpawnError::Configure)?;
        Ok(child)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        question: Command,
        config: Option<&impl Serialize>,
        timeout: Duration,
    ) -> Result<T, SpawnError> {
        // Dropping the future drops the child, which kills it.
        tokio::time::timeout(timeout, self.ask_patiently(question, config))
            .await
            .unwrap_or(Err(SpawnError::TimedOut(timeout)))
    }

    async fn ask_patiently<T: DeserializeOwned>(
        &self,
        mut question: Command,
        config: Option<&impl Serialize>,
    ) -> Result<T, SpawnError> {
        let mut child = question.spawn().map_err(SpawnError::Start)?;
        // A child that ends before it has read its configuration says why in its log, not in EPIPE.
        let configured = match config {
            Some(config) => configure(&mut child, config).await,
            None => Ok(()),
        };
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let answer = async {
            let mut answer = Vec::new();
            if let Some(stdout) = stdout {
                // What cannot be read is an answer that cannot be parsed.
                let _ = stdout.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).await;
            }
            answer
        };
        let log = async {
            let mut tail = Tail::default();
            if let Some(stderr) = stderr {
                let mut reader = BufReader::new(stderr);
                while let Ok(Some(line)) = next_line(&mut reader).await {
                    log::pass_on(&line, "", 0, &mut tail);
                }
            }
            tail
        };
        let (answer, tail) = tokio::join!(answer, log);
        let status = child.wait().await.map_err(SpawnError::Start)?;
        if let Some(failure) = refusal(&answer) {
            return Err(SpawnError::Refused(failure));
        }
        if !status.success() {
            return Err(SpawnError::Ended { how: describe(status), last_lines: tail.text() });
        }
        configured.map_err(SpawnError::Configure)?;
        serde_json::from_slice(&answer).map_err(SpawnError::Answer)
    }
}

/// A child may answer with the event by which a worker says that it failed.
fn refusal(answer: &[u8]) -> Option<RunnerFailure> {
    let last = answer.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty())?;
    match serde_json::from_slice(last) {
        Ok(RunnerEvent::Failed(failure)) => Some(failure),
        _ => serde_json::from_slice::<RunnerFailure>(last).ok(),
    }
}

fn command(executable: &Path, question: Option<&str>) -> Command {
    let mut command = Command::new(executable);
    command
        .args(["runner", "--log-format", "json"])
        .args(question.map(OsStr::new))
        // GGML forks a debugger on abort otherwise.
        .env("GGML_NO_BACKTRACE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C in a terminal is for the agent, which drains its workers.
        .process_group(0)
        .kill_on_drop(true);
    command
}

async fn configure(child: &mut Child, config: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(config)?;
    line.push(b'\n');
    match child.stdin.as_mut() {
        Some(stdin) => {
            stdin.write_all(&line).await?;
            stdin.flush().await
        }
        None => Err(std::io::ErrorKind::BrokenPipe.into()),
    }
}

/// "exited with code 3" or "was killed by SIGKILL".
#[must_use]
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => {
            let name = match signal {
                4 => "SIGILL",
                6 => "SIGABRT",
                7 => "SIGBUS",
                8 => "SIGFPE",
                9 => "SIGKILL",
                11 => "SIGSEGV",
                15 => "SIGTERM",
                _ => return format!("was killed by signal {signal}"),
            };
            format!("was killed by {name}")
        }
        (None, None) => "ended".to_owned(),
    }
}

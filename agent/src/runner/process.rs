//! A worker's process: a child of this agent, or one that a dead agent left behind.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::process::Child;

use super::spawn::describe;
use super::supervise::WorkerId;

/// Written by the agent.
pub(super) type Input = Box<dyn AsyncWrite + Send + Unpin>;

/// Read by the agent.
pub(super) type Output = Box<dyn AsyncRead + Send + Unpin>;

/// A process and the agent's ends of its pipes.
pub(super) struct Process {
    pub(super) life: Life,
    pub(super) stdin: Option<Input>,
    pub(super) stdout: Option<Output>,
    pub(super) stderr: Option<Output>,
}

impl Process {
    pub(super) fn of(mut child: Child) -> Self {
        Self {
            stdin: child.stdin.take().map(|stdin| Box::new(stdin) as Input),
            stdout: child.stdout.take().map(|stdout| Box::new(stdout) as Output),
            stderr: child.stderr.take().map(|stderr| Box::new(stderr) as Output),
            life: Life::Child(child),
        }
    }
}

/// What ends.
pub(super) enum Life {
    /// A child; tokio waits for it by its pidfd.
    Child(Child),
    /// A stranger's child, known by its pidfd.
    Adopted {
        /// Readable when the process has ended.
        pidfd: AsyncFd<OwnedFd>,
        /// Where `init` writes how it ended.
        obituary: PathBuf,
    },
}

/// How long `init` may take to write how a process ended.
const OBITUARY: Duration = Duration::from_millis(500);

impl Life {
    /// Waits for the end and says how it was.
    pub(super) async fn wait(&mut self) -> String {
        match self {
            Self::Child(child) => match child.wait().await {
                Ok(status) => describe(status),
                Err(error) => format!("cannot be waited for ({error})"),
            },
            Self::Adopted { pidfd, obituary } => {
                if let Err(error) = pidfd.readable().await {
                    return format!("cannot be waited for ({error})");
                }
                let deadline = tokio::time::Instant::now() + OBITUARY;
                loop {
                    match tokio::fs::read_to_string(&*obituary).await {
                        Ok(text) => {
                            let _ = tokio::fs::remove_file(&*obituary).await;
                            return text;
                        }
                        Err(_) if tokio::time::Instant::now() < deadline => {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                        Err(_) => return "ended".to_owned(),
                    }
                }
            }
        }
    }

    pub(super) fn terminate(&self, worker: WorkerId) {
        self.signal(Signal::TERM, worker);
    }

    pub(super) fn kill(&self, worker: WorkerId) {
        self.signal(Signal::KILL, worker);
    }

    fn signal(&self, signal: Signal, worker: WorkerId) {
        let sent = match self {
            Self::Child(child) => match child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
                // It has not been waited for, so the number is still its own.
                Some(pid) => rustix::process::kill_process(pid, signal),
                None => Ok(()),
            },
            Self::Adopted { pidfd, .. } => rustix::process::pidfd_send_signal(pidfd, signal),
        };
        if let Err(error) = sent {
            tracing::warn!(worker, %error, "cannot signal worker");
        }
    }
}

//! Workers that outlive their agent, and the agent that takes them over.
//!
//! Below `altiplano-agent init` a worker whose standard input ends does not end with it: it waits for another agent on
//! a control socket beside its own, for as long as `init` lives and for half a minute at most. The new agent connects
//! and sends three ends of pipes, which become the worker's standard input, output and error; then the worker says
//! again what it has said, and everything is as before. What the agent must know of the worker lies in a file beside
//! the sockets. Nothing is loaded again.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use altiplano_crds::model_node::ModelAssignment;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;

use super::process::{Input, Life, Output, Process};
use super::protocol::RunnerConfig;
use super::supervise::WorkerId;
use crate::ledger::Need;

/// Environment variable with the number of the `init` process that the agent and its workers live below.
pub const INIT: &str = "ALTIPLANO_INIT";

/// Environment variable with the directory where `init` writes how orphans ended.
pub const OBITUARIES: &str = "ALTIPLANO_OBITUARIES";

/// How long a worker waits for another agent.
const ORPHANED: Duration = Duration::from_secs(30);

/// Standard input, output and error.
const STREAMS: usize = 3;

/// What an agent must know of a worker that it did not start.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Its number.
    pub worker: WorkerId,
    /// What it was started with.
    pub config: RunnerConfig,
    /// The model in it, as it was wanted then.
    pub assignment: ModelAssignment,
    /// Bytes that the dry run predicted.
    pub predicted: Need,
    /// What people should know about where it runs.
    pub note: Option<String>,
}

/// The `init` that this process lives below.
#[must_use]
pub fn init() -> Option<Pid> {
    std::env::var(INIT).ok()?.parse().ok().and_then(Pid::from_raw)
}

/// Resolves when `init` has died; never without one.
pub async fn init_died() {
    if let Some(init) = init()
        && let Ok(pidfd) = pidfd_open(init, PidfdFlags::NONBLOCK).map_err(io::Error::from).and_then(watched)
    {
        // An error means that the kernel cannot tell; then the pod's end is what ends us.
        if pidfd.readable().await.is_ok() {
            return;
        }
    }
    std::future::pending::<()>().await;
}

fn watched(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(deprecated, reason = "the AsyncFd owns the descriptor, and nobody closes or changes it meanwhile")]
    AsyncFd::new(pidfd)
}

/// The workers whose files lie in a directory.
pub(crate) fn records(directory: &Path) -> io::Result<Vec<Record>> {
    let mut records = Vec::new();
    for entry in std::fs::read_dir(directory)?.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            match std::fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
                Ok(Ok(record)) => records.push(record),
                Ok(Err(error)) => tracing::warn!(path = %path.display(), %error, "a worker's file cannot be read"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "a worker's file cannot be read"),
            }
        }
    }
    Ok(records)
}

/// Writes a worker's file, before the worker is started.
pub(super) async fn write(record: &Record) -> io::Result<()> {
    let path = file(&record.config.socket);
    let unfinished = path.with_extension("new");
    tokio::fs::write(&unfinished, serde_json::to_vec(record)?).await?;
    tokio::fs::rename(unfinished, path).await
}

/// Removes what belongs to a worker that has ended.
pub(crate) fn clean_up(socket: &Path) {
    for path in [socket.to_owned(), file(socket), door(socket)] {
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove what a worker that ended has left");
        }
    }
}

fn file(socket: &Path) -> PathBuf {
    socket.with_extension("json")
}

fn door(socket: &Path) -> PathBuf {
    socket.with_extension("ctl")
}

/// Takes over the worker that serves on `socket`. Blocks for as long as the kernel needs to connect.
pub(super) fn take_over(socket: &Path) -> io::Result<Handover> {
    let stream = UnixStream::connect(door(socket))?;
    // Of who listens there, that is the worker.
    let pid = rustix::net::sockopt::socket_peercred(&stream)?.pid;
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    let ((its_input, input), (output, its_output), (error, its_error)) = (io::pipe()?, io::pipe()?, io::pipe()?);
    let streams = [its_input.as_fd(), its_output.as_fd(), its_error.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(STREAMS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&streams)) {
        return Err(io::Error::other("no room for three descriptors"));
    }
    rustix::net::sendmsg(&stream, &[IoSlice::new(b"!")], &mut ancillary, SendFlags::empty())?;
    Ok(Handover { pid, pidfd, input: input.into(), output: output.into(), error: error.into() })
}

/// The agent's ends.
pub(super) struct Handover {
    pid: Pid,
    pidfd: OwnedFd,
    input: OwnedFd,
    output: OwnedFd,
    error: OwnedFd,
}

impl Handover {
    /// As a process to watch.
    pub(super) fn process(self) -> io::Result<Process> {
        let Self { pid, pidfd, input, output, error } = self;
        let obituaries = std::env::var_os(OBITUARIES).map_or_else(std::env::temp_dir, PathBuf::from);
        Ok(Process {
            life: Life::Adopted { pidfd: watched(pidfd)?, obituary: obituaries.join(pid.as_raw_nonzero().to_string()) },
            stdin: Some(Box::new(pipe::Sender::from_owned_fd(input)?) as Input),
            stdout: Some(Box::new(pipe::Receiver::from_owned_fd(output)?) as Output),
            stderr: Some(Box::new(pipe::Receiver::from_owned_fd(error)?) as Output),
        })
    }
}

/// The worker's side: where another agent comes in.
pub(super) struct Door {
    listener: UnixListener,
    init: OwnedFd,
}

impl Door {
    /// Opened before the agent can die; `None` where there is no `init`.
    pub(super) fn open(socket: &Path) -> io::Result<Option<Self>> {
        let Some(init) = init() else { return Ok(None) };
        let init = pidfd_open(init, PidfdFlags::empty())?;
        let path = door(socket);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        Ok(Some(Self { listener: UnixListener::bind(path)?, init }))
    }

    /// Waits for another agent and takes its pipes for the standard streams. `false` when none has come in time or
    /// `init` is gone.
    pub(super) fn wait(&self) -> bool {
        let deadline = std::time::Instant::now() + ORPHANED;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let mut fds = [PollFd::new(&self.init, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
            let Ok(left) = Timespec::try_from(left) else { return false };
            match poll(&mut fds, Some(&left)) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(0) | Err(_) => return false,
                Ok(_) => {}
            }
            if !fds[0].revents().is_empty() {
                return false;
            }
            match self.listener.accept().and_then(|(stream, _)| streams(&stream)) {
                Ok(()) => return true,
                // An agent that died while it knocked; there may be a third.
                Err(error) => tracing::warn!(%error, "an agent came and did not take over"),
            }
        }
    }
}

fn streams(stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(STREAMS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let [input, output, error] = fds.as_slice() else {
        return Err(io::Error::other("an agent sends its pipes, and nothing else"));
    };
    rustix::stdio::dup2_stdin(input)?;
    rustix::stdio::dup2_stdout(output)?;
    rustix::stdio::dup2_stderr(error)?;
    Ok(())
}

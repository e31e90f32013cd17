//! `altiplano-agent init ROLE …`: the first process of the agent's container.
//!
//! It starts the agent and starts it again when its process dies. Workers that the dead agent leaves behind become
//! children of this process and go on; the next agent adopts them (`adopt`). This process opens nothing, listens to
//! nothing and decides nothing, so that there is little for it to die of; when it does die, everything below it goes.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{Pid, Signal, WaitOptions};
use tokio::signal::unix::{SignalKind, signal};

use super::adopt::{INIT, OBITUARIES};
use super::spawn::describe;

/// Options of `altiplano-agent init`.
#[derive(Args, Clone, Debug)]
pub struct InitArgs {
    /// What the agent is started with, such as `node --state-dir=/var/lib/altiplano`.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "ROLE")]
    pub command: Vec<OsString>,
}

/// Why this process cannot do its work.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The system refuses what it needs.
    #[error("cannot set up the first process")]
    System(#[source] std::io::Error),
    /// The agent cannot be started.
    #[error("cannot start the agent")]
    Start(#[source] std::io::Error),
}

/// Runs the agent until it ends by itself or by a signal, and again when it dies. Its exit code is ours.
pub async fn run(args: InitArgs) -> Result<ExitCode, InitError> {
    let me = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(me)).map_err(|error| InitError::System(error.into()))?;
    let executable = std::env::current_exe().map_err(InitError::System)?;
    let obituaries = Obituaries::new();
    // Listened for before there is a child to hear of.
    let listen = |kind| signal(kind).map_err(InitError::System);
    let mut child = listen(SignalKind::child())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let mut restarts = Restarts::default();
    let mut stopping = false;
    let code = loop {
        obituaries.renew().map_err(InitError::System)?;
        let agent = start(&executable, &args.command, me, &obituaries.0)?;
        let status = loop {
            tokio::select! {
                _ = child.recv() => if let Some(status) = reap(agent, &obituaries.0) { break status },
                _ = terminate.recv() => { stopping = true; tell(agent, Signal::TERM) }
                _ = interrupt.recv() => { stopping = true; tell(agent, Signal::INT) }
                _ = hangup.recv() => tell(agent, Signal::HUP),
            }
        };
        let code = u8::try_from(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))).unwrap_or(1);
        if stopping || code == 0 {
            break code;
        }
        let Some(pause) = restarts.next(Instant::now()) else {
            tracing::error!("the agent {} again and again; giving up", describe(status));
            break code;
        };
        tracing::error!(?pause, "the agent {}; its workers go on, and it is started again", describe(status));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = terminate.recv() => break code,
            _ = interrupt.recv() => break code,
        }
    };
    Ok(ExitCode::from(code))
}

fn start(executable: &Path, command: &[OsString], me: Pid, obituaries: &Path) -> Result<Pid, InitError> {
    let child = Command::new(executable)
        .args(command)
        .env(INIT, me.as_raw_nonzero().to_string())
        .env(OBITUARIES, obituaries)
        .spawn()
        .map_err(InitError::Start)?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| InitError::Start(std::io::Error::other("a process without a number")))
}

/// The directory in which it is written down how orphans ended. It goes with this process, however that ends but by a
/// signal that nobody can catch.
struct Obituaries(PathBuf);

impl Obituaries {
    fn new() -> Self {
        // Not named after our number: every container's first process has the same one, and some share this directory.
        Self(std::env::temp_dir().join(format!("altiplano-init-{}", uuid::Uuid::new_v4().simple())))
    }

    /// Makes it anew: empty, and for this user only.
    fn renew(&self) -> std::io::Result<()> {
        if let Err(error) = std::fs::remove_dir_all(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error);
        }
        std::fs::DirBuilder::new().mode(0o700).create(&self.0)
    }
}

impl Drop for Obituaries {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Takes in everybody who has ended. The agent's end is returned; how orphans ended is written down for who adopted
/// them.
fn reap(agent: Pid, obituaries: &Path) -> Option<ExitStatus> {
    let mut ended = None;
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        let status = ExitStatus::from_raw(status.as_raw());
        if pid == agent {
            ended = Some(status);
        } else if let Err(error) = write_whole(&obituaries.join(pid.as_raw_nonzero().to_string()), &describe(status)) {
            tracing::warn!(%error, "cannot write down how a process ended");
        }
    }
    ended
}

fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let unfinished = path.with_extension("new");
    std::fs::write(&unfinished, text)?;
    std::fs::rename(unfinished, path)
}

fn tell(agent: Pid, signal: Signal) {
    // It has not been waited for, so the number is still its own.
    if let Err(error) = rustix::process::kill_process(agent, signal) {
        tracing::warn!(%error, "cannot signal the agent");
    }
}

/// When an agent that died is started again: at once, then with doubling pauses; not for ever.
#[derive(Default)]
struct Restarts(VecDeque<Instant>);

impl Restarts {
    /// Deaths within this time count.
    const WINDOW: Duration = Duration::from_mins(5);
    /// So many are too many.
    const MOST: usize = 10;

    fn next(&mut self, now: Instant) -> Option<Duration> {
        while self.0.front().is_some_and(|first| now.saturating_duration_since(*first) > Self::WINDOW) {
            self.0.pop_front();
        }
        self.0.push_back(now);
        let deaths = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        (self.0.len() <= Self::MOST).then(|| match deaths {
            1 => Duration::ZERO,
            more => (Duration::from_millis(50) * 2_u32.saturating_pow(more - 1)).min(Duration::from_secs(5)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_dies_again_and_again_is_given_up() {
        let (mut restarts, now) = (Restarts::default(), Instant::now());
        let pauses: Vec<_> = (0..10).map(|_| restarts.next(now).unwrap().as_millis()).collect();
        assert_eq!(pauses, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(restarts.next(now), None);
        let later = now + Restarts::WINDOW * 2;
        assert_eq!(restarts.next(later), Some(Duration::ZERO), "one that lived is started at once");
    }
}

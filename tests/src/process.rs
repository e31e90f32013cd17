//! Programs that tests start, signal and end.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::{
    sandbox::{self, Mark},
    wait_for,
};

/// A running program in a process group of its own, its output in a file. Dropping it kills it and all that descends
/// from it.
#[derive(Debug)]
pub struct Proc {
    name: String,
    child: Child,
    ended: Option<ExitStatus>,
    mark: Mark,
    log: PathBuf,
}

impl Proc {
    /// Starts `command`; `name` is for logs and errors.
    pub fn start(name: &str, mut command: Command) -> Result<Self> {
        let log = sandbox::subdir("log")?.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("could not create {}", log.display()))?;
        let mark = Mark::put(&mut command)?;
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("could not start {}", command.get_program().display()))?;
        Ok(Self { name: name.to_owned(), child, ended: None, mark, log })
    }

    /// The process id of the program itself.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// All that it has written. Empty if the file cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The last 4 KiB that it has written, for errors.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let read = || -> std::io::Result<String> {
            let mut file = File::open(&self.log)?;
            let start = file.metadata()?.len().saturating_sub(4096);
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let tail = read().unwrap_or_else(|error| error.to_string());
        format!("--- end of {}'s log ---\n{}\n---", self.name, tail.trim_end())
    }

    /// Its exit status, once it has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().with_context(|| format!("could not wait for {}", self.name))?;
        }
        Ok(self.ended)
    }

    /// An error with its last words if it has ended.
    pub fn assert_running(&mut self) -> Result<()> {
        if let Some(status) = self.try_wait()? {
            bail!("{} ended ({status})\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// Waits for its end.
    pub async fn ended(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        let waited = wait_for(what, limit, || std::future::ready(self.try_wait().transpose().ok_or("it runs"))).await;
        match waited {
            Ok(status) => status,
            Err(error) => bail!("{error}\n{}", self.log_tail()),
        }
    }

    /// Sends a signal to the program itself.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.try_wait()?.is_some() {
            bail!("{} has ended and takes no signal", self.name);
        }
        kill_process(Pid::from_child(&self.child), signal).with_context(|| format!("could not signal {}", self.name))
    }

    /// Sends a signal to the program's process group.
    pub fn signal_group(&mut self, signal: Signal) -> Result<()> {
        kill_process_group(Pid::from_child(&self.child), signal)
            .with_context(|| format!("could not signal the group of {}", self.name))
    }

    /// SIGSTOP: it stands still until [`resume`](Self::resume).
    pub fn pause(&mut self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub fn resume(&mut self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// SIGKILL to the program itself; what it started lives on.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::KILL)?;
        let status = self.child.wait().with_context(|| format!("could not wait for {}", self.name))?;
        self.ended = Some(status);
        Ok(status)
    }

    /// SIGTERM, then waits for its end; an error if it takes longer than `limit`.
    pub async fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::TERM)?;
        self.ended(limit).await
    }

    /// The ids of the program and of all living processes that descend from it.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        self.mark.processes().into_iter().map(|pid| pid.as_raw_nonzero().get().unsigned_abs()).collect()
    }

    /// Kills it and all that descends from it.
    pub fn kill_tree(&mut self) {
        if self.ended.is_none() {
            // Killed by the mark as well; this is for a program that changed its own environment.
            let _ = self.child.kill();
            self.ended = self.child.wait().ok();
        }
        self.mark.kill_all();
    }

    /// Resident memory of the program itself in bytes, from the kernel.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS: it has ended")?;
        let kibibytes: u64 = line.split_whitespace().nth(1).context("VmRSS without a number")?.parse()?;
        Ok(kibibytes * 1024)
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        self.kill_tree();
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_mins(1);

    fn shell(script: &str) -> Proc {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Proc::start("shell", command).unwrap()
    }

    #[tokio::test]
    async fn descendants_end_with_it_wherever_they_moved() {
        // A session of its own and a parent that is gone: neither process group nor parent leads to it.
        let mut proc = shell("(setsid sleep 600 &) ; echo started; sleep 600");
        wait_for("three processes", SOON, || {
            let processes = proc.processes();
            std::future::ready(if processes.len() == 3 { Ok(()) } else { Err(format!("{processes:?}")) })
        })
        .await
        .unwrap();
        proc.kill().unwrap();
        assert!(!proc.processes().is_empty(), "kill() is for the program alone");
        proc.kill_tree();
        assert_eq!(proc.processes(), [0; 0]);
        assert!(proc.log().contains("started"));
    }

    #[tokio::test]
    async fn an_early_end_is_told_with_the_last_words() {
        let mut proc = shell("echo no such model >&2; exit 3");
        assert_eq!(proc.ended(SOON).await.unwrap().code(), Some(3));
        let error = proc.assert_running().unwrap_err().to_string();
        assert!(error.contains("no such model") && error.contains('3'), "{error}");
    }

    #[tokio::test]
    async fn what_ignores_sigterm_is_an_error_and_still_ends() {
        let mut proc = shell("trap '' TERM; echo ready; while :; do sleep 1; done");
        wait_for("the trap", SOON, || {
            std::future::ready(if proc.log().contains("ready") { Ok(()) } else { Err("no output") })
        })
        .await
        .unwrap();
        assert!(proc.terminate(Duration::from_millis(300)).await.is_err());
        let pid = proc.pid();
        drop(proc);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}

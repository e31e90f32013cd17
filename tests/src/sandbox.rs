//! What a test leaves behind: nothing.
//!
//! Every process that the harness starts carries a mark in its environment, and so do its descendants, whatever group or
//! session they move to. A watchdog, a small shell in a process group of its own, reads from a pipe that this process
//! holds. When this process ends, in whichever way, the pipe closes; the watchdog then kills all that carry the mark and
//! removes the run's folder.

use std::{
    fs,
    io::Read as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{ChildStdin, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context as _, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process};

const RUN: &str = "ALTIPLANO_TEST_RUN";
const PROC: &str = "ALTIPLANO_TEST_PROC";

/// Arguments: the mark, the folder. The loop ends at end of file. Processes may be forking: it looks again until it finds
/// none.
const WATCHDOG: &str = r#"
trap '' HUP INT TERM
while read -r _; do :; done
rounds=0
while [ $rounds -lt 100 ]; do
    rounds=$((rounds + 1))
    # grep's exit code also tells of what it may not read and of processes that ended meanwhile.
    marked=$(grep -lzxF -e "$1" /proc/[0-9]*/environ 2>/dev/null)
    [ -n "$marked" ] || break
    for file in $marked; do pid=${file#/proc/}; kill -KILL "${pid%/environ}" 2>/dev/null; done
    sleep 0.1
done
rm -rf -- "$2"
"#;

struct Run {
    dir: PathBuf,
    id: String,
    // Never written to: its closing is the message.
    _pipe: ChildStdin,
}

/// The folder of this test run: logs, sockets, data. Removed when this process has ended, unless
/// `ALTIPLANO_KEEP_LOGS` is set.
pub fn dir() -> Result<&'static Path> {
    Ok(&run()?.dir)
}

/// A fresh folder in [`dir`].
pub fn subdir(name: &str) -> Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let dir = dir()?.join(format!("{name}-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir_all(&dir).with_context(|| format!("could not create {}", dir.display()))?;
    Ok(dir)
}

fn run() -> Result<&'static Run> {
    static ONE: OnceLock<Result<Run, String>> = OnceLock::new();
    ONE.get_or_init(|| start().map_err(|error| format!("{error:#}"))).as_ref().map_err(|error| anyhow!("{error}"))
}

fn start() -> Result<Run> {
    let id = random_hex()?;
    // Short, as the paths of Unix sockets end up in it.
    let dir = std::env::temp_dir().join(format!("alti-{}", &id[..8]));
    fs::create_dir_all(&dir).with_context(|| format!("could not create {}", dir.display()))?;
    let removed = if std::env::var_os("ALTIPLANO_KEEP_LOGS").is_some() { Path::new("") } else { &dir };
    let mut watchdog = Command::new("sh")
        .args(["-c", WATCHDOG, "watchdog", &format!("{RUN}={id}")])
        .arg(removed)
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("could not start the watchdog shell")?;
    let pipe = watchdog.stdin.take().context("the watchdog has no pipe")?;
    Ok(Run { dir, id, _pipe: pipe })
}

/// 32 hexadecimal digits that nobody can guess.
pub(crate) fn random_hex() -> Result<String> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes)).context("no randomness")?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// The mark of one started program and of all that descends from it.
#[derive(Clone, Debug)]
pub(crate) struct Mark(String);

impl Mark {
    /// Marks what `command` will start.
    pub(crate) fn put(command: &mut Command) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let run = run()?;
        let mark = format!("{}-{}", run.id, COUNT.fetch_add(1, Ordering::Relaxed));
        command.env(RUN, &run.id).env(PROC, &mark);
        Ok(Self(format!("{PROC}={mark}")))
    }

    /// The living processes that carry the mark, zombies left out.
    pub(crate) fn processes(&self) -> Vec<Pid> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            // A zombie's environment reads as empty.
            .filter(|pid: &i32| {
                let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                environment.split(|byte| *byte == 0).any(|variable| variable == self.0.as_bytes())
            })
            .filter_map(Pid::from_raw)
            .collect()
    }

    /// Kills every process with the mark, and those that they start meanwhile.
    pub(crate) fn kill_all(&self) {
        // Some ten seconds: on a busy machine who is killed ends when it gets its turn.
        for _ in 0..2000 {
            let alive = self.processes();
            if alive.is_empty() {
                return;
            }
            for pid in alive {
                // Gone already is as good.
                let _ = kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        time::Duration,
    };

    use super::*;
    use crate::{Proc, wait_for};

    const VICTIM: &str = "ALTIPLANO_TEST_VICTIM";

    /// This test runs twice: as itself, and in a second process that it kills in the middle of its work.
    #[tokio::test]
    async fn nothing_outlives_a_killed_test() {
        if std::env::var_os(VICTIM).is_some() {
            let mut sleep = Command::new("sleep");
            sleep.arg("600");
            let sleeper = Proc::start("sleep", sleep).unwrap();
            println!("\nvictim {} {}", sleeper.pid(), dir().unwrap().display());
            std::future::pending::<()>().await;
        }
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sandbox::tests::nothing_outlives_a_killed_test", "--nocapture"])
            .env(VICTIM, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        let line = lines.map(Result::unwrap).find(|line| line.starts_with("victim ")).expect("the victim says its pid");
        let words: Vec<_> = line.split(' ').collect();
        let folder = Path::new(words[2]);
        // A zombie has none: in a container nobody may ever ask for its exit code.
        let has_environment = || fs::read(format!("/proc/{}/environ", words[1])).is_ok_and(|bytes| !bytes.is_empty());
        // The program's environment can be read a moment after its start.
        wait_for("what the victim started", Duration::from_mins(1), || {
            let there = (has_environment(), folder.exists());
            std::future::ready(if there == (true, true) { Ok(()) } else { Err(format!("process, folder: {there:?}")) })
        })
        .await
        .unwrap();

        victim.kill().unwrap();
        victim.wait().unwrap();
        wait_for("the end of all that the victim started", Duration::from_mins(1), || {
            let left = (has_environment(), folder.exists());
            std::future::ready(if left == (false, false) { Ok(()) } else { Err(format!("process, folder: {left:?}")) })
        })
        .await
        .unwrap();
    }
}

//! A Vulkan layer that keeps one account of a device's memory over all processes, and a program that holds some of it.
//!
//! Mesa's software driver calls all of its memory free at any time and lets each process have as much as the heap is large.
//! A GPU's driver does neither, so what is to be tested of memory that somebody else holds needs this: programs started with
//! [`Accounts::environment`] share a device as they would share a GPU. Their allocations are the software driver's own;
//! `layer/layer.cpp` says what is added.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

/// Where the layer, its manifest and the holder were built.
const BUILT: &str = env!("OUT_DIR");

/// The variable that names the folder of the accounts.
const FOLDER: &str = "ALTIPLANO_VULKAN_ACCOUNTS";

/// Memory of Vulkan's devices, as the processes with this environment share it.
#[derive(Debug)]
pub struct Accounts {
    folder: TempDir,
}

impl Accounts {
    /// Of devices that nobody uses.
    pub fn new() -> io::Result<Self> {
        if !Path::new(BUILT).join("altiplano_accounts.json").exists() {
            return Err(io::Error::other(
                "the Vulkan layer could not be built: cargo xtask test installs what it needs",
            ));
        }
        Ok(Self { folder: tempfile::tempdir()? })
    }

    /// What a process needs to take part.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, &str); 3] {
        let folder = self.folder.path().to_str().unwrap_or_default();
        [(FOLDER, folder), ("VK_ADD_LAYER_PATH", BUILT), ("VK_INSTANCE_LAYERS", "VK_LAYER_ALTIPLANO_accounts")]
    }

    /// Bytes of the first device's own memory that living processes hold, all together.
    pub fn held(&self) -> io::Result<u64> {
        let mut held = 0;
        for entry in fs::read_dir(self.folder.path())? {
            held += held_by(&entry?.path())?;
        }
        Ok(held)
    }
}

/// Bytes of one process, if it lives: then it has its file locked.
fn held_by(path: &Path) -> io::Result<u64> {
    if path.file_name().is_none_or(|name| !name.to_string_lossy().starts_with("held.")) {
        return Ok(0);
    }
    let file = match File::open(path) {
        // Another process has seen meanwhile that its own is gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        file => file?,
    };
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return Ok(0);
    }
    // Of each heap; the device's own is the first.
    let bytes = fs::read(path).unwrap_or_default();
    Ok(bytes.first_chunk().map_or(0, |first| u64::from_ne_bytes(*first)))
}

/// Another process that holds memory of the first device; it is killed when this is dropped.
#[derive(Debug)]
pub struct Holder {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Holder {
    /// One that holds nothing yet.
    pub fn start(accounts: &Accounts) -> io::Result<Self> {
        let mut child = Command::new(PathBuf::from(BUILT).join("holder"))
            .envs(accounts.environment())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(stdin), Some(stdout)) => Ok(Self { child, stdin, stdout: BufReader::new(stdout) }),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Has it hold so many bytes in all, as far as the driver lets it; those that it holds then, and those that the driver
    /// calls free.
    pub fn hold(&mut self, bytes: u64) -> io::Result<(u64, u64)> {
        writeln!(self.stdin, "{bytes}")?;
        let mut answer = String::new();
        self.stdout.read_line(&mut answer)?;
        let numbers = answer.trim().split_once(' ');
        let numbers = numbers.and_then(|(held, free)| Some((held.parse().ok()?, free.parse().ok()?)));
        numbers.ok_or_else(|| io::Error::other(format!("the holder said {answer:?}")))
    }

    /// Has it hold all but so many bytes; those that it holds then.
    pub fn leave(&mut self, free: u64) -> io::Result<u64> {
        let (held, available) = self.hold(0)?;
        Ok(self.hold((held + available).saturating_sub(free))?.0)
    }

    /// Its process ends by SIGKILL, as any process may.
    pub fn kill(mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It has ended already, or ends now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// What one has taken is not there for the other, whoever asks is told so, and nobody gets more than there is; what a
    /// killed process held is there again at once.
    #[test]
    fn processes_share_a_device() -> io::Result<()> {
        let accounts = Accounts::new()?;
        let (mut one, mut other) = (Holder::start(&accounts)?, Holder::start(&accounts)?);
        let (held, all) = one.hold(0)?;
        assert!(held == 0 && all > 512 * MIB, "{held} {all}");
        assert_eq!(one.hold(300 * MIB)?, (300 * MIB, all - 300 * MIB));
        assert_eq!(other.hold(0)?, (0, all - 300 * MIB), "heapBudget is less by what another holds");
        let (held, free) = other.hold(all)?;
        assert!(held > all - 365 * MIB && held + free + 300 * MIB == all, "{held} of {all}, {free} free");
        assert_eq!(other.leave(7 * MIB)?, all - 307 * MIB);
        assert_eq!(one.hold(400 * MIB)?.0, 300 * MIB);
        assert_eq!(accounts.held()?, all - 7 * MIB);
        assert_eq!(one.hold(128 * MIB)?.1, 179 * MIB, "freed");
        other.kill()?;
        assert_eq!(accounts.held()?, 128 * MIB);
        assert_eq!(one.hold(0)?, (0, all));
        // Another account is another device.
        let elsewhere = Accounts::new()?;
        assert_eq!(one.hold(300 * MIB)?.0, 300 * MIB);
        assert_eq!(Holder::start(&elsewhere)?.hold(0)?, (0, all));
        Ok(())
    }
}

//! Where the workers' sockets are.

use std::path::{Path, PathBuf};

use crate::runner::adopt;

/// A directory for sockets of its own: below `state`, or below the system's where that path is too long for a socket.
/// Agents below one `init` have the same one, so that each finds its predecessor's workers. What dead agents left
/// elsewhere is removed.
pub fn socket_directory(state: &Path) -> std::io::Result<(PathBuf, std::fs::File)> {
    /// Longest directory whose sockets fit into `sun_path` (108 bytes with the end, 24 for the file's name).
    const MAX_DIRECTORY_BYTES: usize = 80;
    let init = adopt::init().and_then(|init| directory_of(init.as_raw_nonzero().get()));
    let name = init.unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string()[..8].to_owned());
    let mut run = state.join("run");
    if run.as_os_str().len() + 1 + name.len() > MAX_DIRECTORY_BYTES {
        run = std::env::temp_dir().join("altiplano");
    }
    std::fs::create_dir_all(&run)?;
    for entry in std::fs::read_dir(&run)?.flatten() {
        // Only one that nobody holds the lock of, nor is about to.
        if !may_be_adopted(&entry.file_name().to_string_lossy())
            && let Ok(lock) = std::fs::File::open(entry.path().join("lock"))
            && rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    let directory = run.join(name);
    {
        use std::os::unix::fs::DirBuilderExt as _;
        match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    let lock = std::fs::File::create(directory.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    Ok((directory, lock))
}

/// Name of the directory of the agents below an `init`: its number and when it was started, by which no later process
/// of that number can be taken for it.
fn directory_of(init: i32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{init}/stat")).ok()?;
    // The program's name may have anything in it, also a parenthesis.
    let (_, fields) = stat.rsplit_once(')')?;
    let started: u64 = fields.split_whitespace().nth(19)?.parse().ok()?;
    Some(format!("i{init}-{started:x}"))
}

/// Whether the directory's `init` still lives, so that another agent may come for what is in it.
fn may_be_adopted(directory: &str) -> bool {
    let init = directory.strip_prefix('i').and_then(|rest| rest.split_once('-')?.0.parse().ok());
    init.and_then(directory_of).is_some_and(|name| name == directory)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FlockOperation, flock};

    use super::*;

    #[test]
    fn what_others_left_or_hold_stops_no_start() {
        let folder = tempfile::tempdir().unwrap();
        let made = |name: &str| {
            let directory = folder.path().join("run").join(name);
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("0.sock"), "").unwrap();
            (std::fs::File::create(directory.join("lock")).unwrap(), directory)
        };
        let ((_, stale), (held, living), (_, orphaned)) = (made("stale"), made("living"), made("i999999999-1"));
        flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
        let (first, first_lock) = socket_directory(folder.path()).unwrap();
        assert!(!stale.exists() && !orphaned.exists(), "what the dead left is gone");
        assert!(living.join("0.sock").exists(), "what another agent uses stays");
        let (second, _second_lock) = socket_directory(folder.path()).unwrap();
        assert!(first != second && first.exists() && second.exists(), "{first:?} {second:?}");
        drop(first_lock);
        socket_directory(folder.path()).unwrap();
        assert!(!first.exists() && second.exists());
    }
}

//! Everything between a machine with Rust, a C++ compiler and Go, and one that runs the tests. A second run finds
//! it all there and does nothing.

mod apt;
mod deny;
mod golang;
mod llama_server;
mod node;
mod python;
mod vulkan;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail};

use crate::command::{find, output};

pub(crate) use deny::{cargo_deny, ensure as ensure_cargo_deny};
pub(crate) use llama_server::{build as llama_server, tests as llama_server_tests};

/// What the tests need: all of it.
pub(crate) fn all() -> Result<()> {
    cluster()?;
    python::clients()?;
    node::clients()?;
    llama_server_tests()
}

/// What the demo and the measurements need: no foreign clients.
pub(crate) fn cluster() -> Result<()> {
    packages()?;
    golang::control_plane()?;
    golang::helm()
}

/// What compiling needs, and nothing that only tests need.
pub(crate) fn packages() -> Result<()> {
    compilers()?;
    apt::packages()?;
    vulkan::headers(Path::new("/usr/local"))
}

/// Rust runs this very program, so only its version can be wrong; llama.cpp needs a C++ compiler.
fn compilers() -> Result<()> {
    output(crate::command::cargo().arg("--version"))
        .context("the Rust toolchain of rust-toolchain.toml is missing: run `rustup toolchain install`")?;
    if ["c++", "g++", "clang++"].iter().all(|name| find(name).is_none()) {
        bail!("a C++ compiler is needed to build llama.cpp: install g++ (Debian and Ubuntu: apt-get install g++)");
    }
    Ok(())
}

/// A step that takes time: says so when it starts and how long it took when it is done.
fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    eprintln!("set-up: {what} …");
    let result = work().with_context(|| format!("set-up failed: {what}"))?;
    eprintln!("set-up: {what}: done in {:.0} s", start.elapsed().as_secs_f32());
    Ok(result)
}

/// Makes the folder `dir` as a whole or not at all, and once: `ready` says whether it is there, `fill` writes it into
/// a temporary folder beside it, which then takes its name. Two set-ups at the same time wait for each other.
fn folder_once(dir: &Path, ready: impl Fn() -> bool, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if ready() {
        return Ok(());
    }
    let parent = dir.parent().context("no parent folder")?;
    fs::create_dir_all(parent).with_context(|| format!("could not create {}", parent.display()))?;
    let beside = |ending: &str| -> PathBuf {
        let mut name = dir.file_name().unwrap_or_default().to_os_string();
        name.push(ending);
        parent.join(name)
    };
    let path = beside(".lock");
    let lock = File::create(&path).with_context(|| format!("could not create {}", path.display()))?;
    lock.lock().with_context(|| format!("could not lock {}", path.display()))?;
    // Another set-up may have been here while this one waited.
    if ready() {
        return Ok(());
    }
    let fresh = beside(".tmp");
    remove(&fresh)?;
    fs::create_dir_all(&fresh).with_context(|| format!("could not create {}", fresh.display()))?;
    fill(&fresh)?;
    remove(dir)?;
    fs::rename(&fresh, dir).with_context(|| format!("could not move {} into place", dir.display()))
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_made_whole_and_once() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tools");
        let ready = || dir.join("tool").is_file();

        let failed = folder_once(&dir, ready, |fresh| {
            fs::write(fresh.join("half"), "")?;
            bail!("no compiler")
        });
        assert!(failed.is_err() && !dir.exists(), "a failed step must leave nothing under the name");

        folder_once(&dir, ready, |fresh| {
            assert!(!fresh.join("half").exists(), "left over from the failed run");
            Ok(fs::write(fresh.join("tool"), "")?)
        })
        .unwrap();
        folder_once(&dir, ready, |_| bail!("done twice")).unwrap();
    }

    #[test]
    fn two_set_ups_at_once_do_the_work_once() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tools");
        let times = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    folder_once(
                        &dir,
                        || dir.join("tool").is_file(),
                        |fresh| {
                            times.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            std::thread::sleep(std::time::Duration::from_millis(50));
                            Ok(fs::write(fresh.join("tool"), "")?)
                        },
                    )
                    .unwrap();
                });
            }
        });
        assert_eq!(times.into_inner(), 1);
    }
}

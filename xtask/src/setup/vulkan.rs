//! Vulkan headers that are new enough for llama.cpp. Debian 12's are not, and Debian 13's are plain header files: they
//! are taken from there, by the machine's own package mirror, and put where compilers look first.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use super::{apt, step};
use crate::command::{command, output};

/// ggml-vulkan does not compile with older ones.
const NEEDED: (u32, u32, u32) = (1, 3, 272);
const KEYRING: &str = "/usr/share/keyrings/debian-archive-trixie-stable.gpg";

/// Makes sure of new headers, putting them under `prefix` (searched before `/usr`) when the system's are too old.
pub(super) fn headers(prefix: &Path) -> Result<()> {
    let found = [Path::new("/usr"), prefix].iter().filter_map(|prefix| version_in(prefix)).max();
    if found >= Some(NEEDED) {
        return Ok(());
    }
    let codename = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if !codename.lines().any(|line| line == "VERSION_CODENAME=bookworm") {
        let (major, minor, patch) = NEEDED;
        bail!(
            "Vulkan headers {major}.{minor}.{patch} or newer are needed to build llama.cpp, and this system's package \
             libvulkan-dev has older ones: install them from Vulkan-Headers under {}",
            prefix.display()
        );
    }
    step("newer Vulkan headers, from Debian 13", || from_next_debian(prefix))
}

fn version_in(prefix: &Path) -> Option<(u32, u32, u32)> {
    let header = fs::read_to_string(prefix.join("include/vulkan/vulkan_core.h")).ok()?;
    xtask::vulkan_header_version(&header)
}

fn from_next_debian(prefix: &Path) -> Result<()> {
    if !Path::new(KEYRING).exists() {
        bail!("{KEYRING} is missing: bring the package debian-archive-keyring up to date");
    }
    let targets = output(command("apt-get").args([
        "indextargets",
        "--format",
        "$(CODENAME) $(COMPONENT) $(REPO_URI)",
        "Created-By: Packages",
    ]))?;
    let mirror = mirror(&targets).context("the package sources name no mirror of Debian 12's main")?;

    let work = scratch()?;
    let result = fetch_and_copy(&work, mirror, prefix);
    super::remove(&work)?;
    result
}

/// The mirror that this Debian's own main packages come from.
fn mirror(targets: &str) -> Option<&str> {
    targets.lines().find_map(|line| {
        let words: Vec<_> = line.split(' ').collect();
        match words.as_slice() {
            ["bookworm", "main", mirror] => Some(*mirror),
            _ => None,
        }
    })
}

fn fetch_and_copy(work: &Path, mirror: &str, prefix: &Path) -> Result<()> {
    let sources = work.join("sources.list");
    fs::write(&sources, format!("deb [signed-by={KEYRING}] {mirror} trixie main\n"))?;
    for dir in ["lists/partial", "cache/archives/partial", "root"] {
        fs::create_dir_all(work.join(dir))?;
    }
    // apt with lists and cache of its own: the system's are neither read nor written.
    let apt = |arguments: &[&str]| -> Result<String> {
        let option = |name: &str, value: &Path| format!("{name}={}", value.display());
        let mut apt = command("apt-get");
        apt.current_dir(work)
            .arg("-o")
            .arg(option("Dir::Etc::sourcelist", &sources))
            .args(["-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User=", "-o", "Acquire::Languages=none"])
            .arg("-o")
            .arg(option("Dir::State::lists", &work.join("lists")))
            .arg("-o")
            .arg(option("Dir::Cache", &work.join("cache")))
            .args(arguments);
        output(&mut apt)
    };
    apt(&["update", "--quiet"])?;
    apt(&["download", "--quiet", "libvulkan-dev"])?;
    let package = fs::read_dir(work)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded no package")?;
    let unpacked = work.join("root");
    output(command("dpkg").arg("-x").arg(&package).arg(&unpacked))?;
    copy(&unpacked.join("usr/include"), &prefix.join("include"))?;
    match version_in(prefix) {
        Some(version) if version >= NEEDED => Ok(()),
        other => bail!("the headers under {} are still not new enough: {other:?}", prefix.display()),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let folders = ["vulkan", "vk_video"].map(|name| from.join(name));
    let writable = fs::create_dir_all(to).is_ok() && !fs::metadata(to)?.permissions().readonly();
    let root = if writable { apt::Root::Already } else { apt::root().unwrap_or(apt::Root::Already) };
    output(apt::privileged(root, "mkdir").arg("-p").arg(to))?;
    output(apt::privileged(root, "cp").arg("-r").args(folders).arg(to))
        .map(drop)
        .with_context(|| format!("the new headers could not be copied to {}: run this once as root", to.display()))
}

fn scratch() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("altiplano-vulkan-{}", std::process::id()));
    super::remove(&dir)?;
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_one_this_debian_uses() {
        let targets = "bookworm-security main http://security.example/debian-security/\n\
            bookworm contrib http://mirror.example/debian/\n\
            bookworm main http://mirror.example/debian/\n";
        assert_eq!(mirror(targets), Some("http://mirror.example/debian/"));
        assert_eq!(mirror("trixie main http://mirror.example/debian/"), None);
    }
}

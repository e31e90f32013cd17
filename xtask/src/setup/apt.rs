//! System packages on Debian and Ubuntu.

use std::{path::Path, time::Instant};

use anyhow::{Result, bail};

use crate::command::{command, find, output};

/// What the build and the tests need, each with what for.
const PACKAGES: [(&str, &str); 13] = [
    ("ca-certificates", "downloads over TLS"),
    ("cmake", "llama.cpp's build"),
    ("curl", "client tests"),
    ("glslc", "llama.cpp's Vulkan shaders"),
    ("libclang-dev", "llama.cpp's bindings"),
    ("libvulkan-dev", "llama.cpp's Vulkan backend"),
    ("mesa-vulkan-drivers", "a GPU in software for tests"),
    ("ninja-build", "llama.cpp's build"),
    ("pkg-config", "llama.cpp's build"),
    ("prometheus", "promtool, which reads our metrics in tests"),
    ("python3", "client tests"),
    ("python3-venv", "client tests"),
    ("spirv-headers", "llama.cpp's Vulkan backend"),
];

/// Installs what is missing, one line each; says the one command to run when that takes rights we lack.
pub(super) fn packages() -> Result<()> {
    if find("dpkg-query").is_none() || !Path::new("/etc/debian_version").exists() {
        return elsewhere();
    }
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
    let Some(root) = root() else {
        bail!(
            "{} system package(s) are missing, and installing them takes root: run\n\n    sudo apt-get update && sudo \
             apt-get install --yes --no-install-recommends {}\n",
            names.len(),
            names.join(" ")
        );
    };
    super::step("package lists", || output(privileged(root, "apt-get").args(["update", "--quiet"])))?;
    for (index, (name, purpose)) in missing.iter().enumerate() {
        let start = Instant::now();
        output(privileged(root, "env").args([
            "DEBIAN_FRONTEND=noninteractive",
            // Programs are wanted, no service that starts by itself.
            "RUNLEVEL=1",
            "SYSTEMD_OFFLINE=1",
            "apt-get",
            "install",
            "--yes",
            "--no-install-recommends",
            name,
        ]))?;
        let seconds = start.elapsed().as_secs_f32();
        eprintln!("set-up: package {}/{}: {name} ({purpose}), {seconds:.0} s", index + 1, missing.len());
    }
    Ok(())
}

fn missing() -> Result<Vec<(&'static str, &'static str)>> {
    // Unknown names make it exit with 1; what it says about the known ones still stands.
    let listed = command("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(PACKAGES.map(|(name, _)| name))
        .output()?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(not_installed(&listed))
}

fn not_installed(listed: &str) -> Vec<(&'static str, &'static str)> {
    let installed = |name: &str| listed.lines().any(|line| line.split_once(' ') == Some((name, "installed")));
    PACKAGES.into_iter().filter(|(name, _)| !installed(name)).collect()
}

/// Not a Debian: nothing is installed, and what is missing is said before llama.cpp's build fails on it.
fn elsewhere() -> Result<()> {
    let missing: Vec<_> = ["cmake", "glslc", "ninja", "pkg-config", "python3", "curl"]
        .into_iter()
        .filter(|program| find(program).is_none())
        .collect();
    if !missing.is_empty() {
        bail!(
            "set-up installs system packages on Debian and Ubuntu only: please install {} (and libclang, the Vulkan \
             headers and loader, SPIR-V headers, a Vulkan driver), then run this again",
            missing.join(", ")
        );
    }
    Ok(())
}

/// How this user becomes root without being asked.
#[derive(Clone, Copy)]
pub(super) enum Root {
    Already,
    Sudo,
}

pub(super) fn root() -> Option<Root> {
    if output(command("id").arg("-u")).is_ok_and(|id| id.trim() == "0") {
        return Some(Root::Already);
    }
    let sudo = find("sudo").is_some() && output(command("sudo").args(["--non-interactive", "true"])).is_ok();
    sudo.then_some(Root::Sudo)
}

/// `program`, run as root.
pub(super) fn privileged(root: Root, program: &str) -> std::process::Command {
    match root {
        Root::Already => command(program),
        Root::Sudo => {
            let mut sudo = command("sudo");
            sudo.args(["--non-interactive", program]);
            sudo
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_dpkg_calls_installed_counts() {
        let all = PACKAGES.map(|(name, _)| format!("{name} installed\n")).concat();
        assert!(not_installed(&all).is_empty());

        let removed = all.replace("cmake installed", "cmake config-files").replace("curl installed\n", "");
        let names: Vec<_> = not_installed(&removed).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["cmake", "curl"]);
    }
}

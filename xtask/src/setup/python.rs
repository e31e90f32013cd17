//! The official clients, for the tests that use them: a Python environment of their own.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use super::{folder_once, step};
use crate::command::{command, find, output};

/// Makes the environment of tests/clients/requirements.txt.
pub(super) fn clients() -> Result<()> {
    folder_once(
        &xtask::python_dir(),
        || xtask::python().is_some(),
        |dir| {
            step("Python clients", || {
                environment(dir, &xtask::repository().join("tests/clients/requirements.txt"))?;
                Ok(fs::write(dir.join("requirements.txt"), xtask::PYTHON_REQUIREMENTS)?)
            })
        },
    )
}

/// What llama.cpp's own tests of its server need, by their own list.
pub(super) fn of_llama_servers_tests() -> Result<()> {
    folder_once(
        &xtask::llama_server_python_dir(),
        || xtask::llama_server_python().is_some(),
        |fresh| {
            step("the Python packages of llama-server's tests", || {
                environment(fresh, &xtask::llama_server_tests_dir().join("tools/server/tests/requirements.txt"))
            })
        },
    )
}

/// A Python environment with the packages of this list.
fn environment(dir: &Path, requirements: &Path) -> Result<()> {
    if find("python3").is_none() {
        bail!("python3 is missing: install it (Debian and Ubuntu: apt-get install python3 python3-venv)");
    }
    // The environment is moved into place afterwards; that breaks its scripts, which nobody uses, and not its
    // interpreter.
    output(command("python3").args(["-m", "venv"]).arg(dir)).context("is python3-venv installed?")?;
    output(
        command(dir.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"])
            .arg(requirements),
    )
    .map(drop)
}

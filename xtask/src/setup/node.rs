//! The official JavaScript clients, for the tests that use them.

use std::fs;

use anyhow::{Context, Result};

use super::{folder_once, step};
use crate::command::{command, output};

/// Installs the packages of tests/clients/js/package-lock.json, once the Python environment is there, which has Node.js.
pub(super) fn clients() -> Result<()> {
    folder_once(
        &xtask::node_dir(),
        || xtask::node_modules().is_some(),
        |dir| {
            step("JavaScript clients", || {
                let (node, npm) = xtask::node().context("the Python environment lacks Node.js")?;
                for name in ["package.json", "package-lock.json"] {
                    fs::copy(xtask::repository().join("tests/clients/js").join(name), dir.join(name))?;
                }
                // The packages need no scripts to be installed; so none is run.
                output(command(node).current_dir(dir).arg(npm).args([
                    "ci",
                    "--ignore-scripts",
                    "--no-audit",
                    "--no-fund",
                    "--loglevel=error",
                ]))
                .map(drop)
            })
        },
    )
}

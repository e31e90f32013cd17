//! The official JavaScript clients, for the tests that use them.

use std::fs;

use anyhow::{Context, Result, bail};

use super::{folder_once, step};
use crate::command::{command, find, output};

/// The oldest Node.js that the clients run on here; they promise to run on 22 and newer.
const OLDEST: u32 = 20;

/// Installs the packages of tests/clients/js/package-lock.json.
pub(super) fn clients() -> Result<()> {
    folder_once(
        &xtask::node_dir(),
        || xtask::node_modules().is_some(),
        |dir| {
            step("JavaScript clients", || {
                if find("node").is_none() || find("npm").is_none() {
                    bail!(
                        "Node.js {OLDEST} or newer, or its npm, is missing: install it (Debian: apt-get install nodejs npm)"
                    );
                }
                let version = output(command("node").arg("--version"))?;
                if major(&version).context("what version of Node.js is this?")? < OLDEST {
                    bail!("Node.js {} is too old for the clients: install {OLDEST} or newer", version.trim());
                }
                for name in ["package.json", "package-lock.json"] {
                    fs::copy(xtask::repository().join("tests/clients/js").join(name), dir.join(name))?;
                }
                // The packages need no scripts to be installed; so none is run.
                output(command("npm").current_dir(dir).args([
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

/// 20 of `v20.20.2`.
fn major(version: &str) -> Option<u32> {
    version.trim().strip_prefix('v')?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read() {
        assert_eq!(major("v20.20.2\n"), Some(20));
        assert_eq!(major("node"), None);
    }
}

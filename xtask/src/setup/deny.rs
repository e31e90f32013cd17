//! cargo-deny, which checks licences, sources and doubled dependencies.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{folder_once, step};
use crate::command::{command, output};

const VERSION: &str = "0.20.2";

fn dir() -> PathBuf {
    xtask::cache().join("cargo-deny").join(VERSION)
}

/// The program, once [`ensure`] has built it.
pub(crate) fn cargo_deny() -> PathBuf {
    dir().join("bin/cargo-deny")
}

/// Builds cargo-deny once; unoptimised, as it runs for a second and would take minutes more to build.
pub(crate) fn ensure() -> Result<()> {
    folder_once(
        &dir(),
        || cargo_deny().is_file(),
        |dir| {
            step(&format!("building cargo-deny {VERSION} (some minutes, once)"), || {
                let target = dir.join("target");
                install(dir, &target)?;
                super::remove(&target)
            })
        },
    )
}

fn install(root: &Path, target: &Path) -> Result<()> {
    let mut cargo = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.env("CARGO_TARGET_DIR", target);
    cargo.args(["install", "--locked", "--debug", "--no-default-features", "cargo-deny", "--version", VERSION]);
    output(cargo.arg("--root").arg(root)).map(drop)
}

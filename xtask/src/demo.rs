//! `cargo xtask demo`.

use std::os::unix::process::CommandExt as _;

use anyhow::{Context as _, Result};

use crate::{
    command::{cargo, command, run as execute},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// End when everything was shown, with an exit code that tells whether it worked, instead of waiting for Ctrl-C
    #[arg(long)]
    once: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::cluster()?;
    execute(cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
    let programs = xtask::target_dir().join("debug");
    let mut demo = command(programs.join("demo"));
    demo.env("ALTIPLANO_BIN_DIR", &programs);
    if options.once {
        demo.arg("--once");
    }
    // The demo takes this process's place, so that Ctrl-C reaches it alone and its exit code is ours.
    Err(demo.exec()).context("could not start the demo")
}

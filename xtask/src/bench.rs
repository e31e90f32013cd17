//! `cargo xtask bench NAME`: builds, then runs the measurement of that name, which prints a Markdown table and writes
//! `target/bench/NAME.json` (see `altiplano_tests::report`).

use anyhow::Result;

use crate::{
    command::{cargo, command, run as execute},
    setup,
};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which measurement: `list` names them
    name: String,
    /// Passed on to the measurement
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::all()?;
    execute(cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
    let programs = xtask::target_dir().join("debug");
    execute(
        command(programs.join("bench"))
            .arg(&options.name)
            .args(&options.arguments)
            .env("ALTIPLANO_BIN_DIR", &programs)
            .env("ALTIPLANO_REPORT_DIR", xtask::repository().join("target/bench")),
    )
}

//! `cargo xtask bench NAME`: builds, then runs the measurement of that name, which prints a Markdown table and writes
//! `target/bench/NAME.json` (see `altiplano_tests::report`).

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};

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

/// Measurements of the request path, beside llama-server or alone: with an optimised agent.
const OF_THE_ENGINE: [&str; 7] = ["context", "engine", "leaks", "limits", "logits", "node", "speculative"];

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::cluster()?;
    let (debug, bench) = (xtask::target_dir().join("debug"), xtask::repository().join("target/bench"));
    if options.name == "suite" {
        setup::llama_server_tests()?;
    }
    let programs = if OF_THE_ENGINE.contains(&options.name.as_str()) {
        setup::llama_server()?;
        let programs = optimised_agent(&debug, bench.join("bin"))?;
        execute(cargo().args(["build", "--quiet", "--package", "altiplano-tests", "--bin", "bench"]))?;
        programs
    } else {
        execute(cargo().args(["build", "--quiet", "--workspace", "--bins"]))?;
        debug.clone()
    };
    execute(
        command(debug.join("bench"))
            .arg(&options.name)
            .args(&options.arguments)
            .env("ALTIPLANO_BIN_DIR", programs)
            .env("ALTIPLANO_REPORT_DIR", bench),
    )
}

/// The agent with our code and what the request path runs through optimised, in a folder of its own. In the development
/// profile's folder, so that llama.cpp, which that profile optimises too, is not built again.
fn optimised_agent(debug: &std::path::Path, into: PathBuf) -> Result<PathBuf> {
    execute(
        cargo()
            .env("CARGO_INCREMENTAL", "0")
            .args(["build", "--quiet", "--package", "altiplano-agent", "--bin", "altiplano-agent", "--config"])
            .arg(xtask::repository().join("xtask/optimised.toml")),
    )?;
    fs::create_dir_all(&into)?;
    let agent = into.join("altiplano-agent");
    // A program that runs cannot be overwritten, but replaced.
    let fresh = into.join("altiplano-agent.tmp");
    fs::copy(debug.join("altiplano-agent"), &fresh).context("could not copy the agent")?;
    fs::rename(fresh, agent)?;
    Ok(into)
}

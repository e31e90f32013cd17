//! `cargo xtask`: sets a machine up, then tests, demonstrates and measures.

mod bench;
mod command;
mod demo;
mod setup;
mod suites;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set-up, tests, demo and benchmarks of Altiplano", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install and build what tests and demo need: system packages, control plane, Helm, Python clients
    Setup,
    /// Set up, then check and test everything, or what --only names
    Test(test::Options),
    /// Set up, then show it at work: control plane, operator, two agents, a streamed answer
    Demo(demo::Options),
    /// Write crds/*.yaml anew from the Rust types
    Crds,
    /// Set up, then measure: prints a table, writes target/bench/NAME.json
    Bench(bench::Options),
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not by returning it: with RUST_BACKTRACE set that would bury the sentence under a stack of calls.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Setup => {
            setup::all()?;
            eprintln!("set-up: everything is there");
            Ok(())
        }
        Task::Test(options) => test::run(&options),
        Task::Demo(options) => demo::run(&options),
        Task::Crds => {
            command::run(command::cargo().args(["run", "--quiet", "-p", "altiplano-crds", "--bin", "crdgen"]))
        }
        Task::Bench(options) => bench::run(&options),
    }
}

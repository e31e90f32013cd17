//! `cargo xtask bench NAME`.

use std::process::ExitCode;

use anyhow::{Result, bail};

/// The measurements by name, each with what it measures.
const BENCHES: [(&str, &str); 0] = [];

fn main() -> ExitCode {
    match run(std::env::args().nth(1).as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(name: Option<&str>) -> Result<()> {
    match name {
        Some("list") => {
            for (name, what) in BENCHES {
                println!("{name:<16} {what}");
            }
            Ok(())
        }
        other => bail!("no measurement is called {:?}; `cargo xtask bench list` names them", other.unwrap_or_default()),
    }
}

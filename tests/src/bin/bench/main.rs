//! The measurements behind `cargo xtask bench NAME`.

mod apply;

use std::process::ExitCode;

use anyhow::{Result, bail};

/// The measurements by name, each with what it measures.
const BENCHES: [(&str, &str); 1] = [("apply", "from apply to Ready and to the first token; memory at rest")];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    match run(std::env::args().nth(1).as_deref()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(name: Option<&str>) -> Result<()> {
    let report = match name {
        Some("apply") => apply::run().await?,
        Some("list") => {
            for (name, what) in BENCHES {
                println!("{name:<16} {what}");
            }
            return Ok(());
        }
        other => bail!("no measurement is called {:?}; `cargo xtask bench list` names them", other.unwrap_or_default()),
    };
    println!("written to {}", report.publish()?.display());
    Ok(())
}

//! The measurements behind `cargo xtask bench NAME`.

mod apply;
mod context;
mod engine;
mod leaks;
mod limits;
mod logits;
mod node;
mod speculative;
mod suite;

use std::process::ExitCode;

use anyhow::{Result, bail};

/// The measurements by name, each with what it measures.
const BENCHES: [(&str, &str); 9] = [
    ("apply", "from apply to Ready and to the first token; memory at rest"),
    (
        "context",
        "a change of the context's size: to the first token beside llama-server, the resize beside the bare calls",
    ),
    ("engine", "speed, latency and memory beside llama-server and llama-bench; scenarios may be named"),
    ("leaks", "memory after ten thousand requests, and of streams that run for ten minutes"),
    ("limits", "agent and worker beside llama.cpp's bare calls at the work of `engine`"),
    ("logits", "how far log-probabilities lie apart: llama-server against itself, ours against it"),
    ("node", "wake, switch, crash and adoption of workers beside llama.cpp's programs; scenarios may be named"),
    (
        "speculative",
        "guesses by n-grams, a draft model and the model's own head, and turns of LoRA adapters, beside llama-server; \
         scenarios may be named",
    ),
    ("suite", "llama.cpp's own tests of its server, against ours; more arguments are pytest's"),
];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &[String]) -> Result<()> {
    let report = match arguments.first().map(String::as_str) {
        Some("apply") => apply::run().await?,
        Some("context") => context::run().await?,
        Some("engine") => engine::run(&arguments[1..]).await?,
        Some("leaks") => leaks::run().await?,
        Some("limits") => limits::run().await?,
        Some("node") => node::run(&arguments[1..]).await?,
        Some("speculative") => speculative::run(&arguments[1..]).await?,
        Some("suite") => {
            println!("written to {}", suite::run(&arguments[1..]).await?.display());
            return Ok(());
        }
        Some("logits") => logits::run().await?,
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

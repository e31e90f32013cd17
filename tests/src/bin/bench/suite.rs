//! llama.cpp's own tests of its server, against ours: all files but those about what an agent is not.

use std::path::PathBuf;
use std::time::Duration;

use altiplano_tests::repository;
use altiplano_tests::server_suite::{self, Servers};
use anyhow::{Context as _, Result};

/// What has not run by then is not in the table.
const LIMIT: Duration = Duration::from_mins(30);

/// Runs them, with more arguments for pytest, and writes `target/bench/suite.md` and the names of those that pass,
/// `target/bench/suite-passes.txt`. Returns the first one's path.
pub(crate) async fn run(arguments: &[String]) -> Result<PathBuf> {
    let shared = std::env::var_os("ALTIPLANO_SUITE_SHARED").is_some();
    let servers = if shared { Servers::Shared } else { Servers::Own };
    let (outcomes, said) = server_suite::run(arguments, servers, LIMIT).await?;
    println!("{said}");
    let text = server_suite::table(&outcomes);
    println!("{text}");
    let dir = std::env::var_os("ALTIPLANO_REPORT_DIR").map_or_else(|| repository().join("target/bench"), PathBuf::from);
    std::fs::create_dir_all(&dir).with_context(|| format!("could not create {}", dir.display()))?;
    let passed: Vec<String> =
        outcomes.iter().filter(|outcome| outcome.result == "passed").map(server_suite::Outcome::id).collect();
    std::fs::write(dir.join("suite-passes.txt"), passed.join("\n") + "\n")?;
    let path = dir.join("suite.md");
    std::fs::write(&path, text)?;
    Ok(path)
}

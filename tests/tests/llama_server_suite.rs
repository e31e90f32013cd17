//! llama.cpp's own tests of its server against ours, those that passed once: whoever of them fails now is named. The whole
//! suite, with a fresh server for each test, is `cargo xtask bench suite`; docs/llama-server-suite.md has its outcome.

use std::collections::BTreeMap;
use std::time::Duration;

use altiplano_tests::server_suite::{self, Servers};
use anyhow::{Result, ensure};

/// File and name, one a line. `ALTIPLANO_SUITE_SHARED=1 cargo xtask bench suite FILES…` writes those that pass to
/// `target/bench/suite-passes.txt`.
const PASSES: &str = include_str!("../peers/passes.txt");

/// Longest wait for all of them; on an idle machine they take a tenth of it.
const PATIENCE: Duration = Duration::from_mins(8);

#[tokio::test]
async fn what_has_passed_passes() -> Result<()> {
    let expected: Vec<&str> = PASSES.lines().collect();
    let tests: Vec<String> = expected.iter().map(|id| format!("unit/{id}")).collect();
    let (outcomes, said) = server_suite::run(&tests, Servers::Shared, PATIENCE).await?;
    let known: BTreeMap<String, String> =
        outcomes.iter().map(|outcome| (outcome.id(), format!("{}: {}", outcome.result, outcome.reason))).collect();
    let missed = expected.iter().filter_map(|id| match known.get(*id).map(String::as_str) {
        Some("passed: ") => None,
        other => Some(format!("{id}: {}", other.unwrap_or("not run"))),
    });
    let missed: Vec<String> = missed.collect();
    ensure!(missed.is_empty(), "{said}\n{} of {} fail:\n{}", missed.len(), expected.len(), missed.join("\n"));
    Ok(())
}

//! llama.cpp's own tests of its server, from the source that llama-server was built from, run against ours: which pass,
//! which fail, and which ask for what is not here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;

use altiplano_test_models::toy;
use altiplano_tests::{free_port, program, repository, sandbox};
use anyhow::{Context as _, Result, ensure};

/// Runs them, with more arguments for pytest, and writes `target/bench/suite.md`. Returns its path.
pub(crate) async fn run(arguments: &[String]) -> Result<PathBuf> {
    let dir = sandbox::subdir("suite")?;
    let tests = dir.join("tests");
    let source = xtask::llama_server_dir().join("tests");
    // They write beside themselves.
    let copied = tokio::process::Command::new("cp").arg("-r").arg(&source).arg(&tests).status().await?;
    ensure!(copied.success(), "could not copy {}", source.display());
    let (ours, results) = (repository().join("tests/peers"), dir.join("results"));
    let agent = program("altiplano-agent")?;
    let python = xtask::llama_server_python().context("the tests' Python packages are not there")?;
    let mut pytest = tokio::process::Command::new(python);
    pytest
        .current_dir(&tests)
        .args(["-m", "pytest", "-q", "--no-header", "-p", "suite_plugin", "-p", "no:cacheprovider", "--tb=line"])
        .args(arguments)
        .env("PYTHONPATH", std::env::join_paths([&ours, &tests])?)
        .env("LLAMA_SERVER_BIN_PATH", ours.join("as_llama_server.py"))
        .env("ALTIPLANO_BIN_DIR", agent.parent().context("the agent has no folder")?)
        .env("ALTIPLANO_SUITE_MODEL", toy::path())
        .env("ALTIPLANO_SUITE_RESULTS", &results)
        .env("PORT", free_port()?.to_string());
    // Failures are what the table is for.
    pytest.status().await.context("could not start pytest")?;

    let text = table(&std::fs::read_to_string(&results).context("no test ran")?)?;
    println!("{text}");
    let path = std::env::var_os("ALTIPLANO_REPORT_DIR")
        .map_or_else(|| repository().join("target/bench"), PathBuf::from)
        .join("suite.md");
    std::fs::create_dir_all(path.parent().context("no folder")?)?;
    std::fs::write(&path, text)?;
    Ok(path)
}

/// A table by file, then every test that did not pass with its reason. `results`: one JSON array (file, test, result,
/// reason) a line.
fn table(results: &str) -> Result<String> {
    let mut counts: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
    let mut reasons: BTreeMap<(String, String, String), BTreeSet<String>> = BTreeMap::new();
    for line in results.lines() {
        let (file, test, result, reason): (String, String, String, String) = serde_json::from_str(line)?;
        *counts.entry(file.clone()).or_default().entry(result.clone()).or_default() += 1;
        if result != "passed" {
            reasons.entry((result, file, reason)).or_default().insert(test);
        }
    }
    let mut text = String::from("| file | passed | failed | not applicable | skipped |\n|---|---:|---:|---:|---:|\n");
    for (file, counts) in &counts {
        let count = |result: &str| counts.get(result).copied().unwrap_or_default();
        let (passed, failed) = (count("passed"), count("failed"));
        writeln!(text, "| {file} | {passed} | {failed} | {} | {} |", count("not applicable"), count("skipped"))?;
    }
    text.push_str("\n| result | file | reason | tests |\n|---|---|---|---|\n");
    for ((result, file, reason), tests) in &reasons {
        let tests: Vec<&str> = tests.iter().map(String::as_str).collect();
        let reason = reason.replace('|', "\\|");
        writeln!(text, "| {result} | {file} | {reason} | {} |", tests.join(", ").replace('|', "\\|"))?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_by_file() {
        let results = "[\"a.py\", \"x\", \"passed\", \"\"]\n[\"a.py\", \"y\", \"failed\", \"404 | x\"]\n\
                       [\"b.py\", \"z\", \"not applicable\", \"--slots\"]\n";
        let text = table(results).unwrap();
        assert!(text.contains("| a.py | 1 | 1 | 0 | 0 |\n| b.py | 0 | 0 | 1 | 0 |\n"), "{text}");
        assert!(
            text.contains("| failed | a.py | 404 \\| x | y |\n| not applicable | b.py | --slots | z |\n"),
            "{text}"
        );
    }
}

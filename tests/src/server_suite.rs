//! llama.cpp's own tests of its server, run against ours with models that are made here: which pass, which fail, and
//! which ask for what is not here. `tests/peers` has what stands between them and the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use altiplano_test_models::{Architecture, Projector, ProjectorKind, Quantization, Spec};
use anyhow::{Context as _, Result, ensure};

use crate::{Proc, program, repository, sandbox};

/// Passed, failed, not applicable, skipped: in this order in the table.
const RESULTS: [&str; 4] = ["passed", "failed", "not applicable", "skipped"];

/// What became of one test.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
pub struct Outcome {
    /// Its file's name.
    pub file: String,
    /// Its name, with its parameters.
    pub test: String,
    /// `passed`, `failed`, `not applicable` or `skipped`.
    pub result: String,
    /// Why it did not pass.
    pub reason: String,
}

impl Outcome {
    /// File and name.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}::{}", self.file, self.test)
    }
}

/// Which servers tests ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Servers {
    /// Each its own, as in llama.cpp's repository.
    Own,
    /// Those that ask for the same share one, which takes a fifth of the time.
    Shared,
}

/// Runs them, with more arguments for pytest, for so long at most: what did not get its turn is missing then. Also returns
/// what pytest has said.
pub async fn run(arguments: &[String], servers: Servers, limit: Duration) -> Result<(Vec<Outcome>, String)> {
    let dir = sandbox::subdir("suite")?;
    let source = xtask::llama_server_tests().context("llama.cpp's tests are not there: run `cargo xtask setup`")?;
    // They write beside themselves.
    let copied = tokio::process::Command::new("cp").arg("-r").arg(source.join(".")).arg(&dir).status().await?;
    ensure!(copied.success(), "could not copy {}", source.display());
    let tests = dir.join("tools/server/tests");
    let model = |name: &str, spec: Spec| -> Result<PathBuf> {
        let path = dir.join(name);
        spec.write(&path)?;
        Ok(path)
    };
    let wide = Spec { context: 8192, ..Spec::default() };
    let sees = Spec { architecture: Architecture::Gemma3, ..Spec::default() };
    let projector = dir.join("projector.gguf");
    Projector::of(ProjectorKind::Gemma3, &sees).write(&projector)?;
    let (ours, results) = (repository().join("tests/peers"), dir.join("results"));
    let agent = program("altiplano-agent")?;
    let python =
        xtask::llama_server_python().context("the tests' Python packages are not there: `cargo xtask setup`")?;
    let mut pytest = Command::new(python);
    pytest
        .current_dir(&tests)
        .args(["-m", "pytest", "-q", "--no-header", "-p", "suite_plugin", "-p", "no:cacheprovider", "--tb=line"])
        .args(arguments)
        .env("PYTHONPATH", std::env::join_paths([&ours, &tests, &repository().join("tests/clients")])?)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("LLAMA_SERVER_BIN_PATH", ours.join("as_llama_server.py"))
        .env("ALTIPLANO_BIN_DIR", agent.parent().context("the agent has no folder")?)
        .env("ALTIPLANO_SUITE_MODEL", model("model.gguf", wide.clone())?)
        .env("ALTIPLANO_SUITE_DRAFT", model("draft.gguf", Spec { quantization: Quantization::Q8_0, ..wide.clone() })?)
        .env("ALTIPLANO_SUITE_INFILL", model("infill.gguf", Spec { infill: true, ..wide })?)
        .env("ALTIPLANO_SUITE_SEES", model("sees.gguf", sees)?)
        .env("ALTIPLANO_SUITE_PROJECTOR", projector)
        .env("ALTIPLANO_SUITE_EMBEDDER", model("embedder.gguf", Spec::embedder())?)
        .env("ALTIPLANO_SUITE_RERANKER", model("reranker.gguf", Spec::reranker())?)
        .env("ALTIPLANO_SUITE_TEMPLATES", repository().join("agent/tests/templates"))
        .env("ALTIPLANO_SUITE_RESULTS", &results)
        // Where the wrapper writes; removed with the sandbox.
        .env("TMPDIR", &dir);
    if servers == Servers::Shared {
        pytest.env("ALTIPLANO_SUITE_SHARED", "1");
    }
    let mut pytest = Proc::start("pytest", pytest)?;
    // Failures are what is asked for. Its servers end with it.
    let ended = pytest.ended(limit).await;
    let said = pytest.log();
    let text = std::fs::read_to_string(&results).with_context(|| format!("no test ran: {ended:?}\n{said}"))?;
    Ok((read(&text)?, said))
}

/// One JSON array (file, test, result, reason) a line.
fn read(results: &str) -> Result<Vec<Outcome>> {
    // By test: what fails after it has passed, in taking down what it set up, has failed.
    let mut outcomes: BTreeMap<(String, String), Outcome> = BTreeMap::new();
    for line in results.lines() {
        let (file, test, result, reason) = serde_json::from_str(line).with_context(|| format!("{line:?}"))?;
        let outcome = Outcome { file, test, result, reason };
        outcomes.insert((outcome.file.clone(), outcome.test.clone()), outcome);
    }
    Ok(outcomes.into_values().collect())
}

/// A table by file, then every test that did not pass with its reason.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> String {
    let mut counts: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    let mut reasons: BTreeMap<(&str, &str, &str), BTreeSet<&str>> = BTreeMap::new();
    for Outcome { file, test, result, reason } in outcomes {
        *counts.entry(file).or_default().entry(result).or_default() += 1;
        *counts.entry("all").or_default().entry(result).or_default() += 1;
        if result != "passed" {
            reasons.entry((result, file, reason)).or_default().insert(test);
        }
    }
    let mut text = String::from("| file | passed | failed | not applicable | skipped |\n|---|---:|---:|---:|---:|\n");
    let all = counts.remove_entry("all");
    for (file, counts) in counts.into_iter().chain(all) {
        let [passed, failed, inapplicable, skipped] =
            RESULTS.map(|result| counts.get(result).copied().unwrap_or_default());
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| {file} | {passed} | {failed} | {inapplicable} | {skipped} |");
    }
    text.push_str("\n| result | file | reason | tests |\n|---|---|---|---|\n");
    for ((result, file, reason), tests) in &reasons {
        let tests: Vec<&str> = tests.iter().copied().collect();
        let (reason, tests) = (reason.replace('|', "\\|"), tests.join(", ").replace('|', "\\|"));
        let _ = writeln!(text, "| {result} | {file} | {reason} | {tests} |");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_by_file() {
        let results = "[\"a.py\", \"x\", \"passed\", \"\"]\n[\"a.py\", \"y\", \"passed\", \"\"]\n\
                       [\"a.py\", \"y\", \"failed\", \"404 | x\"]\n[\"b.py\", \"z\", \"not applicable\", \"--slots\"]\n";
        let outcomes = read(results).unwrap();
        assert_eq!(outcomes.iter().map(Outcome::id).collect::<Vec<_>>(), ["a.py::x", "a.py::y", "b.py::z"]);
        let text = table(&outcomes);
        assert!(
            text.contains("| a.py | 1 | 1 | 0 | 0 |\n| b.py | 0 | 0 | 1 | 0 |\n| all | 1 | 1 | 1 | 0 |\n"),
            "{text}"
        );
        assert!(
            text.contains("| failed | a.py | 404 \\| x | y |\n| not applicable | b.py | --slots | z |\n"),
            "{text}"
        );
    }
}

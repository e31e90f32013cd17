//! llama.cpp's own tests of its server, from the source that llama-server was built from, run against ours: which pass,
//! which fail, and which ask for what is not here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;

use altiplano_test_models::{Spec, toy};
use altiplano_tests::{free_port, program, repository, sandbox};
use anyhow::{Context as _, Result, ensure};

/// Templates of llama.cpp's repository that the tests ask for, and ours of the same format, which stand for them: the
/// package of llama.cpp's source leaves them out.
const TEMPLATES: [(&str, &str); 13] = [
    ("Qwen-QwQ-32B", "deepseek-r1.jinja"),
    ("Qwen-Qwen3-0.6B", "qwen3.jinja"),
    ("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "hermes.jinja"),
    ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "hermes.jinja"),
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-r1.jinja"),
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-r1.jinja"),
    ("llama-cpp-deepseek-r1", "deepseek-r1.jinja"),
    ("meetkai-functionary-medium-v3.1", "functionary.jinja"),
    ("meetkai-functionary-medium-v3.2", "functionary.jinja"),
    ("meta-llama-Llama-3.1-8B-Instruct", "llama3.jinja"),
    ("meta-llama-Llama-3.2-3B-Instruct", "llama3.jinja"),
    ("meta-llama-Llama-3.3-70B-Instruct", "llama3.jinja"),
    ("mistralai-Mistral-Nemo-Instruct-2407", "mistral.jinja"),
];

/// Runs them, with more arguments for pytest, and writes `target/bench/suite.md`. Returns its path.
pub(crate) async fn run(arguments: &[String]) -> Result<PathBuf> {
    let dir = sandbox::subdir("suite")?;
    // As deep as in llama.cpp's repository, beside whose folders they look for templates.
    let tests = dir.join("tools/server/tests");
    std::fs::create_dir_all(dir.join("tools/server"))?;
    let source = xtask::llama_server_dir().join("tests");
    // They write beside themselves.
    let copied = tokio::process::Command::new("cp").arg("-r").arg(&source).arg(&tests).status().await?;
    ensure!(copied.success(), "could not copy {}", source.display());
    let ours_templates = repository().join("agent/tests/templates");
    let templates = dir.join("models/templates");
    std::fs::create_dir_all(&templates)?;
    for (theirs, ours) in TEMPLATES {
        std::fs::copy(ours_templates.join(ours), templates.join(format!("{theirs}.jinja")))?;
    }
    let model = |name: &str, spec: Spec| -> Result<PathBuf> {
        let path = dir.join(name);
        spec.write(&path)?;
        Ok(path)
    };
    let wide = Spec { context: 4096, ..Spec::default() };
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
        .env("ALTIPLANO_SUITE_INFILL", model("infill.gguf", Spec { infill: true, ..wide })?)
        .env("ALTIPLANO_SUITE_EMBEDDER", model("embedder.gguf", Spec::embedder())?)
        .env("ALTIPLANO_SUITE_RERANKER", model("reranker.gguf", Spec::reranker())?)
        .env("ALTIPLANO_SUITE_TEMPLATES", &ours_templates)
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

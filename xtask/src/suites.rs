//! All tests, several suites at the same time: those on a control plane spend most of their minutes waiting (for Leases to
//! run out, for a graceful period to pass), and each has a control plane and ports of its own.

use std::{
    collections::VecDeque,
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{command::cargo, test::WORKSPACE};

/// Suites at a time. More than the cores of a small machine, because most of them wait most of the time.
const AT_ONCE: usize = 3;

/// The files of `tests/tests` that take longest, the longest first: begun first, they do not become the end of the run.
const LONGEST: [&str; 5] = ["contract", "outage", "bad_input", "end_to_end", "settled"];

/// Arguments of `cargo test` for one suite.
type Arguments = Vec<String>;

/// Runs every test of the workspace. All suites run, whatever becomes of the others.
pub(crate) fn run() -> Result<()> {
    let suites = Mutex::new(VecDeque::from(suites()?));
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    // Not in a `while let`: that would hold the lock as long as the suite runs.
                    let next = lock(&suites).pop_front();
                    let Some(suite) = next else { break };
                    let name = suite.join(" ");
                    let start = Instant::now();
                    let outcome = finish(cargo_test().args(&suite));
                    // One suite's output at a time.
                    let mut failed = lock(&failed);
                    if let Err(error) = report(&name, start.elapsed(), outcome) {
                        failed.push(format!("{name}: {error:#}"));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !failed.is_empty() {
        bail!("{} of the suites failed:\n{}", failed.len(), failed.join("\n"));
    }
    Ok(())
}

/// `cargo test` as every suite runs it.
pub(crate) fn cargo_test() -> Command {
    let mut cargo = cargo();
    cargo
        .args(["test", "--locked", "--no-fail-fast"])
        .env("ALTIPLANO_BIN_DIR", xtask::target_dir().join("debug"))
        // Golden files are compared, never rewritten, whatever the shell says.
        .env("INSTA_UPDATE", "no");
    cargo
}

/// Every file of `tests/tests`, and the tests that stand with the crates. All of them name the whole workspace, as the build
/// did: with one package alone other features would be chosen, and half of the dependencies built a second time.
fn suites() -> Result<Vec<Arguments>> {
    let mut names = integration_tests("tests")?;
    let rank = |name: &String| LONGEST.iter().position(|long| long == name).unwrap_or(LONGEST.len());
    names.sort_by(|left, right| (rank(left), left).cmp(&(rank(right), right)));
    let mut suites: Vec<_> = names.into_iter().map(|name| arguments(&[], [name])).collect();
    let mut others = Vec::new();
    for folder in WORKSPACE.into_iter().filter(|folder| *folder != "tests") {
        others.extend(integration_tests(folder)?);
    }
    // Long too, but it works where the others wait.
    suites.insert(2.min(suites.len()), arguments(&["--lib", "--bins"], others));
    suites.push(arguments(&["--doc"], []));
    Ok(suites)
}

fn arguments(kinds: &[&str], tests: impl IntoIterator<Item = String>) -> Arguments {
    let kinds = ["--workspace"].iter().chain(kinds).map(|&word| word.to_owned());
    kinds.chain(tests.into_iter().flat_map(|name| ["--test".to_owned(), name])).collect()
}

/// The names of a crate's integration tests: `tests/NAME.rs` and `tests/NAME/main.rs`.
fn integration_tests(folder: &str) -> Result<Vec<String>> {
    let dir = xtask::repository().join(folder).join("tests");
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in dir.read_dir().with_context(|| format!("could not list {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file() {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

/// Runs to the end; the output, and whether it passed.
fn finish(command: &mut Command) -> Result<(String, bool)> {
    // One pipe for both, so that lines stand in the order in which they were written.
    let (mut reader, writer) = std::io::pipe().context("no pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("no pipe")?)
        .stderr(writer)
        .spawn()
        .context("could not start cargo")?;
    // The command holds the pipe's other end as long as it lives: without this, reading would not end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut text = Vec::new();
    std::io::Read::read_to_end(&mut reader, &mut text).context("could not read what cargo says")?;
    let status = child.wait().context("could not wait for cargo")?;
    Ok((String::from_utf8_lossy(&text).into_owned(), status.success()))
}

fn report(name: &str, took: Duration, outcome: Result<(String, bool)>) -> Result<()> {
    let (text, passed) = outcome?;
    let verdict = if passed { "passed" } else { "FAILED" };
    eprintln!("==> {name}\n{}\n==> {name}: {verdict} in {:.0} s", text.trim_end(), took.as_secs_f32());
    if !passed {
        bail!("see its output above");
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::output;

    #[test]
    fn every_test_is_in_one_suite_and_the_longest_run_first() {
        let suites: Vec<_> = suites().unwrap().into_iter().map(|suite| suite.join(" ")).collect();
        for (suite, name) in suites.iter().zip(["contract", "outage"]) {
            assert_eq!(*suite, format!("--workspace --test {name}"));
        }
        let named = |name: &str| suites.iter().flat_map(|suite| suite.split(' ')).filter(|word| *word == name).count();
        assert!(LONGEST.iter().all(|name| named(name) == 1), "some are no suites any more: {suites:?}");
        // What cargo sees as targets.
        let metadata = output(cargo().args(["metadata", "--no-deps", "--format-version=1", "--locked"])).unwrap();
        let metadata: serde_json::Value = serde_json::from_str(&metadata).unwrap();
        for package in metadata["packages"].as_array().unwrap() {
            for target in package["targets"].as_array().unwrap() {
                let (kind, name) = (target["kind"][0].as_str().unwrap(), target["name"].as_str().unwrap());
                let runs = match kind {
                    "test" => named(name),
                    "lib" => named("--lib") * named("--doc"),
                    "bin" => named("--bins"),
                    // Builds only.
                    "custom-build" => 1,
                    _ => 0,
                };
                assert_eq!(runs, 1, "{kind} {name} of {} in {suites:?}", package["name"]);
            }
        }
    }

    #[test]
    fn output_comes_whole_and_failures_are_seen() {
        let shell = |script: &str| finish(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(shell("echo out; echo err >&2; exit 3"), ("out\nerr\n".to_owned(), false));
        assert_eq!(shell("true"), (String::new(), true));
        assert!(report("suite", Duration::ZERO, Ok((String::new(), false))).is_err());
    }
}

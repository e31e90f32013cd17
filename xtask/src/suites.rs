//! All tests, several suites at the same time: those on a control plane spend most of their minutes waiting (for Leases to
//! run out, for a graceful period to pass), and each has a control plane and ports of its own.

use std::{
    collections::VecDeque,
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::command::cargo;

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

/// Every file of `tests/tests`, and the tests that stand with the crates.
fn suites() -> Result<Vec<Arguments>> {
    let mut names = Vec::new();
    for entry in xtask::repository().join("tests/tests").read_dir().context("could not list tests/tests")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    let rank = |name: &String| LONGEST.iter().position(|long| long == name).unwrap_or(LONGEST.len());
    names.sort_by(|left, right| (rank(left), left).cmp(&(rank(right), right)));
    let own = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Arguments>();
    let mut suites: Vec<_> = names.iter().map(|name| own(&["--package", "altiplano-tests", "--test", name])).collect();
    // Long too, but it works where the others wait.
    suites.insert(2.min(suites.len()), own(&["--workspace", "--exclude", "altiplano-tests"]));
    suites.push(own(&["--package", "altiplano-tests", "--lib", "--bins"]));
    Ok(suites)
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

    #[test]
    fn every_suite_is_run_and_the_longest_first() {
        let suites: Vec<_> = suites().unwrap().into_iter().map(|suite| suite.join(" ")).collect();
        for name in LONGEST {
            let file = xtask::repository().join("tests/tests").join(name).with_extension("rs");
            assert!(file.is_file(), "{name} is no suite any more");
        }
        let files = xtask::repository().join("tests/tests").read_dir().unwrap().count();
        assert_eq!(suites.len(), files + 2, "{suites:?}");
        assert!(suites[0].ends_with("--test contract"), "{suites:?}");
    }

    #[test]
    fn output_comes_whole_and_failures_are_seen() {
        let shell = |script: &str| finish(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(shell("echo out; echo err >&2; exit 3"), ("out\nerr\n".to_owned(), false));
        assert_eq!(shell("true"), (String::new(), true));
        assert!(report("suite", Duration::ZERO, Ok((String::new(), false))).is_err());
    }
}

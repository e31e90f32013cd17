//! `cargo xtask test`.

use std::{path::Path, time::Instant};

use anyhow::{Result, bail};

use crate::{
    command::{cargo, command, run as execute},
    setup,
    suites::{self, cargo_test},
};

/// More than this in CI's kept target folder, and some of it is built anew.
const KEPT_TARGET_GIB: u64 = 16;
/// The workspace's crates, by their folders.
pub(crate) const WORKSPACE: [&str; 7] =
    ["crds", "operator", "agent", "tests", "tests/models", "tests/vulkan-accounts", "xtask"];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run only these: fmt, clippy, deny, advisories, build, test, a crate (operator), or a file of tests/tests
    #[arg(long, num_args = 1.., value_name = "SUITE")]
    only: Vec<String>,
}

/// What one name on the command line stands for.
#[derive(Debug, PartialEq, Eq)]
enum Suite {
    Format,
    Clippy,
    Deny,
    Advisories,
    Build,
    Workspace,
    Crate(String),
    Integration(String),
}

/// Everything, in the order in which a mistake shows soonest. Advisories are not in it: they change without this tree
/// changing, and need GitHub.
const ALL: [Suite; 5] = [Suite::Format, Suite::Clippy, Suite::Deny, Suite::Build, Suite::Workspace];

pub(crate) fn run(options: &Options) -> Result<()> {
    let chosen = if options.only.is_empty() { Vec::from(ALL) } else { choose(&options.only)? };
    let runs_tests =
        chosen.iter().any(|suite| matches!(suite, Suite::Workspace | Suite::Crate(_) | Suite::Integration(_)));
    if chosen.contains(&Suite::Format) {
        // Needs nothing: fails before anything is installed.
        timed(&Suite::Format)?;
    }
    bound_kept_target()?;
    if runs_tests {
        setup::all()?;
    } else {
        setup::packages()?;
    }
    chosen.iter().filter(|suite| **suite != Suite::Format).try_for_each(timed)
}

fn choose(names: &[String]) -> Result<Vec<Suite>> {
    let mut suites = Vec::new();
    for name in names {
        let suite = match name.as_str() {
            "fmt" => Suite::Format,
            "clippy" => Suite::Clippy,
            "deny" => Suite::Deny,
            "advisories" => Suite::Advisories,
            "build" => Suite::Build,
            "test" => Suite::Workspace,
            name => {
                let root = xtask::repository();
                if root.join("tests/tests").join(name).with_extension("rs").is_file() {
                    // These run the built programs.
                    suites.push(Suite::Build);
                    Suite::Integration(name.to_owned())
                } else if WORKSPACE.contains(&name) {
                    Suite::Crate(name.to_owned())
                } else {
                    bail!("no suite is called {name}; see cargo xtask test --help");
                }
            }
        };
        suites.push(suite);
    }
    suites.dedup();
    Ok(suites)
}

fn timed(suite: &Suite) -> Result<()> {
    let start = Instant::now();
    eprintln!("==> {suite:?}");
    execute_suite(suite)?;
    eprintln!("==> {suite:?}: passed in {:.0} s", start.elapsed().as_secs_f32());
    Ok(())
}

fn execute_suite(suite: &Suite) -> Result<()> {
    match suite {
        Suite::Format => execute(cargo().args(["fmt", "--all", "--check"])),
        Suite::Clippy => {
            execute(cargo().args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))
        }
        Suite::Deny => {
            setup::ensure_cargo_deny()?;
            execute(command(setup::cargo_deny()).args(["--locked", "check", "bans", "licenses", "sources"]))
        }
        Suite::Advisories => {
            setup::ensure_cargo_deny()?;
            execute(command(setup::cargo_deny()).args(["--locked", "check", "advisories"]))
        }
        // With --all-targets the features are those of the tests, so that nothing is built twice.
        Suite::Build => execute(cargo().args(["build", "--workspace", "--all-targets", "--locked"])),
        Suite::Workspace => suites::run(),
        Suite::Crate(name) => execute(cargo_test().args(["--package", &package(name)])),
        Suite::Integration(name) => execute(cargo_test().args(["--workspace", "--test", name])),
    }
}

fn package(folder: &str) -> String {
    match folder {
        "xtask" => folder.to_owned(),
        "tests/models" => "altiplano-test-models".to_owned(),
        "tests/vulkan-accounts" => "altiplano-test-vulkan-accounts".to_owned(),
        folder => format!("altiplano-{folder}"),
    }
}

/// The target folder that CI keeps grows by each clone's own crates, as their names hold the clone's path. Over the limit
/// those of all clones go, and if that is not enough, everything: then old versions of dependencies fill it.
fn bound_kept_target() -> Result<()> {
    let dir = xtask::target_dir();
    if !dir.starts_with(xtask::cache()) || gibibytes(&dir)? <= KEPT_TARGET_GIB {
        return Ok(());
    }
    eprintln!("{} holds more than {KEPT_TARGET_GIB} GiB: removing the crates of earlier clones", dir.display());
    let own = WORKSPACE.map(|name| format!("--package={}", package(name)));
    execute(cargo().args(["clean", "--quiet"]).args(own))?;
    if gibibytes(&dir)? > KEPT_TARGET_GIB {
        eprintln!("that was not enough: removing all of it");
        std::fs::remove_dir_all(&dir)?;
    }
    Ok(())
}

fn gibibytes(dir: &Path) -> Result<u64> {
    if !dir.is_dir() {
        return Ok(0);
    }
    let kibibytes = crate::command::output(command("du").args(["--summarize", "--block-size=1K"]).arg(dir))?;
    let kibibytes: u64 = kibibytes.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
    Ok(kibibytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_for_suites() {
        let chosen = choose(&["fmt".into(), "operator".into(), "control_plane".into()]).unwrap();
        let expected =
            [Suite::Format, Suite::Crate("operator".into()), Suite::Build, Suite::Integration("control_plane".into())];
        assert_eq!(chosen, expected);
        for name in WORKSPACE {
            let manifest = std::fs::read_to_string(xtask::repository().join(name).join("Cargo.toml")).unwrap();
            assert!(manifest.contains(&format!("name = \"{}\"", package(name))), "{name}");
        }
        assert!(choose(&["no-such".into()]).unwrap_err().to_string().contains("no-such"));
    }
}

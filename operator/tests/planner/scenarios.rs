//! Golden tests of the planner: every file in `scenarios/` is a world and what happens to it, step by step; the snapshot
//! is what the planner does.

use std::fmt::Write as _;

use crate::world::{World, merge};
use altiplano_operator::fleet::memory::Memory;
use altiplano_operator::upgrade::plan as upgrade;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scenario {
    /// What is to be seen.
    about: String,
    world: Value,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    at: u64,
    #[serde(default)]
    what: String,
    /// Merged into the world (RFC 7396) before planning.
    #[serde(default)]
    change: Value,
    /// Rounds of planning.
    #[serde(default = "one")]
    rounds: u32,
}

fn one() -> u32 {
    1
}

#[test]
fn scenarios() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/planner/scenarios");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "scenarios are missing from {folder}");
    for file in files {
        let yaml = std::fs::read_to_string(&file).unwrap();
        let scenario: Scenario =
            serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        insta::assert_snapshot!(name, play(scenario));
    }
}

fn play(scenario: Scenario) -> String {
    let mut text = format!("{}\n", scenario.about);
    let mut world: World = serde_json::from_value(scenario.world).unwrap();
    let mut memory = Memory::default();
    let mut agents = upgrade::Memory::default();
    for step in scenario.steps {
        if !step.change.is_null() {
            let mut value = serde_json::to_value(&world).unwrap();
            merge(&mut value, &step.change);
            world = serde_json::from_value(value).unwrap();
        }
        let what = if step.what.is_empty() { String::new() } else { format!(" {}", step.what) };
        let _ = writeln!(text, "\n{}s{what}", step.at);
        for _ in 0..step.rounds {
            text.push_str(&world.step(&mut memory, &mut agents, step.at));
        }
    }
    text
}

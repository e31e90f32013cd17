//! What must hold of every plan, whatever the fleet looks like.

use std::collections::BTreeMap;

use crate::world::{EPOCH, Held, Report, World, WorldModel, WorldNode, now};
use altiplano_crds::names::MAX_MODELS_PER_NODE;
use altiplano_operator::fleet::children::{Children, children};
use altiplano_operator::fleet::diff;
use altiplano_operator::fleet::events::events;
use altiplano_operator::fleet::memory::Memory;
use altiplano_operator::fleet::plan::{NodePlan, WantedEntry};
use altiplano_operator::fleet::status::status;
use proptest::prelude::*;
use serde_json::json;

const GIB: i64 = 1 << 30;

fn model() -> impl Strategy<Value = (WorldModel, i64)> {
    let numbers = (0_i32..4, 1_i64..40, -2_i32..3, any::<bool>(), 0_i64..5, 0_i32..3, 0_i32..3);
    numbers.prop_map(|(replicas, needs, priority, pinned, created, surge, unavailable)| {
        let policy = if pinned { "Never" } else { "WhenIdle" };
        let spec = json!({
            "replicas": replicas,
            // Another number of sequences for each: then no two share an estimate.
            "placement": {"priority": priority},
            "engine": {"gpu": "Required"},
            "unload": {"policy": policy},
            "rollout": {"maxSurge": surge, "maxUnavailable": unavailable.max(i32::from(surge == 0))},
        });
        (WorldModel { created, spec, ..WorldModel::default() }, needs)
    })
}

fn node() -> impl Strategy<Value = WorldNode> {
    let kinds = prop_oneof![Just("NoSchedule"), Just("NoExecute"), Just("PreferNoSchedule")];
    (8_i64..80, any::<bool>(), proptest::option::weighted(0.2, kinds), 0_i64..100).prop_map(
        |(gpu, cordoned, taint, seen)| WorldNode {
            gpu,
            cordoned: cordoned && gpu % 3 == 0,
            taints: taint.map(|effect| format!("special:{effect}")).into_iter().collect(),
            seen,
            ..WorldNode::default()
        },
    )
}

/// A fleet in which every node knows what every model needs.
fn fleet() -> impl Strategy<Value = World> {
    let parts = (proptest::collection::vec(node(), 1..6), proptest::collection::vec(model(), 1..12));
    (parts, proptest::collection::vec((any::<bool>(), any::<bool>()), 72)).prop_map(|((nodes, models), held)| {
        let mut world = World::default();
        let mut needs = BTreeMap::new();
        for (index, (mut model, need)) in models.into_iter().enumerate() {
            let name = format!("m{index}");
            model.spec["context"] = json!({"parallel": index + 1});
            needs.insert(name.clone(), need);
            world.models.insert(name, model);
        }
        for (index, mut node) in nodes.into_iter().enumerate() {
            for (at, (name, need)) in needs.iter().enumerate() {
                let (holds, ready) = held[(index * 12 + at) % held.len()];
                if holds && need * GIB <= node.gpu * GIB {
                    node.holds.push(Held { model: name.clone(), ..Held::default() });
                }
                let state = if holds && ready { "Ready" } else { "Estimated" };
                let report = Report { state: state.into(), needs: Some(*need), file: true, ..Report::default() };
                node.reports.insert(name.clone(), report);
            }
            world.nodes.insert(format!("n{index}"), node);
        }
        world
    })
}

/// Rounds at one moment until nothing is left to write; every round is done to the world.
fn settle(world: &mut World, memory: &mut Memory, second: u64) -> Result<(), TestCaseError> {
    let mut last = String::new();
    for _ in 0..40 {
        let (fleet, plan) = world.plan(memory, second);
        let writes = diff::nodes(&fleet, &plan, EPOCH);
        if writes.is_empty() {
            return Ok(());
        }
        last = format!("{writes:?}");
        for write in writes {
            let name = write.object().1;
            world.hold(&plan, &name);
            // The agent does as it is told: what is gone is not reported, what is new loads and is ready.
            let node = world.nodes.get_mut(&name).unwrap();
            for (model, report) in &mut node.reports {
                let holds = node.holds.iter().any(|held| held.model == *model && !held.estimate);
                report.state = if holds { "Ready".into() } else { "Estimated".into() };
            }
        }
    }
    Err(TestCaseError::fail(format!("40 rounds and still: {last}")))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// A fleet to which its plan has been done gets no other plan.
    #[test]
    fn a_plan_that_was_done_is_followed_by_silence(mut world in fleet()) {
        let mut memory = Memory::default();
        settle(&mut world, &mut memory, 100)?;
        let (fleet, plan) = world.plan(&mut memory, 100);
        prop_assert_eq!(diff::nodes(&fleet, &plan, EPOCH), vec![]);
    }

    /// No node gets more guaranteed memory than it has: what a plan adds fits beside what is pinned there, and nothing
    /// that was placed by the plan is too large for its node.
    #[test]
    fn nobody_is_promised_what_is_not_there(world in fleet()) {
        let mut memory = Memory::default();
        let (_, plan) = world.plan(&mut memory, 100);
        for (name, planned) in &plan.nodes {
            let NodePlan::Hold(entries) = planned else { continue };
            let node = &world.nodes[name];
            let need = |model: &str| node.reports[model].needs.unwrap_or_default();
            let served: Vec<String> = entries
                .iter()
                .filter_map(|entry| match entry {
                    WantedEntry::Model(assignment) => Some(assignment.name.clone()),
                    WantedEntry::AsItIs(_) => None,
                })
                .collect();
            let is_new = |model: &&String| !node.holds.iter().any(|held| held.model == **model);
            let pinned = |model: &str| world.models[model].spec["unload"]["policy"] == "Never";
            for new in served.iter().filter(is_new) {
                let others: i64 = served.iter().filter(|model| *model != new && pinned(model)).map(|m| need(m)).sum();
                prop_assert!(need(new) + others <= node.gpu, "{} of {} with {} pinned on {}", need(new), node.gpu, others, name);
            }
        }
    }

    /// A status that was written is not written again as long as nothing happens, however late it is.
    #[test]
    fn a_status_does_not_change_by_itself(mut world in fleet()) {
        let mut memory = Memory::default();
        settle(&mut world, &mut memory, 100)?;
        let (fleet, plan) = world.plan(&mut memory, 100);
        for model in fleet.models() {
            let there = &plan.models[&model.uid];
            let Children { service, .. } = children(&fleet, model, there);
            let mut written = model.clone();
            written.status = status(&fleet, model, there, &service, "", now(100));
            let again = status(&fleet, &written, there, &service, "", now(100_000));
            prop_assert_eq!(&again, &written.status);
            prop_assert_eq!(events(&written.status, &again), vec![]);
            for condition in &again.conditions {
                prop_assert!(condition.message.chars().count() <= 1024);
                prop_assert!(!condition.reason.is_empty());
            }
        }
    }

    /// Never more than 64 entries on a node, never one model twice, and no more replicas than wanted.
    #[test]
    fn lists_are_bounded_and_without_repetition(world in fleet()) {
        let mut memory = Memory::default();
        let (_, plan) = world.plan(&mut memory, 100);
        for planned in plan.nodes.values() {
            let NodePlan::Hold(entries) = planned else { continue };
            prop_assert!(entries.len() <= MAX_MODELS_PER_NODE);
            let mut uids: Vec<&str> = entries
                .iter()
                .map(|entry| match entry {
                    WantedEntry::Model(assignment) => assignment.uid.as_str(),
                    WantedEntry::AsItIs(raw) => raw.0["uid"].as_str().unwrap_or_default(),
                })
                .collect();
            let count = uids.len();
            uids.sort_unstable();
            uids.dedup();
            prop_assert_eq!(uids.len(), count);
        }
        for model in plan.models.values() {
            prop_assert!(model.placed <= model.wanted, "{} of {}", model.placed, model.wanted);
        }
    }
}

/// The 65th model finds the list full, and is told so.
#[test]
fn the_list_of_a_node_ends_at_64() {
    let mut world = World::default();
    world.nodes.insert("a".into(), WorldNode::default());
    for index in 0..65 {
        let model = WorldModel { created: index, ..WorldModel::default() };
        world.models.insert(format!("m{index:02}"), model);
        let report = Report { state: "Estimated".into(), needs: Some(0), ..Report::default() };
        world.nodes.get_mut("a").unwrap().reports.insert(format!("m{index:02}"), report);
    }
    let (_, plan) = world.plan(&mut Memory::default(), 1);
    let NodePlan::Hold(entries) = &plan.nodes["a"] else { panic!("the node is gone") };
    assert_eq!(entries.len(), 64);
    let last = &plan.models["uid-m64"];
    assert_eq!(last.placed, 0);
    assert_eq!(last.rejections["a"].to_string(), "holds 64 models already");
    assert_eq!(last.rejections["a"].reason(), "NodeFull");
}

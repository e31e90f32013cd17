//! Settled means silent: a minute with 50 settled models passes without a write besides Leases.

use std::time::Duration;

use altiplano_tests::scenario::Scenario;
use anyhow::{Result, ensure};

const MODELS: usize = 50;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_settled_models_write_nothing_for_a_minute() -> Result<()> {
    let mut world = Scenario::start("settled", 2).await?;
    let manifests: Vec<_> = (0..MODELS)
        .map(|index| world.toy(&format!("toy-{index}"), "unload: {policy: Never}\nengine: {threads: 1}"))
        .collect();
    world.apply(&manifests.join("\n---\n"))?;
    for index in 0..MODELS {
        world.wait_for_ready(&format!("toy-{index}"), "1/1").await?;
    }
    // What the last change set off, such as an event, may still be on its way.
    world.wait_for_quiet(Duration::from_secs(10)).await?;
    let before = world.cluster.writes()?.len();
    tokio::time::sleep(Duration::from_mins(1)).await;
    world.operator.proc.assert_running()?;
    for agent in &mut world.agents {
        agent.proc.assert_running()?;
    }
    let writes = world.cluster.writes()?.split_off(before);
    let leases = writes.iter().filter(|write| write.resource == "leases").count();
    ensure!(leases > 10, "only {leases} writes of Leases: operator and agents do not live");
    let ours: Vec<_> = writes.iter().filter(|write| write.is_ours()).map(ToString::to_string).collect();
    ensure!(ours.is_empty(), "{} writes in a settled minute:\n{}", ours.len(), ours.join("\n"));
    println!("{MODELS} settled models: 0 writes in 60 s besides {leases} of Leases");
    Ok(())
}

//! Rule 6, its second half: of two agents for one node, one writes, and the other takes over when it is gone.

use std::time::{Duration, Instant};

use altiplano_crds::ModelNode;
use altiplano_tests::scenario::{SOON, Scenario, toy_question};
use altiplano_tests::{Agent, ask, content, wait_for};
use anyhow::{Context as _, Result, ensure};
use kube::Api;

/// Three times the interval in which an agent renews its Lease, and a few status writes.
const A_WHILE: Duration = Duration::from_secs(12);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_agent_writes_only_when_the_first_is_gone() -> Result<()> {
    let mut world = Scenario::start("two-agents", 1).await?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let nodes: Api<ModelNode> = Api::all(world.client.clone());
    let name = world.node(0);
    let writer = || async {
        let status = nodes.get(&name).await?.status.context("no status")?;
        Ok::<String, anyhow::Error>(status.agent.context("no agent")?.pod_uid)
    };
    let first = world.agents[0].pod.uid.clone();
    assert_eq!(writer().await?, first);

    // Another Pod on the same node, as while a DaemonSet is rolled by force.
    let second = Agent::start(world.cluster, &name, world.agent_options()).await?;
    ensure!(second.pod.uid != first, "the second agent has a Pod of its own");
    world.wait_for_quiet(Duration::from_secs(5)).await?;
    let version = nodes.get(&name).await?.metadata.resource_version;
    let until = Instant::now() + A_WHILE;
    while Instant::now() < until {
        assert_eq!(writer().await?, first, "the second agent has written over a live one");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(nodes.get(&name).await?.metadata.resource_version, version, "nothing has changed, yet somebody wrote");

    world.agents[0].proc.kill()?;
    wait_for("the second agent writes", SOON, || async {
        let uid = writer().await.map_err(|error| error.to_string())?;
        if uid == second.pod.uid { Ok(()) } else { Err(format!("the status is of {uid}")) }
    })
    .await?;
    world.wait_for_ready("toy", "1/1").await?;
    let (prompt, answer) = toy_question(0)?;
    let endpoint = world.wait_for_endpoints("toy", 1).await?.remove(0);
    assert_eq!(content(&ask(&endpoint.url, "toy", &prompt).await?)?, answer);
    Ok(())
}

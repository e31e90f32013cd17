//! Rule 8 of the contract, its longest test: an API server that is gone is no reason to move anything.

use std::time::{Duration, Instant};

use altiplano_tests::scenario::{Scenario, toy_question};
use altiplano_tests::{Operator, ask, content};
use anyhow::{Result, ensure};

/// Rule 8: the API server gone for three minutes under load: not one move, not one failed request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_outage_moves_nothing() -> Result<()> {
    const OUTAGE: Duration = Duration::from_mins(3);
    // A grace period far below the outage: only the rules can keep the models where they are.
    let arguments = ["--node-loss-grace-seconds", "10", "--agent-lease-seconds", "15"];
    let mut world = Scenario::start_with("outage", 3, &arguments).await?;
    let (prompt, answer) = toy_question(0)?;
    world.apply(&world.toy("toy", "replicas: 2"))?;
    world.wait_for_ready("toy", "2/2").await?;
    let endpoints = world.wait_for_endpoints("toy", 2).await?;
    let before = world.placed().await?;
    let workers: Vec<_> = world.agents.iter().map(altiplano_tests::Agent::workers).collect();

    world.cluster.kill_api_server()?;
    let end = Instant::now() + OUTAGE;
    let load: Vec<_> = endpoints
        .iter()
        .map(|endpoint| {
            let (url, prompt, answer) = (endpoint.url.clone(), prompt.clone(), answer.clone());
            tokio::spawn(async move {
                let mut answered = 0_u32;
                while Instant::now() < end {
                    let whole = ask(&url, "toy", &prompt).await?;
                    ensure!(content(&whole)? == answer, "{whole}");
                    answered += 1;
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Ok(answered)
            })
        })
        .collect();
    let mut answered = 0;
    for task in load {
        answered += task.await??;
    }
    world.cluster.restart_api_server().await?;
    println!("{answered} requests in the outage, none failed");
    ensure!(answered > 100, "only {answered} requests: no load");
    for agent in &mut world.agents {
        agent.proc.assert_running()?;
    }
    // The leader may have ended, as it must when it cannot renew; a Deployment would start it again.
    if world.operator.proc.try_wait()?.is_some() {
        world.operator = Operator::start(world.cluster, &arguments).await?;
    }
    world.operator.ready().await?;
    // Watch for moves for as long as stale agents would need to be given up.
    let until = Instant::now() + Duration::from_secs(40);
    while Instant::now() < until {
        let now = world.placed().await?;
        ensure!(now == before, "a model was moved: {before:?} -> {now:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let workers_now: Vec<_> = world.agents.iter().map(altiplano_tests::Agent::workers).collect();
    assert_eq!(workers_now, workers, "no worker was started or ended");
    world.wait_for_ready("toy", "2/2").await?;
    world.delete("toy").await
}

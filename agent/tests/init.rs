//! `altiplano-agent init` with real processes: what dies, what lives on, and who takes over whom.
#![expect(clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::time::{Duration, Instant};

use altiplano_test_models::toy;
use futures::StreamExt as _;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use support::{Agent, agent_process, below, chat, command, gone, is_alive, kill, within, workers};

/// A container as far as processes go: `init` is number 1 and sees nobody else.
const NAMESPACE: [&str; 7] =
    ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"];

async fn contained(more: &str) -> Agent {
    let agent = Agent::start(&NAMESPACE, &["init", "serve"], &[("toy", &toy::path(), more)], &[], &[]).await;
    agent.says("default/toy: Ready").await;
    agent
}

/// The one worker.
async fn worker(agent: &Agent) -> Pid {
    agent.until("there is one worker", || async { workers(agent.pid()).len() == 1 }).await;
    workers(agent.pid())[0]
}

fn process(agent: &Agent) -> Pid {
    agent_process(agent.pid()).unwrap_or_else(|| panic!("no agent: {:?}", below(agent.pid())))
}

fn endless() -> Value {
    let mut body = chat("toy", toy::ENDLESS_QUESTION);
    body["stream"] = json!(true);
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_outlive_their_agent_and_the_next_one_takes_them_over() {
    let agent = contained("").await;
    let loaded = worker(&agent).await;
    for times in 1..=2 {
        let first = process(&agent);
        let mut stream = agent.post(&endless()).await.expect("an answer").bytes_stream();
        stream.next().await.expect("a first part").expect("bytes");
        kill(first, Signal::KILL);
        let died = Instant::now();
        // What went through the dead agent ends, and does not hang.
        within("the stream's end", async { while let Some(Ok(_)) = stream.next().await {} }).await;
        agent
            .until("another agent answers for the model", || async {
                agent.get("/v1/models/toy").await.is_some_and(|model| model.contains(r#""state":"Ready""#))
            })
            .await;
        println!("adopted {:?} after the agent's death", died.elapsed());
        agent.check("toy").await;
        assert_ne!(process(&agent), first);
        assert_eq!(worker(&agent).await, loaded, "the same process");
        assert_eq!(agent.log().matches("took over a worker").count(), times, "{}", agent.story());
        assert_eq!(agent.log().matches("loading the model").count(), 1, "{}", agent.story());
    }

    // The agent that took it over sees its end at once, knows how it was, and loads the model again.
    kill(loaded, Signal::KILL);
    agent.until("the end is noticed", || async { agent.log().contains("was killed by SIGKILL") }).await;
    agent.check("toy").await;
    assert_ne!(worker(&agent).await, loaded);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_while_it_loads_leaves_no_orphan() {
    let agent = Agent::start(&NAMESPACE, &["init", "serve"], &[("toy", &toy::path(), "")], &[], &[]).await;
    for _ in 0..3 {
        agent.until("there is a worker or an agent to kill", || async { agent_process(agent.pid()).is_some() }).await;
        let patience = Instant::now() + Duration::from_secs(2);
        while workers(agent.pid()).is_empty() && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if let Some(process) = agent_process(agent.pid()) {
            kill(process, Signal::KILL);
            gone(process).await;
        }
    }
    agent.takes_requests().await;
    agent.check("toy").await;
    worker(&agent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_to_init_drains_the_agent_and_takes_everything_along() {
    let mut agent = contained("").await;
    let loaded = worker(&agent).await;
    let mut body = chat("toy", toy::LONG_QUESTION);
    body["stream"] = json!(true);
    let mut stream = agent.post(&body).await.expect("an answer").bytes_stream();
    let first = stream.next().await.expect("a first part").expect("bytes");
    let (init, _) = below(agent.pid()).into_iter().next().expect("init");
    kill(init, Signal::TERM);
    let mut text = String::from_utf8_lossy(&first).into_owned();
    while let Some(part) = stream.next().await {
        text.push_str(&String::from_utf8_lossy(&part.expect("the stream is not cut")));
    }
    assert!(text.trim_end().ends_with("[DONE]"), "the answer is not whole: {text}");
    assert!(agent.exited().await.success(), "{}", agent.story());
    assert!(!is_alive(loaded));
}

/// In a container the kernel ends everybody with number 1; elsewhere the agent and the workers see to it themselves.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_outlives_init() {
    for prefix in [&NAMESPACE[..], &[]] {
        let agent = Agent::start(prefix, &["init", "serve"], &[("toy", &toy::path(), "")], &[], &[]).await;
        agent.says("default/toy: Ready").await;
        let all = below(agent.pid());
        let init = if prefix.is_empty() { agent.pid() } else { all.first().expect("init").0 };
        assert!(workers(agent.pid()).len() == 1 && all.len() >= 2, "{all:?}");
        kill(init, Signal::KILL);
        for (pid, _) in all {
            gone(pid).await;
        }
        // The container starts again, on the files of the last one: everything is loaded again.
        let mut again = command();
        again.args(["init", "serve"]).arg(agent.state.with_file_name("models.yaml"));
        again.args(["--listen", &agent.shared.to_string(), "--state-dir"]).arg(&agent.state);
        let next = Agent::spawn(&mut again, agent.shared, tempfile::tempdir().expect("a folder"));
        next.takes_requests().await;
        next.check("toy").await;
        assert_eq!(workers(next.pid()).len(), 1, "{}", next.story());
    }
}

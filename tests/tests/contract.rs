//! The contract between operator and agent (ARCHITECTURE.md), rule by rule, on a real API server. Rules whose tests take
//! minutes have files of their own: `outage.rs`, `two_agents.rs`.

use std::time::{Duration, Instant};

use altiplano_crds::conditions::{reasons, types};
use altiplano_crds::{ModelDeployment, ModelNode, names};
use altiplano_tests::scenario::{SOON, Scenario, toy_question};
use altiplano_tests::{NAMESPACE, Operator, ask, content, http, wait_for};
use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use rustix::process::Signal;
use serde_json::json;

/// Rule 1 and 6: own status and own Lease, and nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agents_token_reaches_only_its_own_node() -> Result<()> {
    let world = Scenario::start("tokens", 2).await?;
    let (here, elsewhere) = (world.node(0), world.node(1));
    let identity = world.cluster.pod_identity(NAMESPACE, "altiplano-agent", "token", Some(&here)).await?;
    let mine = world.cluster.client_with(&identity.token).await?;
    let unbound = world.cluster.pod_identity(NAMESPACE, "altiplano-agent", "nowhere", None).await?;
    let unbound = world.cluster.client_with(&unbound.token).await?;
    let params = PatchParams::default();
    let nodes = Api::<ModelNode>::all(mine.clone());
    let leases = Api::<Lease>::namespaced(mine.clone(), NAMESPACE);
    let status = async |who: &Client, node: &str| {
        let patch = Patch::Merge(json!({"status": {"deviceSummary": "forged"}}));
        Api::<ModelNode>::all(who.clone()).patch_status(node, &params, &patch).await.map(drop)
    };
    // Who may not even see a Lease may still try to write it.
    let all_leases = Api::<Lease>::namespaced(world.client.clone(), NAMESPACE);
    let renew = async |name: &str| {
        let lease = all_leases.get(name).await?;
        leases.replace(name, &PostParams::default(), &lease).await.map(drop)
    };
    // Its own status and Lease may be written (the agent puts the truth back with its next write) …
    status(&mine, &here).await?;
    match renew(&names::agent_lease(&here)).await {
        // The agent itself renewed it in between: not refused either.
        Err(kube::Error::Api(conflict)) if conflict.code == 409 => {}
        answer => answer?,
    }
    // … and nothing else: the policy says whose they are, or the role says no.
    let epoch = Patch::Merge(json!({"spec": {"epoch": 999}}));
    let made = ModelNode::new("made-by-an-agent", altiplano_crds::ModelNodeSpec { epoch: 1, ..Default::default() });
    let secrets = Api::<k8s_openapi::api::core::v1::Secret>::namespaced(mine.clone(), NAMESPACE);
    let leader = names::LEADER_LEASE;
    for (what, answer, says) in [
        ("another node's status", status(&mine, &elsewhere).await, elsewhere.as_str()),
        ("another agent's Lease", renew(&names::agent_lease(&elsewhere)).await, &names::agent_lease(&elsewhere)),
        ("the leader's Lease", renew(leader).await, leader),
        ("a token without node", status(&unbound, &here).await, "must be bound to a pod that runs on a node"),
        ("its own spec", nodes.patch(&here, &params, &epoch).await.map(drop), "cannot patch"),
        ("a new object", nodes.create(&PostParams::default(), &made).await.map(drop), "cannot create"),
        ("its own object's end", nodes.delete(&here, &DeleteParams::default()).await.map(drop), "cannot delete"),
        ("Secrets", secrets.list(&ListParams::default()).await.map(drop), "cannot list"),
    ] {
        match answer {
            Err(kube::Error::Api(refusal)) if refusal.message.contains(says) => {}
            other => bail!("{what}: expected a refusal that says `{says}`, got {other:?}"),
        }
    }

    // The token ends with its pod.
    world.cluster.delete_pod(&identity).await?;
    wait_for("the token's end", SOON, || async {
        match status(&mine, &here).await {
            Err(error) if error.to_string().contains("Unauthorized") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// Rule 2: SIGSTOP the leader, let another lead, SIGCONT: nothing changes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_leader_changes_nothing() -> Result<()> {
    let mut world = Scenario::start("fence", 1).await?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let first_epoch = world.model_node(0).await?.spec.epoch;

    world.operator.proc.signal(Signal::STOP)?;
    let mut second = Operator::start(world.cluster, &[]).await?;
    second.ready().await?;
    // The new leader shows that it leads by changing something.
    world.cluster.kubectl(&["-n", &world.namespace, "scale", "mdep/toy", "--replicas=0"])?;
    world.wait_for_condition("toy", types::READY, "False", reasons::SCALED_TO_ZERO).await?;
    world.cluster.kubectl(&["-n", &world.namespace, "scale", "mdep/toy", "--replicas=1"])?;
    world.wait_for_ready("toy", "1/1").await?;
    let node = world.model_node(0).await?;
    ensure!(node.spec.epoch > first_epoch, "epoch {} after {first_epoch}", node.spec.epoch);
    world.wait_for_quiet(Duration::from_secs(3)).await?;
    let settled = (world.model_node(0).await?.spec, world.get("toy").await?.status);

    world.operator.proc.signal(Signal::CONT)?;
    let status = world.operator.proc.ended(SOON).await?;
    ensure!(!status.success(), "a leader that lost its Lease ended with {status}");
    let node = world.model_node(0).await?;
    assert_eq!((node.spec, world.get("toy").await?.status), settled, "the stale leader changed something");

    // Even by hand, with the operator's own rights: the API server refuses a lower epoch.
    let operator = world.cluster.client_with(&second.pod.token).await?;
    let back = Patch::Merge(json!({"spec": {"epoch": first_epoch}}));
    let refused = Api::<ModelNode>::all(operator).patch(&world.node(0), &PatchParams::default(), &back).await;
    let text = format!("{:?}", refused.err().context("a lower epoch was accepted")?);
    ensure!(text.contains("epoch must not go back"), "{text}");
    world.operator = second;
    world.delete("toy").await
}

/// Rule 3.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strangers_entry_does_not_stay() -> Result<()> {
    let world = Scenario::start("stranger", 1).await?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let nodes = Api::<ModelNode>::all(world.client.clone());
    let mut forged = world.model_node(0).await?.spec.models[0].clone();
    forged.0["uid"] = "stranger".into();
    let models = [world.model_node(0).await?.spec.models, vec![forged]].concat();
    let patch = Patch::Merge(json!({"spec": {"models": models}}));
    nodes.patch(&world.node(0), &PatchParams::default(), &patch).await?;
    wait_for("the end of the stranger's entry", SOON, || async {
        let node = world.model_node(0).await.map_err(|error| error.to_string())?;
        let status = node.status.unwrap_or_default();
        if node.spec.models.len() == 1 && status.models.len() == 1 {
            Ok(())
        } else {
            Err(format!("{:?}", node.spec.models))
        }
    })
    .await?;
    world.wait_for_ready("toy", "1/1").await?;
    world.delete("toy").await
}

/// Rules 4 and 5: an absent ModelNode and a Node made again are no reason to unload.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_model_node_interrupts_nothing() -> Result<()> {
    let world = Scenario::start("deleted", 1).await?;
    let (prompt, answer) = toy_question(0)?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let url = world.wait_for_endpoints("toy", 1).await?.remove(0).url;
    let worker = world.agents[0].workers();

    let nodes = Api::<ModelNode>::all(world.client.clone());
    let old = world.model_node(0).await?.metadata.uid;
    nodes.delete(&world.node(0), &DeleteParams::default()).await?;
    assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, answer);
    wait_for("another ModelNode with the model in it", SOON, || async {
        let node = world.model_node(0).await.map_err(|error| error.to_string())?;
        let states: Vec<_> = node.status.iter().flat_map(|status| &status.models).map(|m| m.state.clone()).collect();
        if node.metadata.uid != old && states == ["Ready"] { Ok(()) } else { Err(format!("{node:?}")) }
    })
    .await?;
    assert_eq!(world.agents[0].workers(), worker, "the worker is the same process");
    assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, answer);
    world.wait_for_ready("toy", "1/1").await?;
    world.delete("toy").await
}

/// Rule 5.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_made_again_keeps_its_models() -> Result<()> {
    let world = Scenario::start("again", 1).await?;
    let (prompt, answer) = toy_question(0)?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let url = world.wait_for_endpoints("toy", 1).await?.remove(0).url;
    let worker = world.agents[0].workers();
    let model_node = world.model_node(0).await?.metadata.uid;

    Api::<Node>::all(world.client.clone()).delete(&world.node(0), &DeleteParams::default()).await?;
    world.cluster.create_node(&world.node(0), &[("test", &world.namespace)], &[]).await?;
    // Longer than the garbage collector takes for an owner that is gone.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, answer);
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert_eq!(world.model_node(0).await?.metadata.uid, model_node, "the ModelNode went with the Node");
    assert_eq!(world.agents[0].workers(), worker, "the worker is the same process");
    world.wait_for_ready("toy", "1/1").await?;
    world.delete("toy").await
}

/// Rule 7: an agent whose clock is ten minutes off is as fresh as any other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agents_wrong_clock_is_no_matter() -> Result<()> {
    let world = Scenario::start_with("clock", 1, &["--agent-lease-seconds", "20"]).await?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    // What such an agent would write: its Lease's times, moved by ten minutes, back and forth.
    let leases = Api::<Lease>::namespaced(world.client.clone(), NAMESPACE);
    let name = names::agent_lease(&world.node(0));
    let mut moves = Vec::new();
    for round in 0..24 {
        let minutes: i64 = if round % 2 == 0 { -10 } else { 10 };
        let lease = leases.get(&name).await?;
        let renewed = lease.spec.and_then(|spec| spec.renew_time).context("a Lease without renewTime")?;
        let shifted = renewed.0 + k8s_openapi::jiff::SignedDuration::from_mins(minutes);
        let patch = Patch::Merge(
            json!({"spec": {"renewTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(shifted)}}),
        );
        leases.patch(&name, &PatchParams::default(), &patch).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let ready = world.endpoints("toy").await?.iter().all(|endpoint| endpoint.ready);
        if !ready {
            moves.push(round);
        }
    }
    ensure!(moves.is_empty(), "unready in rounds {moves:?}");
    world.wait_for_ready("toy", "1/1").await?;
    world.delete("toy").await
}

/// Rule 8: a node that stays away loses its model to another one, after the grace period.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_nodes_models_move() -> Result<()> {
    let mut world =
        Scenario::start_with("lost", 3, &["--node-loss-grace-seconds", "3", "--agent-lease-seconds", "15"]).await?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    // Agents that have shown that they live: an operator does not count what it never saw alive.
    let leases = Api::<Lease>::namespaced(world.client.clone(), NAMESPACE);
    for index in 0..3 {
        let name = names::agent_lease(&world.node(index));
        let renewed = |lease: Lease| lease.spec.and_then(|spec| spec.renew_time);
        let before = renewed(leases.get(&name).await?);
        wait_for(format!("the next renewal of {name}"), SOON, || async {
            let now = renewed(leases.get(&name).await.map_err(|error| error.to_string())?);
            if now == before { Err(format!("{now:?}")) } else { Ok(()) }
        })
        .await?;
    }
    let first = world.wait_for_endpoints("toy", 1).await?.remove(0).node;
    let index = (0..3).find(|index| world.node(*index) == first).context("a node of ours")?;
    world.agents[index].proc.kill()?;
    wait_for("an endpoint on another node", SOON, || async {
        let endpoints = world.endpoints("toy").await.map_err(|error| error.to_string())?;
        let ready = endpoints.iter().find(|endpoint| endpoint.ready && endpoint.node != first);
        ready.map(|_| ()).ok_or(format!("{endpoints:?}"))
    })
    .await?;
    // Two of three away: more than half. Nothing moves any more.
    let second = world.endpoints("toy").await?.into_iter().find(|e| e.ready).context("ready")?.node;
    let index = (0..3).find(|index| world.node(*index) == second).context("a node of ours")?;
    world.agents[index].proc.kill()?;
    wait_for("no ready endpoint", SOON, || async {
        let endpoints = world.endpoints("toy").await.map_err(|error| error.to_string())?;
        if endpoints.iter().all(|endpoint| !endpoint.ready) { Ok(()) } else { Err(format!("{endpoints:?}")) }
    })
    .await?;
    let before = world.placed().await?;
    // Longer than the grace period.
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(world.placed().await?, before, "a model moved although most nodes are stale");
    // They come back, and so does the model.
    world.restart_agent(index).await?;
    world.wait_for_ready("toy", "1/1").await?;
    world.delete("toy").await
}

/// Rule 9.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_unreadable_entry_stops_no_other() -> Result<()> {
    let mut world = Scenario::start("unreadable", 1).await?;
    let (prompt, answer) = toy_question(0)?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let url = world.wait_for_endpoints("toy", 1).await?.remove(0).url;
    // A newer operator's entry: the operator of today must not put it right, so it goes first.
    world.operator.proc.kill()?;
    let mut newer = world.model_node(0).await?.spec.models[0].clone();
    newer.0["uid"] = "newer".into();
    newer.0["mode"] = "Hibernate".into();
    let models = [vec![newer], world.model_node(0).await?.spec.models].concat();
    let patch = Patch::Merge(json!({"spec": {"models": models}}));
    Api::<ModelNode>::all(world.client.clone()).patch(&world.node(0), &PatchParams::default(), &patch).await?;
    let message = wait_for("Failed/UnsupportedSpec", SOON, || async {
        let node = world.model_node(0).await.map_err(|error| error.to_string())?;
        let models = node.status.unwrap_or_default().models;
        let newer = models.iter().find(|m| m.uid == "newer" && m.reason.as_deref() == Some(reasons::UNSUPPORTED_SPEC));
        let toy = models.iter().any(|m| m.uid != "newer" && m.state == "Ready");
        match newer {
            Some(found) if toy && found.state == "Failed" => Ok(found.message.clone().unwrap_or_default()),
            _ => Err(format!("{models:?}")),
        }
    })
    .await?;
    ensure!(message.contains("Hibernate"), "the message names what cannot be read: {message}");
    assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, answer);
    world.operator = Operator::start(world.cluster, &[]).await?;
    world.operator.ready().await?;
    world.delete("toy").await
}

/// Rule 10: the status of an agent one contract older, and of one with states of the future.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_agent_is_understood() -> Result<()> {
    let mut world = Scenario::start("older", 1).await?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let uid = world.get("toy").await?.metadata.uid.context("uid")?;
    let node = world.model_node(0).await?;
    let state = node.status.context("status")?.models[0].clone();
    // The agent stands still: what follows is written in its name, with its own rights.
    world.agents[0].proc.signal(Signal::STOP)?;
    let mine = world.cluster.client_with(&world.agents[0].pod.token).await?;
    let nodes = Api::<ModelNode>::all(mine);
    let write = |contract: u32, state_name: &str, extra: serde_json::Value| {
        let mut entry = json!({"uid": uid, "revision": state.revision, "state": state_name, "port": state.port});
        if let (Some(entry), Some(extra)) = (entry.as_object_mut(), extra.as_object()) {
            entry.extend(extra.clone());
        }
        Patch::Merge(json!({"status": {"agent": {"contract": contract}, "models": [entry]}}))
    };
    let older = write(names::CONTRACT_VERSION - 1, "Ready", json!({}));
    nodes.patch_status(&world.node(0), &PatchParams::default(), &older).await?;
    world.wait_for_ready("toy", "1/1").await?;
    world.wait_for_endpoints("toy", 1).await?;
    // A state that this operator does not know is "not ready", and no error.
    let future = write(names::CONTRACT_VERSION + 1, "Hibernating", json!({}));
    nodes.patch_status(&world.node(0), &PatchParams::default(), &future).await?;
    wait_for("an endpoint that is not ready", SOON, || async {
        let endpoints = world.endpoints("toy").await.map_err(|error| error.to_string())?;
        if endpoints.iter().all(|endpoint| !endpoint.ready) { Ok(()) } else { Err(format!("{endpoints:?}")) }
    })
    .await?;
    world.operator.proc.assert_running()?;
    world.agents[0].proc.signal(Signal::CONT)?;
    world.delete("toy").await
}

/// Rule 13: a namespace deleted while the operator is away ends when one comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_goes_even_with_the_operator_away() -> Result<()> {
    let mut world = Scenario::start("away", 1).await?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    world.operator.proc.kill()?;
    let namespaces = Api::<Namespace>::all(world.client.clone());
    namespaces.delete(&world.namespace, &DeleteParams::default()).await?;
    let models = Api::<ModelDeployment>::namespaced(world.client.clone(), &world.namespace);
    wait_for("the deletion to reach the model", SOON, || async {
        let model = models.get("toy").await.map_err(|error| error.to_string())?;
        model.metadata.deletion_timestamp.map(|_| ()).ok_or("not deleted yet".to_owned())
    })
    .await?;
    world.operator = Operator::start(world.cluster, &[]).await?;
    wait_for("the namespace's end", SOON * 2, || async {
        match namespaces.get_opt(&world.namespace).await {
            Ok(None) => Ok(()),
            other => Err(format!("{:?}", other.map(|found| found.and_then(|n| n.status)))),
        }
    })
    .await?;
    wait_for("no worker", SOON, || {
        let processes = world.agents[0].workers();
        std::future::ready(if processes.is_empty() { Ok(()) } else { Err(format!("{processes:?}")) })
    })
    .await
}

/// Endpoints are the operator's, named and labelled as Kubernetes' own conventions have it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoint_slices_are_what_load_balancers_expect() -> Result<()> {
    let world = Scenario::start("slices", 1).await?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    world.wait_for_endpoints("toy", 1).await?;
    let slices = Api::<EndpointSlice>::namespaced(world.client.clone(), &world.namespace);
    let slice = slices.list(&ListParams::default()).await?.items.into_iter().next().context("a slice")?;
    let labels = slice.metadata.labels.clone().unwrap_or_default();
    assert_eq!(labels.get("kubernetes.io/service-name").map(String::as_str), Some("toy"));
    assert_eq!(labels.get("endpointslice.kubernetes.io/managed-by").map(String::as_str), Some(names::MANAGED_BY));
    let owners = slice.metadata.owner_references.clone().unwrap_or_default();
    assert_eq!((owners.len(), owners[0].kind.as_str(), owners[0].controller), (1, "ModelDeployment", Some(true)));
    let port = &slice.ports.as_ref().context("ports")?[0];
    assert_eq!(port.name.as_deref(), Some(names::PORT_NAME));
    assert_eq!(slice.endpoints[0].node_name.as_deref(), Some(world.node(0).as_str()));
    // The model's own port serves that model and no other.
    let url = world.endpoints("toy").await?.remove(0).url;
    let response = http()?
        .post(format!("{url}/v1/chat/completions"))
        .json(&json!({"model": "another", "messages": [{"role": "user", "content": "hi"}]}))
        .send()
        .await?;
    assert_eq!(response.status(), 404);
    world.delete("toy").await
}

//! The upgrade of the agents: the chart's DaemonSet, its real controller, real agents with real streams. Scheduler and
//! kubelets are played by the harness.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use altiplano_crds::ModelNode;
use altiplano_crds::conditions::{reasons, types};
use altiplano_tests::scenario::{SOON, Scenario, toy_question};
use altiplano_tests::{
    AgentOptions, Kubelet, Life, NAMESPACE, Operator, ask, content, http, render_chart, wait_for, workers_of,
};
use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt as _};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const AGENTS: &str = "altiplano-agent";

/// Tokens of a stream that runs for longer than an upgrade takes to be seen: two lengths, so that not all end at once.
const LONG: [u64; 2] = [2000, 1500];

/// A scenario whose agents are the Pods of the chart's DaemonSet.
struct World {
    scenario: Scenario,
    kubelet: Kubelet,
}

impl World {
    async fn start(prefix: &str, nodes: usize) -> Result<Self> {
        let scenario = Scenario::start(prefix, 0).await?;
        let names: Vec<String> = (0..nodes).map(|index| scenario.node(index)).collect();
        for name in &names {
            scenario.cluster.create_node(name, &[("test", &scenario.namespace)], &[]).await?;
        }
        clear(&scenario).await?;
        let options = scenario.agent_options();
        // Tests stop workers for a while, so that their streams cannot end meanwhile.
        let more = ["--drain-seconds", "120", "--hang-seconds", "600"].map(str::to_owned);
        let arguments = [options.arguments.as_slice(), &more].concat();
        let kubelet = Kubelet::start(scenario.cluster, &names, AgentOptions { arguments, ..options }).await?;
        let world = Self { scenario, kubelet };
        world.helm(&[])?;
        for name in &names {
            world.scenario.wait_for_devices(name).await?;
        }
        Ok(world)
    }

    /// The DaemonSet as `helm upgrade` with these values would leave it.
    fn helm(&self, values: &[&str]) -> Result<()> {
        let nodes = format!("agent.nodeSelector.test={}", self.scenario.namespace);
        let grace = ["agent.drainSeconds=120", nodes.as_str()];
        let yaml = render_chart(&[&grace, values].concat())?;
        let is_ours = |document: &&str| document.lines().any(|line| line == "kind: DaemonSet");
        let document = yaml.split("\n---\n").find(is_ours).context("the chart has no DaemonSet")?;
        self.scenario.cluster.kubectl_with(&["apply", "-f", "-"], document).map(drop)
    }

    fn annotate(&self, what: &str) -> Result<()> {
        let arguments = ["-n", NAMESPACE, "annotate", "--overwrite", "daemonset", AGENTS, what];
        self.scenario.cluster.kubectl(&arguments).map(drop)
    }

    /// Waits for that condition of the DaemonSet; returns its message.
    async fn wait_for_agents(&self, reason: &str, text: &str) -> Result<String> {
        let sets = Api::<DaemonSet>::namespaced(self.scenario.client.clone(), NAMESPACE);
        let waited = wait_for(format!("{reason} with {text:?} on the DaemonSet"), SOON * 2, || async {
            let set = sets.get(AGENTS).await.map_err(|error| error.to_string())?;
            let conditions = set.status.and_then(|status| status.conditions).unwrap_or_default();
            let told = conditions.iter().find(|is| is.type_ == types::AGENTS_UP_TO_DATE);
            let told = told.ok_or_else(|| "no condition".to_owned())?;
            let message = told.message.clone().unwrap_or_default();
            let is_it = told.reason.as_deref() == Some(reason) && message.contains(text);
            if is_it { Ok(message) } else { Err(format!("{:?} {message}", told.reason)) }
        })
        .await;
        waited.with_context(|| format!("{:?}\n{}", self.kubelet.lives(), self.scenario.operator.proc.log_tail()))
    }

    async fn events(&self) -> Result<Vec<(String, String)>> {
        let events = Api::<Event>::namespaced(self.scenario.client.clone(), NAMESPACE);
        let about = ListParams::default().fields(&format!("involvedObject.name={AGENTS}"));
        let word = |event: Event| (event.type_.unwrap_or_default(), event.reason.unwrap_or_default());
        Ok(events.list(&about).await?.items.into_iter().map(word).collect())
    }

    /// Nodes with a mark, and whether they are told to drain.
    async fn marks(&self) -> Result<Vec<(String, bool)>> {
        let nodes = Api::<ModelNode>::all(self.scenario.client.clone());
        let ours = |node: &ModelNode| node.name_any().starts_with(&self.scenario.namespace);
        let mark = |node: ModelNode| Some((node.name_any(), node.spec.upgrade.as_ref()?.drain));
        Ok(nodes.list(&ListParams::default()).await?.items.into_iter().filter(ours).filter_map(mark).collect())
    }

    /// All that is left goes, or the next scenario's operator would replace this one's agents.
    async fn end(self) -> Result<()> {
        let sets = Api::<DaemonSet>::namespaced(self.scenario.client.clone(), NAMESPACE);
        sets.delete(AGENTS, &DeleteParams::background()).await?;
        let pods = Api::<Pod>::namespaced(self.scenario.client.clone(), NAMESPACE);
        wait_for("the end of the agents", SOON, || async {
            let all = pods.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
            let left: Vec<_> = all.iter().filter(|pod| !pod.owner_references().is_empty()).map(Pod::name_any).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await
    }
}

/// What a scenario that has failed has left behind: its agents are dead, and nobody would end their Pods.
async fn clear(scenario: &Scenario) -> Result<()> {
    let cluster = scenario.cluster;
    cluster.kubectl(&["-n", NAMESPACE, "delete", "daemonset", AGENTS, "--ignore-not-found"])?;
    let pods = Api::<Pod>::namespaced(scenario.client.clone(), NAMESPACE);
    wait_for("no agents of before", SOON, || async {
        let all = pods.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
        let left: Vec<_> = all.iter().filter(|pod| !pod.owner_references().is_empty()).map(Pod::name_any).collect();
        for name in &left {
            // Gone in between is as good.
            let _ = pods.delete(name, &DeleteParams::default().grace_period(0)).await;
        }
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await
}

/// A streamed answer of a given length.
#[derive(Clone, Debug)]
struct Stream {
    begun: Instant,
    ended: Instant,
}

/// Why a stream is not whole.
enum Broken {
    /// It never began.
    Refused(anyhow::Error),
    Cut(anyhow::Error),
}

/// Asks for exactly that many tokens and reads them as they come; less is an error.
async fn stream(url: &str, model: &str, tokens: u64) -> Result<Stream, Broken> {
    let begun = Instant::now();
    let answer = begin(url, model, tokens).await.map_err(Broken::Refused)?;
    let text = answer.text().await.with_context(|| format!("the stream from {url} broke")).map_err(Broken::Cut)?;
    is_whole(url, &text, tokens).map_err(Broken::Cut)?;
    Ok(Stream { begun, ended: Instant::now() })
}

async fn begin(url: &str, model: &str, tokens: u64) -> Result<reqwest::Response> {
    let body = json!({"model": model, "stream": true, "max_tokens": tokens, "ignore_eos": true, "temperature": 0,
                      "stream_options": {"include_usage": true},
                      "messages": [{"role": "user", "content": "Tell me a long story about the altiplano."}]});
    let answer = http()?.post(format!("{url}/v1/chat/completions")).json(&body).send().await?;
    let status = answer.status();
    ensure!(status.is_success(), "{url}: {status}: {}", answer.text().await?);
    Ok(answer)
}

fn is_whole(url: &str, text: &str, tokens: u64) -> Result<()> {
    let events = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    let events: Vec<Value> = events.map(serde_json::from_str).collect::<Result<_, _>>()?;
    let generated = events.iter().find_map(|event| event["usage"]["completion_tokens"].as_u64());
    ensure!(generated == Some(tokens), "{url}: {generated:?} of {tokens} tokens; the last: {:?}", events.last());
    ensure!(text.trim_end().ends_with("[DONE]"), "{url}: no end: {:?}", events.last());
    Ok(())
}

/// Where a request would go: ready endpoints, as a load balancer sees them.
async fn ready(slices: &Api<EndpointSlice>, model: &str) -> Result<Vec<(String, String)>> {
    let of = ListParams::default().labels(&format!("kubernetes.io/service-name={model}"));
    let mut ready = Vec::new();
    for slice in slices.list(&of).await? {
        let port = slice.ports.iter().flatten().find_map(|port| port.port).context("a slice without port")?;
        for endpoint in slice.endpoints {
            if endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(true) {
                let address = endpoint.addresses.first().context("an endpoint without address")?;
                let node = endpoint.node_name.unwrap_or_default();
                ready.push((altiplano_tests::reachable(address, port), node));
            }
        }
    }
    Ok(ready)
}

/// A list of endpoints of which a machine that does something else has lost sight for so long says nothing.
const STALE: Duration = Duration::from_secs(1);

/// Asks a ready endpoint of the model again and again; what fails is an error.
fn ask_on(world: &Scenario, model: &'static str, stop: Arc<AtomicBool>) -> Result<JoinHandle<Result<u32>>> {
    let slices = Api::<EndpointSlice>::namespaced(world.client.clone(), &world.namespace);
    let (prompt, expected) = toy_question(0)?;
    Ok(tokio::spawn(async move {
        let mut answered = 0;
        while !stop.load(Ordering::Relaxed) {
            let endpoints = ready(&slices, model).await?;
            let looked = Instant::now();
            let (url, node) = endpoints.get(answered as usize % endpoints.len().max(1)).context("nobody is ready")?;
            let answer = match ask(url, model, &prompt).await {
                // What a load balancer knows is a moment old, not more.
                Err(_) if looked.elapsed() > STALE => continue,
                answer => answer.with_context(|| format!("{model} on {node}"))?,
            };
            ensure!(content(&answer)? == expected, "{answer}");
            answered += 1;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(answered)
    }))
}

/// Streams to a model on one node, one after the other, for as long as the node takes new requests.
struct Streams {
    node: String,
    /// When the last one began.
    begun: Arc<Mutex<Option<Instant>>>,
    task: JoinHandle<Result<Vec<Stream>>>,
}

impl Streams {
    fn start(world: &Scenario, model: &'static str, node: &str, tokens: u64, stop: &Arc<AtomicBool>) -> Self {
        let slices = Api::<EndpointSlice>::namespaced(world.client.clone(), &world.namespace);
        let begun = Arc::new(Mutex::new(None));
        let (last, stop, its) = (Arc::clone(&begun), Arc::clone(stop), node.to_owned());
        let task = tokio::spawn(async move {
            let mut streams = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let endpoint = ready(&slices, model).await?.into_iter().find(|(_, of)| *of == its);
                let Some((url, _)) = endpoint else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let looked = Instant::now();
                *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(looked);
                match stream(&url, model, tokens).await {
                    Ok(stream) => streams.push(stream),
                    // It was refused, by an agent that the list knew no more of.
                    Err(Broken::Refused(_)) if looked.elapsed() > STALE => {}
                    Err(Broken::Refused(error) | Broken::Cut(error)) => return Err(error),
                }
            }
            Ok(streams)
        });
        Self { node: node.to_owned(), begun, task }
    }

    fn has_begun_after(&self, at: Instant) -> bool {
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner) > Some(at)
    }
}

/// Workers that stand still until this is dropped, and go on then.
struct Held(Vec<Pid>);

impl Drop for Held {
    fn drop(&mut self) {
        for pid in &self.0 {
            // One that has ended meanwhile needs nothing.
            let _ = kill_process(*pid, Signal::CONT);
        }
    }
}

/// A stream from the toy model of that agent that runs, and cannot end before it is let go on.
async fn held_stream(url: &str, agent: u32) -> Result<(JoinHandle<Result<Stream>>, Held)> {
    let long = tokio::spawn({
        let url = url.to_owned();
        async move { stream(&url, "toy", 3000).await.map_err(|(Broken::Refused(error) | Broken::Cut(error))| error) }
    });
    wait_for("the stream's begin", SOON, || async {
        let slots = http().map_err(|error| error.to_string())?.get(format!("{url}/slots")).send().await;
        let slots: Value = slots.map_err(|e| e.to_string())?.json().await.map_err(|e| e.to_string())?;
        let runs = slots.as_array().into_iter().flatten().any(|slot| slot["is_processing"] == true);
        if runs { Ok(()) } else { Err(slots.to_string()) }
    })
    .await?;
    let workers: Vec<_> =
        workers_of(agent).into_iter().filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).collect();
    ensure!(!workers.is_empty(), "agent {agent} has no worker");
    for pid in &workers {
        kill_process(*pid, Signal::STOP)?;
    }
    Ok((long, Held(workers)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_after_the_other_without_a_lost_request() -> Result<()> {
    let mut world = World::start("rolls", 2).await?;
    let scenario = &world.scenario;
    // One that moves, and one that is everywhere and cannot.
    scenario.apply(&scenario.toy("toy", "rollout: {drainSeconds: 120}"))?;
    scenario.apply(&scenario.toy("both", "replicas: 2\nrollout: {drainSeconds: 120}\ncontext: {parallel: 4}"))?;
    scenario.wait_for_ready("toy", "1/1").await?;
    scenario.wait_for_ready("both", "2/2").await?;
    world.wait_for_agents(reasons::UP_TO_DATE, "2 of 2").await?;

    let scenario = &world.scenario;
    let stop = Arc::new(AtomicBool::new(false));
    let clients = [ask_on(scenario, "toy", Arc::clone(&stop))?, ask_on(scenario, "both", Arc::clone(&stop))?];
    let nodes = [scenario.node(0), scenario.node(1)];
    let each = nodes.iter().flat_map(|node| LONG.map(|tokens| (node, tokens)));
    let streams: Vec<_> = each.map(|(node, tokens)| Streams::start(scenario, "both", node, tokens, &stop)).collect();
    let before = world.kubelet.lives();
    assert_eq!(before.len(), 2, "{before:?}");

    world.helm(&["agent.podAnnotations.revision=second"])?;
    // Between which two looks each node was asked to drain.
    let mut drained: Vec<(String, Instant, Instant)> = Vec::new();
    let (deadline, mut restarted, mut looked) = (Instant::now() + SOON * 5, false, Instant::now());
    loop {
        let before = std::mem::replace(&mut looked, Instant::now());
        let (marks, lives) = (world.marks().await?, world.kubelet.lives());
        ensure!(marks.len() <= 1, "two at a time: {marks:?}");
        for (node, _) in marks.iter().filter(|(_, drain)| *drain) {
            if !drained.iter().any(|(known, ..)| known == node) {
                drained.push((node.clone(), before, Instant::now()));
            }
        }
        // Another operator goes on where the first one was: what it has decided stands in the cluster.
        if !restarted && lives.iter().any(|life| life.deleted.is_some()) {
            restarted = true;
            world.scenario.operator.proc.kill()?;
            world.scenario.operator = Operator::start(world.scenario.cluster, &[]).await?;
        }
        if lives.len() == 4 && marks.is_empty() && lives.iter().filter(|life| life.ended.is_some()).count() == 2 {
            break;
        }
        let operator = world.scenario.operator.proc.log_tail();
        ensure!(Instant::now() < deadline, "not done: {marks:?} {lives:?}\n{operator}");
        for task in &clients {
            ensure!(!task.is_finished(), "a client gave up: {marks:?} {lives:?}\n{operator}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.wait_for_agents(reasons::UP_TO_DATE, "2 of 2").await?;
    assert_eq!(drained.len(), 2, "{drained:?}");
    wait_for("streams on the new agents", SOON, || {
        let has_begun = |node: &String, at| streams.iter().any(|its| its.node == *node && its.has_begun_after(at));
        let left: Vec<_> = drained.iter().filter(|(node, _, at)| !has_begun(node, *at)).collect();
        std::future::ready(if left.is_empty() { Ok(()) } else { Err(format!("none on {left:?}")) })
    })
    .await?;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        let answered = client.await??;
        println!("{answered} requests answered, none failed");
        ensure!(answered > 10, "only {answered} requests: no load");
    }
    // Each agent was asked to drain while a stream ran on it, and that stream ended whole, as all did.
    let mut whole = Vec::new();
    for Streams { node, task, .. } in streams {
        whole.extend(task.await??.into_iter().map(|stream| (node.clone(), stream)));
    }
    for (node, before, after) in &drained {
        let runs = |(on, stream): &(String, Stream)| on == node && stream.begun < *after && *before < stream.ended;
        ensure!(whole.iter().any(runs), "no stream on {node} between {before:?} and {after:?}: {whole:?}");
    }
    // The second one went only when the first one's successor served.
    let lives = world.kubelet.lives();
    let [_, _, third, fourth] = &lives[..] else { anyhow::bail!("{lives:?}") };
    let end =
        |node: &str| before_on(&lives, node).and_then(|life| life.deleted).context("an agent that was not replaced");
    ensure!(third.node == drained[0].0 && fourth.node == drained[1].0, "{lives:?} {drained:?}");
    ensure!(third.ready.context("never Ready")? < end(&fourth.node)?, "{lives:?}");
    ensure!(lives.iter().all(|life| !life.killed), "an agent did not end in its time: {lives:?}");
    world.scenario.wait_for_ready("toy", "1/1").await?;
    world.scenario.wait_for_ready("both", "2/2").await?;
    let events = world.events().await?;
    for reason in [reasons::ROLLING_OUT, reasons::UP_TO_DATE] {
        ensure!(events.contains(&("Normal".to_owned(), reason.to_owned())), "{events:?}");
    }
    world.end().await
}

/// The first Pod of that node.
fn before_on<'a>(lives: &'a [Life], node: &str) -> Option<&'a Life> {
    lives.iter().find(|life| life.node == node)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_agent_that_never_is_ready_stops_the_upgrade() -> Result<()> {
    let world = World::start("blocked", 2).await?;
    let scenario = &world.scenario;
    let (prompt, expected) = toy_question(0)?;
    scenario.apply(&scenario.toy("toy", "replicas: 2"))?;
    scenario.wait_for_ready("toy", "2/2").await?;
    world.wait_for_agents(reasons::UP_TO_DATE, "2 of 2").await?;
    world.helm(&["agent.podAnnotations.broken=yes", "agent.upgrade.progressDeadlineSeconds=30"])?;
    let message = world.wait_for_agents(reasons::UPGRADE_BLOCKED, "no other agent is replaced").await?;
    ensure!(message.contains("ImagePullBackOff: no such image"), "{message}");
    wait_for("metrics that tell of it", SOON, || async {
        let metrics = world.scenario.operator.metrics().await.map_err(|error| format!("{error:#}"))?;
        let expected = ["altiplano_operator_agent_upgrade_blocked 1", "altiplano_operator_agents_outdated 1"];
        let told = expected.iter().all(|line| metrics.lines().any(|is| is == *line));
        if told { Ok(()) } else { Err(metrics) }
    })
    .await?;
    wait_for("a Warning", SOON, || async {
        let events = world.events().await.map_err(|error| format!("{error:#}"))?;
        let warned = events.contains(&("Warning".to_owned(), reasons::UPGRADE_BLOCKED.to_owned()));
        if warned { Ok(()) } else { Err(format!("{events:?}")) }
    })
    .await?;
    // The other goes on serving, and is what it was.
    let lives = world.kubelet.lives();
    let serving: Vec<_> = lives.iter().filter(|life| life.deleted.is_none()).collect();
    let [left] = &serving[..] else { anyhow::bail!("{lives:?}") };
    let endpoint = scenario.wait_for_endpoints("toy", 1).await?.remove(0);
    assert_eq!(endpoint.node, left.node);
    assert_eq!(content(&ask(&endpoint.url, "toy", &prompt).await?)?, expected);

    // Back to what was: the broken one is replaced at once, the other is not old any more.
    world.helm(&["agent.upgrade.progressDeadlineSeconds=30"])?;
    world.wait_for_agents(reasons::UP_TO_DATE, "2 of 2").await?;
    scenario.wait_for_ready("toy", "2/2").await?;
    let now = world.kubelet.lives();
    let untouched = now.iter().any(|life| life.uid == left.uid && life.deleted.is_none());
    ensure!(untouched && now.len() == 3, "{now:?}");
    world.scenario.delete("toy").await?;
    world.end().await
}

/// `crds.install=false` and a CRD of before `spec.upgrade`: models are placed as ever, no Pod is deleted, the condition says
/// why; with the new CRD it goes on by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_crd_holds_the_upgrade_and_nothing_else() -> Result<()> {
    let world = World::start("oldcrd", 1).await?;
    let scenario = &world.scenario;
    let (prompt, expected) = toy_question(0)?;
    world.wait_for_agents(reasons::UP_TO_DATE, "1 of 1").await?;
    let crd = scenario.cluster.kubectl(&["get", "crd", "modelnodes.altiplano.dev", "-o", "json"])?;
    let crd: Value = serde_json::from_str(&crd)?;
    let pointer = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
    let mut old = crd.clone();
    let known = old.pointer_mut(pointer).and_then(Value::as_object_mut).context("properties of the spec")?;
    ensure!(known.remove("upgrade").is_some(), "{known:?}");
    let replace = |crd: &Value| {
        let patch = json!([{"op": "replace", "path": "/spec/versions", "value": crd["spec"]["versions"]}]).to_string();
        let arguments = ["patch", "crd", "modelnodes.altiplano.dev", "--type=json", "-p", &patch];
        scenario.cluster.kubectl(&arguments).map(drop)
    };
    replace(&old)?;
    let held = async {
        world.helm(&["agent.podAnnotations.revision=second"])?;
        world.wait_for_agents(reasons::UPGRADE_BLOCKED, "does not keep spec.upgrade").await?;
        scenario.apply(&scenario.toy("toy", ""))?;
        scenario.wait_for_ready("toy", "1/1").await?;
        let endpoint = scenario.wait_for_endpoints("toy", 1).await?.remove(0);
        assert_eq!(content(&ask(&endpoint.url, "toy", &prompt).await?)?, expected);
        ensure!(world.marks().await?.is_empty() && world.kubelet.lives().len() == 1, "{:?}", world.kubelet.lives());
        anyhow::Ok(())
    };
    let held = held.await;
    // The next scenario needs it, too.
    replace(&crd)?;
    held?;
    world.wait_for_agents(reasons::UP_TO_DATE, "1 of 1").await?;
    ensure!(world.kubelet.lives().len() == 2, "{:?}", world.kubelet.lives());
    scenario.wait_for_ready("toy", "1/1").await?;
    world.scenario.delete("toy").await?;
    world.end().await
}

/// One node, so nowhere to move to; held in the middle, then gone on with; at last a Pod that somebody deletes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_upgrade_goes_back_to_work_and_a_deleted_pod_drains() -> Result<()> {
    let world = World::start("held", 1).await?;
    let scenario = &world.scenario;
    let (prompt, expected) = toy_question(0)?;
    scenario.apply(&scenario.toy("toy", "rollout: {drainSeconds: 120}"))?;
    scenario.wait_for_ready("toy", "1/1").await?;
    world.wait_for_agents(reasons::UP_TO_DATE, "1 of 1").await?;
    let url = scenario.wait_for_endpoints("toy", 1).await?.remove(0).url;
    let (long, held) = held_stream(&url, world.kubelet.lives()[0].pid).await?;
    world.helm(&["agent.podAnnotations.revision=second"])?;
    let condition = |reason: &'static str| scenario.wait_for_condition("toy", types::READY, "False", reason);
    world.wait_for_agents(reasons::ROLLING_OUT, "its running requests end").await?;
    condition(reasons::AGENT_UPGRADE).await?;
    ensure!(!long.is_finished(), "the stream was too short to see anything");
    drop(held);

    // Held: the agent takes requests again, while the stream runs on.
    world.annotate("altiplano.dev/upgrade-paused=true")?;
    world.wait_for_agents(reasons::UPGRADE_PAUSED, "0 of 1").await?;
    scenario.wait_for_ready("toy", "1/1").await?;
    let url = scenario.wait_for_endpoints("toy", 1).await?.remove(0).url;
    assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, expected);
    long.await??;
    assert_eq!(world.kubelet.lives().len(), 1, "{:?}", world.kubelet.lives());

    world.annotate("altiplano.dev/upgrade-paused=false")?;
    world.wait_for_agents(reasons::UP_TO_DATE, "1 of 1").await?;
    scenario.wait_for_ready("toy", "1/1").await?;
    assert_eq!(world.kubelet.lives().len(), 2);

    // kubectl delete pod: the stream that runs ends whole, within the Pod's own grace period.
    let url = scenario.wait_for_endpoints("toy", 1).await?.remove(0).url;
    let (last, held) = held_stream(&url, world.kubelet.lives()[1].pid).await?;
    let pods = Api::<Pod>::namespaced(scenario.client.clone(), NAMESPACE);
    let uid = world.kubelet.lives()[1].uid.clone();
    let pod = pods.list(&ListParams::default()).await?.items.into_iter().find(|pod| pod.uid().as_ref() == Some(&uid));
    let pod = pod.context("the new Pod")?;
    ensure!(!last.is_finished(), "the stream was too short to see anything");
    pods.delete(&pod.name_any(), &DeleteParams::default()).await?;
    let asked = Instant::now();
    drop(held);
    let whole = last.await??;
    ensure!(whole.ended > asked, "the stream had ended before");
    scenario.wait_for_ready("toy", "1/1").await?;
    wait_for("its successor", SOON, || async {
        let lives = world.kubelet.lives();
        let done = lives.len() == 3 && lives[1].ended.is_some() && !lives[1].killed;
        if done { Ok(()) } else { Err(format!("{lives:?}")) }
    })
    .await?;
    scenario.wait_for_ready("toy", "1/1").await?;
    world.scenario.delete("toy").await?;
    world.end().await
}

//! `cargo xtask demo`: all of Altiplano on this machine, with a real control plane, until Ctrl-C.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs,
    io::{Write as _, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use altiplano_crds::ModelDeployment;
use altiplano_tests::{Agent, AgentOptions, ControlPlane, Operator, chat, reachable, repository, wait_for};
use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{Api, Client, ResourceExt, api::ListParams};

const MODEL_FILE: &str = "tests/models/toy/altiplano-toy.gguf";
const QUESTION: &str = "What can you do?";
const READY: Duration = Duration::from_mins(3);
const STOP: Duration = Duration::from_secs(45);

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let once = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [flag] if flag == "--once" => true,
        other => {
            eprintln!("demo: only --once is understood, not {other:?}");
            return ExitCode::from(2);
        }
    };
    // Dropped at the end whatever happens: it removes what was put outside the run's own folder.
    let mut files = Files::default();
    let shown = tokio::select! {
        shown = show(&mut files) => shown,
        _ = tokio::signal::ctrl_c() => {
            println!("\nstopped before the end");
            return ExitCode::from(130);
        }
    };
    let ended = match shown {
        Ok(shown) => shown.end(once).await,
        error => error.map(drop),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts everything, shows a model become ready and answer.
async fn show(files: &mut Files) -> Result<Shown> {
    let examples = Examples::read()?;
    for path in &examples.files {
        files.place(path)?;
    }

    say("starting etcd, kube-apiserver and kube-controller-manager");
    let start = Instant::now();
    let cluster = ControlPlane::start().await?;
    cluster.install_chart(&[]).await?;
    let mut operator = Operator::start(&cluster, &[]).await?;
    operator.ready().await?;
    let mut agents = Vec::new();
    for node in ["node-1", "node-2"] {
        cluster.create_node(node, &[], &[]).await?;
        let options = AgentOptions { file_roots: examples.roots(), ..AgentOptions::default() };
        agents.push(Agent::start(&cluster, node, options).await?);
    }
    say(&format!("the operator and two agents run, after {:.1} s", start.elapsed().as_secs_f32()));

    let applied = Instant::now();
    let names = apply(&cluster)?;
    let client = cluster.client().await?;
    become_ready(&cluster, &client, &names).await?;
    let ready = applied.elapsed();
    let name = names.first().context("examples/ holds no ModelDeployment")?;
    let endpoint = endpoint(&client, name).await?;

    say(&format!("asking {name} at {endpoint}: {QUESTION}"));
    let asked = applied.elapsed();
    let answer = chat(&endpoint, name, QUESTION, |piece| {
        print!("{piece}");
        // Shown as it comes; a terminal that is gone is no reason to stop.
        let _ = stdout().flush();
    })
    .await?;
    println!();
    ensure!(answer.finish_reason == "stop", "the answer was cut: {}", answer.finish_reason);

    say("figures");
    println!("  apply to Ready:         {:>6.3} s (every replica of {})", ready.as_secs_f64(), names.join(", "));
    println!("  apply to first token:   {:>6.3} s", (asked + answer.first_token).as_secs_f64());
    println!("  request to first token: {:>6.0} ms", answer.first_token.as_secs_f64() * 1000.0);
    println!("  usage: {}", answer.usage);
    for line in metrics(&agents).await? {
        println!("  {line}");
    }

    Ok(Shown { cluster, operator, agents, endpoint, model: name.clone() })
}

/// What runs once everything was shown.
struct Shown {
    cluster: ControlPlane,
    operator: Operator,
    agents: Vec<Agent>,
    endpoint: String,
    model: String,
}

impl Shown {
    /// Waits for Ctrl-C unless `once`, then ends all of it in order.
    async fn end(self, once: bool) -> Result<()> {
        if !once {
            self.how_to_go_on();
            tokio::signal::ctrl_c().await?;
            println!();
        }
        say("stopping");
        for agent in self.agents {
            let node = agent.node.clone();
            let status = agent.stop(STOP).await?;
            ensure!(status.success(), "the agent of {node} ended with {status}");
        }
        let status = self.operator.stop(STOP).await?;
        ensure!(status.success(), "the operator ended with {status}");
        self.cluster.stop().await?;
        say("all of it has ended");
        Ok(())
    }

    fn how_to_go_on(&self) {
        let Self { cluster, operator, endpoint, model, .. } = self;
        say("go on from another terminal, until Ctrl-C here ends all of it");
        println!("  export KUBECONFIG={}", cluster.kubeconfig().display());
        println!("  kubectl get mdep,modelnodes -o wide");
        println!("  kubectl scale mdep/{model} --replicas=1");
        println!("  kubectl explain mdep.spec.context");
        println!("  curl {}/metrics", operator.url);
        println!(
            "  curl -N {endpoint}/v1/chat/completions -H 'Content-Type: application/json' -d '{}'",
            request(model)
        );
    }
}

fn request(model: &str) -> serde_json::Value {
    let question = "Tell me a long story about the altiplano.";
    serde_json::json!({"model": model, "stream": true, "messages": [{"role": "user", "content": question}]})
}

/// The files that `examples/` names as sources.
struct Examples {
    files: BTreeSet<PathBuf>,
}

impl Examples {
    fn read() -> Result<Self> {
        let mut files = BTreeSet::new();
        for entry in fs::read_dir(repository().join("examples")).context("no folder examples/")? {
            let yaml = fs::read_to_string(entry?.path())?;
            let uris = yaml.split_whitespace().filter_map(|word| word.trim_matches('"').strip_prefix("file://"));
            files.extend(uris.map(PathBuf::from));
        }
        Ok(Self { files })
    }

    fn roots(&self) -> Vec<PathBuf> {
        let roots: BTreeSet<_> = self.files.iter().filter_map(|path| path.parent()).collect();
        roots.into_iter().map(Path::to_path_buf).collect()
    }
}

/// Applies `examples/`; returns the names of the `ModelDeployment`s in it.
fn apply(cluster: &ControlPlane) -> Result<Vec<String>> {
    println!("$ kubectl apply --server-side -f examples/");
    let dir = repository().join("examples");
    let told = cluster.kubectl(&["apply", "--server-side", "-f", &dir.to_string_lossy()])?;
    print!("{told}");
    let names = told.lines().filter_map(|line| line.strip_prefix("modeldeployment.altiplano.dev/"));
    Ok(names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

/// Copies of the toy model at the paths that the examples name; removed when dropped.
#[derive(Default)]
struct Files {
    placed: Vec<PathBuf>,
}

impl Files {
    fn place(&mut self, path: &Path) -> Result<()> {
        if path.exists() {
            return Ok(());
        }
        let dir = path.parent().context("a file without folder")?;
        if !dir.exists() {
            fs::create_dir_all(dir).with_context(|| format!("could not create {}", dir.display()))?;
            self.placed.push(dir.to_path_buf());
        }
        let model = repository().join(MODEL_FILE);
        fs::copy(&model, path).with_context(|| format!("could not copy {} to {}", model.display(), path.display()))?;
        self.placed.push(path.to_path_buf());
        Ok(())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in self.placed.iter().rev() {
            // A folder that somebody else put something into stays.
            let _ = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
        }
    }
}

/// Shows kubectl's table whenever something in it changes, until every model is ready.
async fn become_ready(cluster: &ControlPlane, client: &Client, names: &[String]) -> Result<()> {
    let models = Api::<ModelDeployment>::default_namespaced(client.clone());
    let shown = RefCell::new(String::new());
    wait_for("every model to be ready", READY, || {
        let models = models.clone();
        let shown = &shown;
        async move {
            let mut lines = Vec::new();
            let mut ready = true;
            for name in names {
                let model = models.get_status(name).await?;
                let status = model.status.as_ref();
                let condition = status.and_then(|status| status.conditions.iter().find(|one| one.type_ == "Ready"));
                let whole = status.is_some_and(|status| status.ready_replicas >= model.spec.replicas);
                ready &= whole && condition.is_some_and(|condition| condition.status == "True");
                let column = |text: fn(&altiplano_crds::ModelDeploymentStatus) -> &Option<String>| {
                    status.and_then(|status| text(status).clone()).unwrap_or_default()
                };
                let (count, state) = (column(|status| &status.ready), column(|status| &status.state));
                let message = condition.map_or("", |condition| condition.message.as_str());
                lines.push(format!("{name}: {count} {state} {message}"));
            }
            let lines = lines.join("; ");
            if ready {
                return Ok(());
            }
            if *shown.borrow() != lines {
                println!("  {lines}");
                shown.replace(lines.clone());
            }
            bail!(lines)
        }
    })
    .await?;
    println!("$ kubectl get mdep,modelnodes -o wide");
    print!("{}", cluster.kubectl(&["get", "mdep,modelnodes", "-o", "wide"])?);
    Ok(())
}

/// The URL of one of the addresses behind the model's Service. There is no kube-proxy here that would serve its own.
async fn endpoint(client: &Client, model: &str) -> Result<String> {
    let slices = Api::<EndpointSlice>::default_namespaced(client.clone());
    let selector = ListParams::default().labels(&format!("kubernetes.io/service-name={model}"));
    wait_for(format!("an endpoint of {model} that is ready"), READY, || async {
        let slices = slices.list(&selector).await.map_err(|error| error.to_string())?;
        for slice in &slices.items {
            let port = slice.ports.iter().flatten().find_map(|port| port.port);
            let ready = slice
                .endpoints
                .iter()
                .find(|endpoint| endpoint.conditions.as_ref().is_some_and(|conditions| conditions.ready == Some(true)));
            if let (Some(port), Some(address)) = (port, ready.and_then(|endpoint| endpoint.addresses.first())) {
                return Ok(reachable(address, port));
            }
        }
        Err(format!("slices {:?}", slices.items.iter().map(ResourceExt::name_any).collect::<Vec<_>>()))
    })
    .await
}

/// A few of the agents' metrics: those that the answer moved.
async fn metrics(agents: &[Agent]) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for agent in agents {
        let text = agent.metrics().await?;
        let telling = ["requests_total", "tokens_total", "first_token_seconds_sum", "memory", "model_state"];
        let found = text.lines().filter(|line| {
            line.starts_with("altiplano_")
                && !line.ends_with(" 0")
                && telling.iter().any(|part| line.split(['{', ' ']).next().is_some_and(|name| name.contains(part)))
        });
        lines.extend(found.take(8).map(|line| format!("{}: {line}", agent.node)));
    }
    ensure!(!lines.is_empty(), "the agents report no metrics of the answer they gave");
    Ok(lines)
}

fn say(what: &str) {
    println!("\n==> {what}");
}

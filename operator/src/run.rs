//! The operator's life: watch, stand for leader, lead, give up.

use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::names;
use anyhow::{Context as _, bail};
use kube::runtime::watcher;
use kube::{Api, Client, Config};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::args::Args;
use crate::clock::Clock;
use crate::fleet::Planner;
use crate::fleet::announce::Announcer;
use crate::fleet::apply::Writer;
use crate::fleet::observe::Mirrors;
use crate::fleet::plan::Settings;
use crate::http::{self, HttpState};
use crate::leader::{Election, Times};
use crate::metrics::Metrics;
use crate::watch::follow;

/// Longest time that a leader that was asked to end may take.
const LAST_WRITES: Duration = Duration::from_secs(15);

/// Runs until `shutdown`, or until this process must not go on.
///
/// # Errors
/// What ended it: a port that is taken, no way to the API server, the loss of the lead, a task that ended on its own.
pub async fn run(args: Args, shutdown: CancellationToken) -> anyhow::Result<()> {
    let times = args.times()?;
    let clock = Clock::start();
    let metrics = Arc::new(Metrics::new().context("cannot register the metrics")?);
    let config = Config::infer().await.context("no way to the API server is configured")?;
    let client = Client::try_from(config).context("cannot make a client of the API server")?;
    let mirrors = Arc::new(Mirrors::new(args.stale_after()));
    let wake = Arc::new(Notify::new());

    let listener = TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    info!(listen = %listener.local_addr()?, version = env!("CARGO_PKG_VERSION"), "operator starts");
    let mut tasks = JoinSet::new();
    let state = HttpState { mirrors: Arc::clone(&mirrors), metrics: Arc::clone(&metrics), clock };
    tasks.spawn(serve(listener, state, shutdown.clone()));
    follow_all(&mut tasks, &client, &args, &mirrors, clock, &wake, &metrics);

    let tools = Tools { client, mirrors, clock, wake, metrics };
    let lead = lead(&args, times, tools, &shutdown);
    tokio::pin!(lead);
    let result = tokio::select! {
        result = &mut lead => result,
        ended = tasks.join_next() => match ended {
            // The HTTP server ends at once, the leader when it has written its last and given up the Lease.
            _ if shutdown.is_cancelled() => match tokio::time::timeout(LAST_WRITES, lead).await {
                Ok(result) => result,
                Err(_) => Err(anyhow::anyhow!("the leader did not end within {} s", LAST_WRITES.as_secs())),
            },
            Some(Err(error)) => Err(anyhow::Error::new(error).context("a task ended on its own")),
            Some(Ok(Err(error))) => Err(error),
            Some(Ok(Ok(()))) | None => Err(anyhow::anyhow!("a task ended on its own")),
        },
    };
    shutdown.cancel();
    // Watches have nothing to finish.
    tasks.shutdown().await;
    result
}

async fn serve(listener: TcpListener, state: HttpState, shutdown: CancellationToken) -> anyhow::Result<()> {
    let serve = axum::serve(listener, http::router(state));
    serve.with_graceful_shutdown(shutdown.cancelled_owned()).await.context("the HTTP server failed")
}

fn follow_all(
    tasks: &mut JoinSet<anyhow::Result<()>>,
    client: &Client,
    args: &Args,
    mirrors: &Mirrors,
    clock: Clock,
    wake: &Arc<Notify>,
    metrics: &Arc<Metrics>,
) {
    let Args { namespace, agent_daemon_set, .. } = args;
    let all = watcher::Config::default();
    let (key, value) = names::AGENT_LEASE_LABEL;
    let agents = all.clone().labels(&format!("{key}={value}"));
    let slices = all.clone().labels(&format!("endpointslice.kubernetes.io/managed-by={}", names::MANAGED_BY));
    macro_rules! follow {
        ($mirror:expr, $api:expr, $config:expr) => {
            let task = follow($api, $config, Arc::clone($mirror), clock, Arc::clone(wake), Arc::clone(metrics));
            tasks.spawn(async move {
                task.await;
                bail!("a watch ended")
            });
        };
    }
    follow!(&mirrors.models, Api::all(client.clone()), all.clone());
    follow!(&mirrors.model_nodes, Api::all(client.clone()), all.clone());
    follow!(&mirrors.nodes, Api::all(client.clone()), all.clone());
    let ours = all.clone().fields(&format!("metadata.name={agent_daemon_set}"));
    follow!(&mirrors.upgrade.daemon_sets, Api::namespaced(client.clone(), namespace), ours);
    follow!(&mirrors.upgrade.revisions, Api::namespaced(client.clone(), namespace), agents.clone());
    follow!(&mirrors.upgrade.pods, Api::namespaced(client.clone(), namespace), agents.clone());
    follow!(&mirrors.agents, Api::namespaced(client.clone(), namespace), agents);
    follow!(&mirrors.services, Api::all(client.clone()), all);
    follow!(&mirrors.slices, Api::all(client.clone()), slices);
}

/// What a leader works with.
struct Tools {
    client: Client,
    mirrors: Arc<Mirrors>,
    clock: Clock,
    wake: Arc<Notify>,
    metrics: Arc<Metrics>,
}

async fn lead(args: &Args, times: Times, tools: Tools, shutdown: &CancellationToken) -> anyhow::Result<()> {
    let Tools { client, mirrors, clock, wake, metrics } = tools;
    let identity = args.identity.clone().unwrap_or_else(own_identity);
    // Everything must have been seen before the first decision, and before the term is chosen.
    while !mirrors.missing().is_empty() {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = wake.notified() => {}
        }
    }
    let mut election = Election::new(client.clone(), &args.namespace, identity.clone(), times, clock);
    let (leadership, lease) = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        won = election.campaign(|| mirrors.highest_epoch()) => won,
    };
    metrics.leads(leadership.epoch());

    let (announcer, publish) = Announcer::new(client.clone(), &identity, clock, Arc::clone(&metrics));
    let agents = Arc::clone(&mirrors.agents);
    let answers = |answered: bool| {
        if answered {
            if agents.is_back(clock.mono()) {
                wake.notify_one();
            }
        } else {
            agents.broke_off(clock.mono());
        }
    };
    let writer = Writer { client, mirrors, clock, metrics, leadership: leadership.clone() };
    let settings = Settings { stale_after: args.stale_after(), loss_grace: args.loss_grace() };
    let mut planner = Planner::new(writer, announcer, settings, &args.cluster_domain);
    // The Lease is given up only after the planner has written its last.
    let stopped = CancellationToken::new();
    let plan = async {
        let result = planner.run(&wake, shutdown).await;
        stopped.cancel();
        result.context("cannot go on leading")
    };
    let hold = async { election.hold(&leadership, lease, answers, &stopped).await.context("cannot go on leading") };
    tokio::pin!(publish);
    tokio::select! {
        both = async { tokio::try_join!(plan, hold) } => both.map(|_| ()),
        () = &mut publish => bail!("the publisher of Events ended on its own"),
    }
}

/// The host's name and a random part: unique also where several run on one host.
fn own_identity() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}_{}", host.trim(), uuid::Uuid::new_v4())
}

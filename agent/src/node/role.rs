//! `altiplano-agent node`: the agent of one node of a cluster.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client, Config};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use altiplano_crds::ModelNodeStatus;

use super::recall::Recall;
use super::status::Identity;
use super::{Node, NodeError, cluster};
use crate::lease::{self, LeaseConfig};
use crate::setup::{PortTaken, ServingArgs, Setup, SetupError};

/// How long a model that leaves still accepts requests: until its `EndpointSlice`s have reached every node.
const LAME_DUCK: Duration = Duration::from_secs(1);

/// Longest time that the last write of status and Lease may take.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Options of `altiplano-agent node`.
#[derive(Args, Clone, Debug)]
pub struct NodeArgs {
    /// Name of the Node that the agent runs on.
    #[arg(long, env = "ALTIPLANO_NODE_NAME")]
    pub node_name: String,

    /// Namespace of the agent's Lease.
    #[arg(long, env = "ALTIPLANO_NAMESPACE", default_value = "altiplano-system")]
    pub namespace: String,

    /// Name of the agent's Pod.
    #[arg(long, env = "ALTIPLANO_POD_NAME")]
    pub pod_name: String,

    /// Uid of the agent's Pod.
    #[arg(long, env = "ALTIPLANO_POD_UID")]
    pub pod_uid: String,

    /// Address at which Services reach the agent; one of each family.
    #[arg(long, env = "ALTIPLANO_ADDRESS", value_delimiter = ',', required = true)]
    pub address: Vec<IpAddr>,

    /// Address and port of the shared port.
    #[arg(long, env = "ALTIPLANO_LISTEN", default_value = "0.0.0.0:8420")]
    pub listen: SocketAddr,

    /// Directory of model files and sockets.
    #[arg(long, env = "ALTIPLANO_STATE_DIR", default_value = "/var/lib/altiplano")]
    pub state_dir: PathBuf,

    /// Seconds after which a Lease that is not renewed counts as lost.
    #[arg(long, env = "ALTIPLANO_LEASE_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(3..=600))]
    pub lease_seconds: u64,

    /// How models are served.
    #[command(flatten)]
    pub serving: ServingArgs,
}

/// Why the agent ended other than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum RoleError {
    /// It could not start.
    #[error("the agent cannot start")]
    Setup(#[from] SetupError),
    /// There is no way to the API server.
    #[error("the agent finds no configuration for the API server")]
    Config(#[from] kube::config::InferConfigError),
    /// The configuration is of no use.
    #[error("the agent cannot use its configuration for the API server")]
    Client(#[source] Box<kube::Error>),
    /// The node's loop ended.
    #[error("the node's loop ended early")]
    Node(#[from] NodeError),
    /// A task ended.
    #[error("the task {0:?} ended early")]
    TaskEnded(&'static str),
    /// A task panicked.
    #[error("a task failed")]
    Task(#[from] tokio::task::JoinError),
}

/// Runs until `shutdown`, then drains.
pub async fn run(args: NodeArgs, shutdown: CancellationToken) -> Result<(), RoleError> {
    let client = Client::try_from(Config::infer().await?).map_err(|error| RoleError::Client(Box::new(error)))?;
    let setup =
        match Setup::open(&args.serving, args.state_dir.clone(), args.listen, PortTaken::Wait, LAME_DUCK, &shutdown)
            .await
        {
            Err(SetupError::Stopped) => return Ok(()),
            setup => setup?,
        };
    tracing::info!(
        node = args.node_name,
        pod = args.pod_name,
        version = env!("CARGO_PKG_VERSION"),
        shared = %setup.means.front.address(),
        "the agent has started"
    );
    let identity = Identity {
        pod_uid: args.pod_uid.clone(),
        started_at: jiff::Timestamp::now(),
        addresses: args.address.clone(),
        port: setup.means.front.address().port(),
    };
    let (status_out, status) = watch::channel(ModelNodeStatus::default());
    let (wanted_out, wanted) = watch::channel(None);
    let (seen_out, seen) = watch::channel(cluster::Seen::default());
    let (renewed_out, renewed) = watch::channel(None);

    let reconciler = Node::new(identity, setup.limits, setup.means.clone(), status_out.clone());
    let mut node = tokio::spawn(reconciler.run(wanted, shutdown.clone()));

    // These live until the node has drained, so that the cluster hears of it.
    let background = CancellationToken::new();
    let mut tasks: JoinSet<&'static str> = JoinSet::new();
    let config = LeaseConfig {
        node: args.node_name.clone(),
        pod_uid: args.pod_uid.clone(),
        duration: Duration::from_secs(args.lease_seconds),
    };
    let leases: Api<Lease> = Api::namespaced(client.clone(), &args.namespace);
    // After the writer: it may write only while the Lease is held.
    let release = CancellationToken::new();
    let holding = lease::hold(leases, config, renewed_out, release.clone());
    tasks.spawn(async move {
        holding.await;
        "lease"
    });
    let recall = Recall::new(&args.state_dir, &args.node_name);
    // Ends by itself, so it is none of the tasks that must not.
    let stand_in = tokio::spawn(recall.clone().stand_in(wanted_out.clone()));
    let (api, name, stop) = (Api::all(client.clone()), args.node_name.clone(), background.clone());
    tasks.spawn(async move {
        cluster::watch_own(api, &name, wanted_out, seen_out, recall, stop).await;
        "watch"
    });
    let (api, name, stop) = (Api::all(client), args.node_name.clone(), background.clone());
    tasks.spawn(async move {
        cluster::write_status(api, &name, status, seen, renewed, stop).await;
        "status"
    });

    let result = tokio::select! {
        ended = &mut node => ended?.map_err(RoleError::from),
        task = tasks.join_next() => match task {
            Some(task) => Err(RoleError::TaskEnded(task?)),
            None => Ok(()),
        },
    };
    shutdown.cancel();
    stand_in.abort();
    if !node.is_finished() {
        node.await??;
    }
    background.cancel();
    let last_words = async {
        while tasks.len() > 1 {
            if let Some(Err(error)) = tasks.join_next().await {
                tracing::error!(%error, "a task failed");
            }
        }
        release.cancel();
        while tasks.join_next().await.is_some() {}
    };
    if tokio::time::timeout(LAST_WORDS, last_words).await.is_err() {
        tracing::warn!("the API server does not answer; the last status is not written");
    }
    setup.close().await;
    result
}

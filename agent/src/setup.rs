//! What `node` and `serve` have in common: their options, and the means that come from them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;
use tokio_util::sync::CancellationToken;

use crate::cgroup::host_memory_limit;
use crate::front::{Front, FrontConfig, FrontError, FrontLimits};
use crate::metrics::AgentMetrics;
use crate::node::apply::Means;
use crate::node::estimates::Estimates;
use crate::node::plan::Limits;
use crate::node::sockets::socket_directory;
use crate::runner::spare;
use crate::runner::spawn::Runner;
use crate::runner::supervise::Patience;
use crate::store::{Store, StoreConfig, StoreError};

/// Models that are loaded at the same time.
const LOADING: usize = 4;

/// Wait between two looks at a store or a port that another agent still holds.
const WAIT: Duration = Duration::from_millis(500);

/// How long answers that are on their way out get when all models have drained.
const LISTENER_GRACE: Duration = Duration::from_secs(2);

/// Networks that no model file comes from unless the admin allows it.
const PRIVATE_NETWORKS: [(IpAddr, u8); 7] = [
    (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(172, 16, 0, 0)), 12),
    (IpAddr::V4(Ipv4Addr::new(192, 168, 0, 0)), 16),
    (IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), 10),
    (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
    (IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), 7),
    (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
];

/// Options of every role that serves models.
#[derive(Args, Clone, Debug)]
pub struct ServingArgs {
    /// Ports of the models, such as 8500-8599; any free port where it is absent.
    #[arg(long, env = "ALTIPLANO_MODEL_PORTS", value_parser = parse_ports)]
    pub model_ports: Option<RangeInclusive<u16>>,

    /// Directory below which file:// sources may lie; may be given several times.
    #[arg(long, env = "ALTIPLANO_FILE_ROOT", value_delimiter = ',')]
    pub file_root: Vec<PathBuf>,

    /// Fetch http:// sources too, which are not encrypted.
    #[arg(long, env = "ALTIPLANO_ALLOW_HTTP")]
    pub allow_http: bool,

    /// Fetch from private networks and from this machine.
    #[arg(long, env = "ALTIPLANO_ALLOW_PRIVATE_NETWORKS")]
    pub allow_private_networks: bool,

    /// Network that model files never come from, such as the cluster's Pods and Services; may be given several times.
    #[arg(long, env = "ALTIPLANO_DENY_NETWORK", value_delimiter = ',')]
    pub deny_network: Vec<IpNet>,

    /// Bytes that fetched model files may take; the whole file system where it is absent.
    #[arg(long, env = "ALTIPLANO_STORAGE_CAPACITY_BYTES")]
    pub storage_capacity_bytes: Option<u64>,

    /// Bytes of host memory that models may take; the cgroup's limit, or all there is, where it is absent.
    #[arg(long, env = "ALTIPLANO_MEMORY_LIMIT_BYTES")]
    pub memory_limit_bytes: Option<u64>,

    /// Bytes of each GPU that models may take, for GPUs that others use as well; all there is where it is absent.
    #[arg(long, env = "ALTIPLANO_DEVICE_MEMORY_LIMIT_BYTES")]
    pub device_memory_limit_bytes: Option<u64>,

    /// Seconds that running requests get to end when a model or the agent goes.
    #[arg(long, env = "ALTIPLANO_DRAIN_SECONDS", default_value_t = 30)]
    pub drain_seconds: u64,

    /// Longest time, in seconds, that one step of a worker's engine may take before the worker is taken to hang and is
    /// ended. A worker that is not heard of at all is ended after that time too, or after 30 s.
    #[arg(long, env = "ALTIPLANO_HANG_SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(5..))]
    pub hang_seconds: u64,

    /// File with the bearer token that the shared port asks for; no token is asked for where it is absent.
    #[arg(long, env = "ALTIPLANO_SHARED_TOKEN_FILE")]
    pub shared_token_file: Option<PathBuf>,
}

/// Why the agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The agent's own binary cannot be found.
    #[error("cannot find the agent's own binary")]
    Executable(#[source] std::io::Error),
    /// A directory cannot be made.
    #[error("cannot prepare the state directory {}", .0.display())]
    State(PathBuf, #[source] std::io::Error),
    /// The token cannot be read.
    #[error("cannot read the token file {}", .0.display())]
    Token(PathBuf, #[source] std::io::Error),
    /// The token is empty: it would let everybody in, or nobody.
    #[error("the token file {} is empty", .0.display())]
    EmptyToken(PathBuf),
    /// The store cannot be opened.
    #[error("cannot open the store of model files")]
    Store(#[from] StoreError),
    /// The listeners cannot be opened.
    #[error("cannot listen")]
    Front(#[from] FrontError),
    /// Metrics break Prometheus' rules.
    #[error("cannot set up metrics")]
    Metrics(#[from] prometheus::Error),
    /// Shutdown was asked for before the agent had started.
    #[error("stopped before the start was over")]
    Stopped,
}

/// What an agent works with, and what it must keep until it ends.
pub struct Setup {
    /// What steps need.
    pub means: Means,
    /// Bounds of the plan.
    pub limits: Limits,
    /// Held open: tells other agents that the sockets are in use.
    sockets_lock: std::fs::File,
}

impl Setup {
    /// Opens store and listeners. Waits for a store that another agent still holds.
    pub async fn open(
        args: &ServingArgs,
        state_dir: PathBuf,
        listen: SocketAddr,
        conflict: PortTaken,
        lame_duck: Duration,
        shutdown: &CancellationToken,
    ) -> Result<Self, SetupError> {
        let step = Duration::from_secs(args.hang_seconds);
        let patience = Patience { step, silence: step.min(Patience::default().silence) };
        let runner = Runner::current().map_err(SetupError::Executable)?.with_patience(patience);
        let token = match &args.shared_token_file {
            Some(path) => Some(read_token(path).await?),
            None => None,
        };
        tokio::fs::create_dir_all(&state_dir).await.map_err(|error| SetupError::State(state_dir.clone(), error))?;
        let store = tokio::select! {
            store = open_store(args, &state_dir) => store?,
            () = shutdown.cancelled() => return Err(SetupError::Stopped),
        };
        let of = state_dir.clone();
        let opened = tokio::task::spawn_blocking(move || Ok((socket_directory(&of)?, Estimates::open(&of)))).await;
        let ((sockets, sockets_lock), estimates) = opened
            .unwrap_or_else(|panicked| Err(panicked.into()))
            .map_err(|error| SetupError::State(state_dir, error))?;
        let metrics = Arc::new(AgentMetrics::new(env!("CARGO_PKG_VERSION"))?);
        let config = FrontConfig {
            listen,
            model_ip: listen.ip(),
            model_ports: args.model_ports.clone(),
            token,
            metrics: Arc::clone(&metrics),
            limits: FrontLimits::default(),
        };
        let front = tokio::select! {
            front = open_front(config, conflict) => front?,
            () = shutdown.cancelled() => return Err(SetupError::Stopped),
        };
        let memory_limit = args.memory_limit_bytes.unwrap_or_else(|| host_memory_limit().saturating_sub(spare::BYTES));
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let means = Means {
            runner,
            store,
            front,
            metrics,
            sockets,
            threads: u32::try_from(threads).unwrap_or(u32::MAX),
            memory_limit,
            device_memory_limit: args.device_memory_limit_bytes,
            estimates: Arc::new(estimates),
        };
        let limits = Limits { loading: LOADING, lame_duck, drain: Duration::from_secs(args.drain_seconds) };
        Ok(Self { means, limits, sockets_lock })
    }

    /// Closes the ports and removes what belongs to this process alone.
    pub async fn close(self) {
        let Self { means, limits: _, sockets_lock } = self;
        means.front.shutdown(LISTENER_GRACE).await;
        if let Err(error) = tokio::fs::remove_dir_all(&means.sockets).await {
            tracing::warn!(%error, directory = %means.sockets.display(), "cannot remove the sockets' directory");
        }
        drop(sockets_lock);
    }
}

/// What to do when somebody else listens on the shared port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortTaken {
    /// Say so and end: a person chose the port.
    Fail,
    /// Say so and wait: in a Pod it is held by what is on its way out.
    Wait,
}

async fn open_front(config: FrontConfig, conflict: PortTaken) -> Result<Front, FrontError> {
    let mut told = false;
    loop {
        match Front::bind(config.clone()).await {
            Err(FrontError::Listen { address, source })
                if conflict == PortTaken::Wait && source.kind() == std::io::ErrorKind::AddrInUse =>
            {
                if !told {
                    tracing::warn!(%address, "somebody else listens on the shared port; waiting for it");
                    told = true;
                }
                tokio::time::sleep(WAIT).await;
            }
            front => return front,
        }
    }
}

async fn read_token(path: &PathBuf) -> Result<String, SetupError> {
    let text = tokio::fs::read_to_string(path).await.map_err(|error| SetupError::Token(path.clone(), error))?;
    let token = text.trim();
    if token.is_empty() { Err(SetupError::EmptyToken(path.clone())) } else { Ok(token.to_owned()) }
}

async fn open_store(args: &ServingArgs, state_dir: &std::path::Path) -> Result<Store, SetupError> {
    let private = PRIVATE_NETWORKS.into_iter().filter_map(|(address, bits)| IpNet::new(address, bits).ok());
    let config = StoreConfig {
        root: state_dir.join("models"),
        file_roots: args.file_root.clone(),
        allow_http: args.allow_http,
        allowed_networks: if args.allow_private_networks { private.collect() } else { Vec::new() },
        denied_networks: args.deny_network.clone(),
        capacity_bytes: args.storage_capacity_bytes,
        ..StoreConfig::default()
    };
    let mut told = false;
    loop {
        match Store::open(config.clone()).await {
            Err(StoreError::InUse { root }) => {
                if !told {
                    tracing::info!(root, "another agent still holds the store; waiting for it");
                    told = true;
                }
                tokio::time::sleep(WAIT).await;
            }
            result => return Ok(result?),
        }
    }
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').ok_or("expected FIRST-LAST, such as 8500-8599")?;
    let port = |text: &str| text.trim().parse::<u16>().map_err(|error| format!("{text}: {error}"));
    let (first, last) = (port(first)?, port(last)?);
    if first == 0 || first > last {
        return Err(format!("{first}-{last} is no range of ports"));
    }
    Ok(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges() {
        assert_eq!(parse_ports("8500-8599"), Ok(8500..=8599));
        for bad in ["8500", "0-1", "2-1", "1-70000", "a-b"] {
            assert!(parse_ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_private_network_is_one() {
        for (address, bits) in PRIVATE_NETWORKS {
            assert!(IpNet::new(address, bits).is_ok(), "{address}/{bits}");
        }
    }
}

//! What all listeners of the agent share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::suspects::Suspects;
use super::table::{Model, Table};
use super::upstream::Upstream;
use crate::metrics::AgentMetrics;

/// Limits of the listeners.
#[derive(Clone, Debug)]
pub struct FrontLimits {
    /// Connections that one listener holds; further ones are told so and closed.
    pub connections: usize,
    /// Time for a client to send a request's head, also the time that an idle connection stays open.
    pub head_timeout: Duration,
    /// Time for a client to send a body.
    pub body_timeout: Duration,
    /// Bytes of a body.
    pub body_limit: usize,
    /// Bytes of bodies that all requests together may hold.
    pub buffered_bytes: usize,
    /// Time between two signs of life on a stream.
    pub ping_interval: Duration,
    /// A worker that says nothing on a stream for so long, not even a ping, is taken for dead.
    pub worker_silence: Duration,
    /// Time for a worker to answer `/metrics`.
    pub scrape_timeout: Duration,
}

impl Default for FrontLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            head_timeout: Duration::from_mins(1),
            body_timeout: Duration::from_secs(30),
            body_limit: crate::api::DEFAULT_BODY_LIMIT,
            buffered_bytes: 256 << 20,
            ping_interval: Duration::from_secs(10),
            worker_silence: Duration::from_mins(1),
            scrape_timeout: Duration::from_secs(2),
        }
    }
}

/// State of the front.
pub(super) struct Shared {
    pub(super) limits: FrontLimits,
    pub(super) metrics: Arc<AgentMetrics>,
    pub(super) upstream: Upstream,
    pub(super) suspects: Arc<Suspects>,
    pub(super) table: RwLock<Table>,
    pub(super) activity: watch::Sender<u64>,
    /// `Err` says why not.
    pub(super) readiness: watch::Sender<Result<(), String>>,
    pub(super) budget: Arc<Semaphore>,
    pub(super) tasks: TaskTracker,
    pub(super) stop: CancellationToken,
    pub(super) kill: CancellationToken,
    /// Seconds since 1970 when the agent started.
    pub(super) started: u64,
    /// Ports that models had, so that one that comes back gets its own again.
    pub(super) ports: Mutex<HashMap<String, u16>>,
    token: Option<[u8; 32]>,
    wakes: mpsc::Sender<String>,
}

impl Shared {
    pub(super) fn new(
        limits: FrontLimits,
        metrics: Arc<AgentMetrics>,
        token: Option<&str>,
        wakes: mpsc::Sender<String>,
    ) -> Self {
        let stop = CancellationToken::new();
        Self {
            budget: Arc::new(Semaphore::new(limits.buffered_bytes.min(Semaphore::MAX_PERMITS))),
            limits,
            metrics,
            upstream: Upstream::new(),
            suspects: Arc::default(),
            table: RwLock::default(),
            activity: watch::Sender::new(0),
            readiness: watch::Sender::new(Err("the agent is starting".to_owned())),
            tasks: TaskTracker::new(),
            stop,
            kill: CancellationToken::new(),
            started: crate::api::unix_seconds(),
            ports: Mutex::default(),
            token: token.map(digest),
            wakes,
        }
    }

    /// Whether `given` opens the shared port. Digests are compared, so the time taken tells nothing about the token.
    pub(super) fn lets_in(&self, given: Option<&str>) -> bool {
        match (&self.token, given) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(token), Some(given)) => digest(given) == *token,
        }
    }

    /// Tells the owner that a request waits for `model`; once until the model's route changes.
    pub(super) fn wake(&self, model: &Model) {
        if model.wants_wake() {
            // Counted by the owner, who knows what came of it.
            if self.wakes.try_send(model.published().uid.clone()).is_err() {
                model.wake_failed();
            }
        }
    }

    /// Reads the table.
    pub(super) fn read<T>(&self, look: impl FnOnce(&Table) -> T) -> T {
        look(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the table.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        change(&mut self.table.write().unwrap_or_else(PoisonError::into_inner))
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

//! The agent's listeners: a port for each model, behind its Service, and one shared port for all models of the node.
//!
//! A request's body is read once, bounded, for the model's name; then the same bytes go to the model's worker over its
//! Unix socket, and the answer comes back as it is made. A request for a model without a worker waits, bounded in number
//! and time, and its wish is told to the owner of the front ([`Front::wakes`]). A client that goes away takes its
//! request with it over every hop. Nothing here decides about models: [`Front::route`] is told.
//!
//! What a worker says of itself (`GET /props`, `/slots`) is passed on while it is loaded; asking does not wake it. The
//! part of Ollama's API that is about the node (`/api/tags`, `/api/ps`, `/api/show`, …) is answered here.
//!
//! The shared port also answers `/healthz` (the process runs), `/readyz` (see [`Front::set_ready`]), `/metrics` (agent
//! and workers) without a token (a model's own port has `/metrics` of its worker alone), and `/v1/models` for all models.

mod buffer;
mod card;
mod expected;
mod handlers;
mod keep_alive;
mod listener;
mod ollama;
mod ports;
mod proxy;
mod relay;
mod scrape;
mod shared;
mod suspects;
mod table;
mod upstream;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

pub use card::{FileCard, ModelCard};
pub use expected::Expected;
pub use handlers::PATHS;
pub use keep_alive::KeepAlive;
pub use shared::FrontLimits;
pub use table::{Activity, PublishedModel, Route};

use crate::metrics::AgentMetrics;
use handlers::Door;
use shared::Shared;
use table::Model;

/// Wakes that the owner has not taken yet; models of one node are at most 64.
const WAKES: usize = 256;

/// Ports that are remembered for models that left.
const REMEMBERED_PORTS: usize = 1024;

/// Where the front listens.
#[derive(Clone)]
pub struct FrontConfig {
    /// Address of the shared port; port 0 takes any.
    pub listen: SocketAddr,
    /// Address of the models' ports.
    pub model_ip: IpAddr,
    /// Ports for models; `None`: any free one.
    pub model_ports: Option<RangeInclusive<u16>>,
    /// Bearer token that the shared port asks for; `None`: it is open.
    pub token: Option<String>,
    /// Metrics of the agent.
    pub metrics: Arc<AgentMetrics>,
    /// Limits.
    pub limits: FrontLimits,
}

/// Why the front cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// The shared port cannot be had.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// No port for a model can be had.
    #[error("no port on {ip} is free for {model}")]
    NoModelPort {
        /// Address of the models' ports.
        ip: IpAddr,
        /// `namespace/name`.
        model: String,
        /// Why the last one tried could not be had.
        source: io::Error,
    },
}

/// Handle to the agent's listeners; clones are cheap.
#[derive(Clone)]
pub struct Front {
    shared: Arc<Shared>,
    address: SocketAddr,
    model_ip: IpAddr,
    model_ports: Option<RangeInclusive<u16>>,
    wakes: Arc<Mutex<Option<mpsc::Receiver<String>>>>,
    /// Held while a model's port is opened or closed.
    changing: Arc<tokio::sync::Mutex<()>>,
}

impl Front {
    /// Opens the shared port. It is healthy at once and ready when [`Front::set_ready`] says so.
    pub async fn bind(config: FrontConfig) -> Result<Self, FrontError> {
        let FrontConfig { listen, model_ip, model_ports, token, metrics, limits } = config;
        let failed = |source| FrontError::Listen { address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (sender, receiver) = mpsc::channel(WAKES);
        let shared = Arc::new(Shared::new(limits, metrics, token.as_deref(), sender));
        let (stop, kill) = (shared.stop.clone(), shared.kill.clone());
        shared.tasks.spawn(listener::run(listener, Arc::clone(&shared), Door::Shared, stop, kill));
        let wakes = Arc::new(Mutex::new(Some(receiver)));
        Ok(Self { shared, address, model_ip, model_ports, wakes, changing: Arc::default() })
    }

    /// Address of the shared port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Opens the model's own port, which stays the same as long as the agent lives; the model is [`Route::Loading`]
    /// until [`Front::route`] says otherwise. For a model that is there already, takes over its names and limits.
    pub async fn publish(&self, model: PublishedModel) -> Result<u16, FrontError> {
        let _one_at_a_time = self.changing.lock().await;
        if let Some(known) = self.model(&model.uid) {
            known.publish(model);
            return Ok(known.port);
        }
        let had = self.ports().get(&model.uid).copied();
        let candidates = ports::candidates(&model.uid, had, self.model_ports.as_ref());
        let failed = |source| FrontError::NoModelPort { ip: self.model_ip, model: model.full_name(), source };
        let listener = ports::listen(self.model_ip, &candidates).await.map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();

        let (stop, kill) = (self.shared.stop.child_token(), self.shared.kill.child_token());
        let uid = model.uid.clone();
        {
            let mut ports = self.ports();
            if ports.len() >= REMEMBERED_PORTS {
                ports.clear();
            }
            ports.insert(uid.clone(), port);
        }
        let model = Arc::new(Model::new(model, port, self.shared.activity.clone(), stop.clone(), kill.clone()));
        self.shared.change(|table| table.models.insert(uid, Arc::clone(&model)));
        self.shared.tasks.spawn(listener::run(listener, Arc::clone(&self.shared), Door::Model(model), stop, kill));
        Ok(port)
    }

    /// Says where requests for the model go from now on. Call it again with the same socket when another worker listens
    /// there: requests that wait for news of the old one see it by that.
    pub fn route(&self, uid: &str, route: Route) {
        if let Some(model) = self.model(uid) {
            model.set_route(route);
        } else {
            tracing::debug!(uid, "a route for a model that is not published");
        }
    }

    /// Says when the model may be ready, which those are told who cannot wait.
    pub fn expect(&self, uid: &str, expected: Expected) {
        if let Some(model) = self.model(uid) {
            model.expect(expected);
        }
    }

    /// Says what is known of the model, for those who ask about it without asking it.
    pub fn describe(&self, uid: &str, card: ModelCard) {
        if let Some(model) = self.model(uid) {
            model.describe(card);
        }
    }

    /// Sends new requests away, lets those under way end for at most `grace`, then closes the model's port. Publishing
    /// the model again meanwhile, with another route, keeps it.
    pub async fn withdraw(&self, uid: &str, grace: Duration) {
        let Some(model) = self.model(uid) else { return };
        model.set_route(Route::Draining);
        let mut activity = self.shared.activity.subscribe();
        let idle = async {
            // Requests that wait are sent away at once; those that run end when they end.
            while model.activity().running + model.activity().waiting > 0 {
                if activity.changed().await.is_err() {
                    return;
                }
            }
        };
        let ended = tokio::time::timeout(grace, idle).await.is_ok();
        let _one_at_a_time = self.changing.lock().await;
        if model.route() != Route::Draining {
            return;
        }
        model.stop.cancel();
        if !ended {
            model.kill.cancel();
        }
        self.shared.change(|table| table.models.remove(uid));
    }

    /// Uids of unloaded models that a request waits for, each once until its route changes. `None` after the first call:
    /// one owner decides.
    #[must_use]
    pub fn wakes(&self) -> Option<mpsc::Receiver<String>> {
        self.wakes.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Requests of the model now; `None` for one that is not published.
    #[must_use]
    pub fn activity(&self, uid: &str) -> Option<Activity> {
        self.model(uid).map(|model| model.activity())
    }

    /// Changes whenever a request of any model begins, ends, or goes from waiting to running.
    #[must_use]
    pub fn activity_changes(&self) -> watch::Receiver<u64> {
        self.shared.activity.subscribe()
    }

    /// What `/readyz` answers: 200, or 503 with the reason.
    pub fn set_ready(&self, readiness: Result<(), String>) {
        let _before = self.shared.readiness.send_replace(readiness);
    }

    /// Closes all ports and lets requests end for at most `grace`. To be sent away gently, clients must have been told
    /// before: set the front unready first and go on serving for a lame-duck period.
    pub async fn shutdown(&self, grace: Duration) {
        self.set_ready(Err("the agent is shutting down".to_owned()));
        self.shared.stop.cancel();
        self.shared.tasks.close();
        if tokio::time::timeout(grace, self.shared.tasks.wait()).await.is_err() {
            self.shared.kill.cancel();
            self.shared.tasks.wait().await;
        }
    }

    fn model(&self, uid: &str) -> Option<Arc<Model>> {
        self.shared.read(|table| table.models.get(uid).cloned())
    }

    fn ports(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<String, u16>> {
        self.shared.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

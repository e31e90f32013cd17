//! Model files on the node: fetched, resumed, verified and put in place whole or not at all.
//!
//! [`Store::ensure`] is all that the rest needs: it returns a file that is there, has the digest it should and a sound
//! GGUF header, or a [`StoreError`] whose reason and numbers go into the model's status. It never asks again by itself
//! for longer than its [`RetryPolicy`]; the caller's back-off is above it.
//!
//! What must not happen here: reading more of an untrusted file than its header, reaching an address the policy does
//! not permit, or giving out a file that was not checked to its last byte.

mod address;
mod error;
mod fetch;
mod ggml_type;
pub mod gguf;
mod layout;
mod local;
mod peek;
mod quota;
mod writer;

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::{OwnedMutexGuard, watch};
use tokio_util::sync::CancellationToken;
use url::Url;

pub use self::error::{AddressNotAllowed, StoreError};
pub use self::gguf::{GgufError, GgufHeader};
pub use self::quota::Usage;

use self::address::AddressPolicy;
use self::fetch::Fetch;
use self::layout::{Record, Slot};
use self::local::Identity;
use self::quota::Quota;

/// Local files whose digest is remembered; above it all are hashed anew when they are next asked for.
const MAX_KNOWN_DIGESTS: usize = 256;

/// How a store works.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Directory of fetched files; made if it is missing, used by one process at a time.
    pub root: PathBuf,
    /// Directories below which `file://` sources may lie.
    pub file_roots: Vec<PathBuf>,
    /// Whether `http://` sources are fetched, without any encryption.
    pub allow_http: bool,
    /// PEM file of authorities that `https://` sources may be certified by, besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Private networks that remote sources may lie in; public ones they always may.
    pub allowed_networks: Vec<IpNet>,
    /// Networks that remote sources may not lie in, such as the cluster's own; stronger than `allowed_networks`.
    pub denied_networks: Vec<IpNet>,
    /// Bytes that fetched files may take; `None` for all of the file system.
    pub capacity_bytes: Option<u64>,
    /// What happens when a download breaks off.
    pub retry: RetryPolicy,
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// How long a connection may be silent.
    pub stall_timeout: Duration,
    /// Age at which a partial file that nobody goes on with is removed.
    pub partial_max_age: Duration,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/var/lib/altiplano/models"),
            file_roots: Vec::new(),
            allow_http: false,
            ca_file: None,
            allowed_networks: Vec::new(),
            denied_networks: Vec::new(),
            capacity_bytes: None,
            retry: RetryPolicy::default(),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            partial_max_age: Duration::from_hours(7 * 24),
        }
    }
}

/// How often a download is tried within one [`Store::ensure`], and how long the waits between are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, at least 1.
    pub attempts: u32,
    /// Wait before the second attempt; it doubles with each.
    pub initial_delay: Duration,
    /// The longest wait.
    pub max_delay: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { attempts: 5, initial_delay: Duration::from_millis(500), max_delay: Duration::from_secs(15) }
    }
}

/// Where a model file comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// `https://…`, `file:///…`, or `http://…` where it is allowed.
    pub uri: String,
    /// Tells files of one URI apart: another revision is fetched anew.
    pub revision: Option<String>,
    /// Digest that the file must have, lower-case hexadecimal.
    pub sha256: Option<String>,
}

impl From<&altiplano_crds::model_deployment::ModelSource> for Source {
    /// `files` is for sources that hold several; those the store fetches are one file each.
    fn from(source: &altiplano_crds::model_deployment::ModelSource) -> Self {
        let altiplano_crds::model_deployment::ModelSource { uri, revision, files: _, sha256 } = source;
        Self { uri: uri.clone(), revision: revision.clone(), sha256: sha256.clone() }
    }
}

/// How far a file is. Bytes that are verified count like bytes that are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes so far.
    pub bytes_done: u64,
    /// Bytes in all, once they are known.
    pub bytes_total: Option<u64>,
}

impl Progress {
    /// Whole percent, where the length is known.
    #[must_use]
    pub fn percent(&self) -> Option<u8> {
        let total = self.bytes_total.filter(|total| *total > 0)?;
        u8::try_from(u128::from(self.bytes_done.min(total)) * 100 / u128::from(total)).ok()
    }
}

/// A file that is there and was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredModel {
    /// Where it lies.
    pub path: PathBuf,
    /// Its length.
    pub size_bytes: u64,
    /// Its digest, lower-case hexadecimal; `None` for a local file whose digest nobody asked for.
    pub sha256: Option<String>,
    /// What it says of itself.
    pub header: GgufHeader,
}

/// The model files of a node. Clones share everything.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: StoreConfig,
    policy: Arc<AddressPolicy>,
    /// Made when it is first needed: without any authority on the system it cannot be, and local files need none.
    client: OnceLock<reqwest::Client>,
    quota: Quota,
    /// Fetches under way, by key.
    flights: Mutex<HashMap<String, Arc<Flight>>>,
    /// Digests of local files, valid as long as the identity is the same. One per path that was asked for.
    digests: Mutex<HashMap<PathBuf, (Identity, String)>>,
    /// Held open: its lock keeps other processes out.
    _lock: File,
}

/// One file that somebody is fetching; others wait for it and see its progress.
#[derive(Debug)]
struct Flight {
    turn: Arc<tokio::sync::Mutex<()>>,
    progress: watch::Sender<Progress>,
}

impl Store {
    /// Opens the directory, alone, and removes what was left behind there.
    pub async fn open(config: StoreConfig) -> Result<Self, StoreError> {
        let policy = Arc::new(AddressPolicy {
            allowed: config.allowed_networks.clone(),
            denied: config.denied_networks.clone(),
        });
        let (root, max_age) = (config.root.clone(), config.partial_max_age);
        let lock = blocking(move || {
            let lock = layout::lock(&root)?;
            let freed = layout::clean(&root, max_age)?;
            if freed > 0 {
                tracing::info!(root = %root.display(), freed_bytes = freed, "removed stale files");
            }
            Ok(lock)
        })
        .await?;
        let quota = Quota::new(config.root.clone(), config.capacity_bytes);
        let (client, flights, digests) = (OnceLock::new(), Mutex::default(), Mutex::default());
        Ok(Self { shared: Arc::new(Shared { config, policy, client, quota, flights, digests, _lock: lock }) })
    }

    /// Returns the file, fetching and checking what is missing. Requests for the same source share one download.
    /// Dropping the future or cancelling keeps what has arrived for the next time.
    pub async fn ensure(
        &self,
        source: &Source,
        progress: &watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<StoredModel, StoreError> {
        let url = Url::parse(&source.uri)
            .map_err(|e| StoreError::InvalidSource { uri: source.uri.clone(), why: e.to_string() })?;
        match url.scheme() {
            "file" => self.ensure_local(url, source, progress, cancel).await,
            "https" => self.ensure_remote(&url, source, progress, cancel).await,
            "http" if self.shared.config.allow_http => self.ensure_remote(&url, source, progress, cancel).await,
            scheme => {
                let hint = if scheme == "http" { " unless the node allows it: they are not encrypted" } else { "" };
                Err(StoreError::UnsupportedScheme { scheme: scheme.to_owned(), hint })
            }
        }
    }

    /// What the file says of itself, without the file where that is far away: of a remote one only the header is fetched,
    /// and the path leads to one that has nothing else. Its digest is not known before it is whole. `None` where the
    /// header is too long for that.
    pub async fn peek(&self, source: &Source) -> Result<Option<StoredModel>, StoreError> {
        let invalid = |e: url::ParseError| StoreError::InvalidSource { uri: source.uri.clone(), why: e.to_string() };
        let url = Url::parse(&source.uri).map_err(invalid)?;
        let is_remote = url.scheme() == "https" || (url.scheme() == "http" && self.shared.config.allow_http);
        if !is_remote {
            // Also says what is wrong with another scheme.
            let source = Source { sha256: None, ..source.clone() };
            return self.ensure(&source, &watch::Sender::default(), &CancellationToken::new()).await.map(Some);
        }
        self.shared.policy.check_literal(&url)?;
        let slot = Slot::new(&self.shared.config.root, source);
        let flight = self.board(&slot.key);
        let turn = Arc::clone(&flight.turn).lock_owned().await;
        let stored = match Self::stored(slot.clone()).await {
            Ok(None) => {
                let client = self.client().await?;
                let peeked = peek::peek(&client, &url, slot.header.clone()).await;
                peeked.map(|peeked| {
                    let peek::Peeked { size_bytes, header } = peeked?;
                    Some(StoredModel { path: slot.header.clone(), size_bytes, sha256: None, header })
                })
            }
            other => other,
        };
        drop(turn);
        self.leave(flight);
        stored
    }

    /// Whether the file is there already, without looking into it.
    pub async fn has(&self, source: &Source) -> bool {
        let Ok(url) = Url::parse(&source.uri) else { return false };
        let shared = Arc::clone(&self.shared);
        let slot = Slot::new(&shared.config.root, source);
        let found = blocking(move || {
            Ok(if url.scheme() == "file" {
                local::resolve(&url, &shared.config.file_roots).is_ok()
            } else {
                slot.record.exists() && slot.whole.exists()
            })
        });
        found.await.unwrap_or(false)
    }

    /// Removes what was fetched of a source, when nobody is fetching it any more; whether there was something. A worker
    /// that has the file open keeps it until it exits. Local files stay.
    pub async fn remove(&self, source: &Source) -> Result<bool, StoreError> {
        let slot = Slot::new(&self.shared.config.root, source);
        let flight = self.board(&slot.key);
        let turn = Arc::clone(&flight.turn).lock_owned().await;
        let removed = blocking(move || {
            let removed = slot.remove();
            drop(turn);
            removed
        })
        .await;
        self.leave(flight);
        removed
    }

    /// Bytes that the store holds and may hold.
    pub async fn usage(&self) -> Result<Usage, StoreError> {
        self.shared.quota.usage().await
    }

    async fn ensure_local(
        &self,
        url: Url,
        source: &Source,
        progress: &watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<StoredModel, StoreError> {
        let shared = Arc::clone(&self.shared);
        let (expected, progress, cancel) = (source.sha256.clone(), progress.clone(), cancel.clone());
        blocking(move || {
            let (path, identity) = local::resolve(&url, &shared.config.file_roots)?;
            let header = gguf::read(&path)?;
            let digests = || shared.digests.lock().unwrap_or_else(PoisonError::into_inner);
            let known = digests().get(&path).filter(|(of, _)| *of == identity).map(|(_, sha256)| sha256.clone());
            let sha256 = match (known, &expected) {
                (None, Some(_)) => {
                    let sha256 = local::digest(&path, &progress, &cancel)?;
                    let mut digests = digests();
                    if digests.len() >= MAX_KNOWN_DIGESTS {
                        digests.clear();
                    }
                    digests.insert(path.clone(), (identity.clone(), sha256.clone()));
                    Some(sha256)
                }
                (known, _) => known,
            };
            if let (Some(expected), Some(got)) = (expected, &sha256)
                && expected != *got
            {
                return Err(StoreError::ChecksumMismatch { expected, got: got.clone() });
            }
            let size_bytes = identity.size();
            progress.send_replace(Progress { bytes_done: size_bytes, bytes_total: Some(size_bytes) });
            Ok(StoredModel { path, size_bytes, sha256, header })
        })
        .await
    }

    async fn ensure_remote(
        &self,
        url: &Url,
        source: &Source,
        progress: &watch::Sender<Progress>,
        cancel: &CancellationToken,
    ) -> Result<StoredModel, StoreError> {
        self.shared.policy.check_literal(url)?;
        let slot = Slot::new(&self.shared.config.root, source);
        let flight = self.board(&slot.key);
        let mut seen = flight.progress.subscribe();
        let forward = async {
            while seen.changed().await.is_ok() {
                progress.send_replace(*seen.borrow_and_update());
            }
            std::future::pending::<()>().await;
        };
        let result = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(StoreError::Cancelled),
            result = self.take_turn(url, source, &slot, &flight) => result,
            () = forward => Err(StoreError::Cancelled),
        };
        if let Ok(stored) = &result {
            progress.send_replace(Progress { bytes_done: stored.size_bytes, bytes_total: Some(stored.size_bytes) });
        }
        self.leave(flight);
        result
    }

    /// Waits until nobody else fetches this file, then returns it or fetches it.
    async fn take_turn(
        &self,
        url: &Url,
        source: &Source,
        slot: &Slot,
        flight: &Flight,
    ) -> Result<StoredModel, StoreError> {
        let guard: Arc<OwnedMutexGuard<()>> = Arc::new(Arc::clone(&flight.turn).lock_owned().await);
        if let Some(stored) = Self::stored(slot.clone()).await? {
            return Ok(stored);
        }
        let client = self.client().await?;
        let fetch = Fetch {
            client: &client,
            url,
            sha256: source.sha256.as_deref(),
            slot,
            quota: &self.shared.quota,
            retry: &self.shared.config.retry,
            progress: &flight.progress,
            guard,
        };
        let claim = Claim { quota: &self.shared.quota, key: &slot.key };
        fetch.run().await?;
        drop(claim);
        let missing = || StoreError::io("find the file just fetched")(std::io::ErrorKind::NotFound.into());
        Self::stored(slot.clone()).await?.ok_or_else(missing)
    }

    async fn client(&self) -> Result<reqwest::Client, StoreError> {
        if let Some(client) = self.shared.client.get() {
            return Ok(client.clone());
        }
        let shared = Arc::clone(&self.shared);
        let client = blocking(move || fetch::client(&shared.config, Arc::clone(&shared.policy))).await?;
        Ok(self.shared.client.get_or_init(|| client).clone())
    }

    /// The whole file of a slot. One that has changed since it was checked is removed, and counts as missing.
    async fn stored(slot: Slot) -> Result<Option<StoredModel>, StoreError> {
        blocking(move || {
            let Some(record) = layout::read_json::<Record>(&slot.record) else { return Ok(None) };
            let is_as_recorded = std::fs::metadata(&slot.whole).is_ok_and(|m| m.len() == record.size_bytes);
            if is_as_recorded && let Ok(header) = gguf::read(&slot.whole) {
                let Record { sha256, size_bytes, .. } = record;
                return Ok(Some(StoredModel { path: slot.whole, size_bytes, sha256: Some(sha256), header }));
            }
            tracing::warn!(path = %slot.whole.display(), "a stored file has changed, it is fetched again");
            slot.remove()?;
            Ok(None)
        })
        .await
    }

    fn board(&self, key: &str) -> Arc<Flight> {
        let mut flights = self.shared.flights.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody waits for any more, also after a dropped future.
        flights.retain(|k, flight| k == key || Arc::strong_count(flight) > 1 || Arc::strong_count(&flight.turn) > 1);
        let new = || Flight { turn: Arc::default(), progress: watch::Sender::new(Progress::default()) };
        Arc::clone(flights.entry(key.to_owned()).or_insert_with(|| Arc::new(new())))
    }

    fn leave(&self, flight: Arc<Flight>) {
        drop(flight);
        let mut flights = self.shared.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, flight| Arc::strong_count(flight) > 1 || Arc::strong_count(&flight.turn) > 1);
    }
}

/// Ends a claim on the disk however the download ends.
struct Claim<'a> {
    quota: &'a Quota,
    key: &'a str,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.quota.release(self.key);
    }
}

/// Runs disk work off the runtime.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(join) => Err(StoreError::io("finish work on the disk")(join.into())),
    }
}

#[cfg(test)]
mod tests;

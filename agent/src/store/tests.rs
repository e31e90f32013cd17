//! The store against a real HTTP server on loopback and real files.

mod local;
mod origin;
mod remote;

use std::path::Path;
use std::time::Duration;

use altiplano_test_models::Spec;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::*;

/// Longest wait for anything; what is usual here is a hundredth of it.
const PATIENCE: Duration = Duration::from_mins(2);

/// A model file of some 300 KB, the same each time, and its digest.
fn model() -> (Vec<u8>, String) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("m.gguf");
    Spec::default().write(&path).expect("written");
    let bytes = std::fs::read(path).expect("read");
    let sha256 = sha256(&bytes);
    (bytes, sha256)
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    layout::hex(&Sha256::digest(bytes))
}

fn source(uri: &str) -> Source {
    Source { uri: uri.to_owned(), revision: None, sha256: None }
}

/// A store that may fetch from 127.0.0.1 without encryption and does not wait long.
fn config(root: &Path) -> StoreConfig {
    StoreConfig {
        root: root.to_owned(),
        allow_http: true,
        allowed_networks: vec!["127.0.0.1/32".parse().expect("a network")],
        retry: RetryPolicy {
            attempts: 3,
            initial_delay: Duration::from_millis(5),
            max_delay: Duration::from_millis(10),
        },
        stall_timeout: Duration::from_secs(20),
        ..StoreConfig::default()
    }
}

struct Fixture {
    store: Store,
    root: TempDir,
}

impl Fixture {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut StoreConfig)) -> Self {
        let root = tempfile::tempdir().expect("temporary directory");
        let mut config = config(root.path());
        change(&mut config);
        Self { store: Store::open(config).await.expect("opened"), root }
    }

    async fn ensure(&self, source: &Source) -> Result<StoredModel, StoreError> {
        let progress = watch::Sender::new(Progress::default());
        let cancel = CancellationToken::new();
        let ensured = self.store.ensure(source, &progress, &cancel);
        tokio::time::timeout(PATIENCE, ensured).await.expect("an answer in time")
    }

    /// Names of the files in the store's directory without the lock, sorted, keys cut off.
    fn files(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.root.path())
            .expect("listed")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .filter(|name| name != "lock")
            .map(|name| name.split_once('.').map_or(name.clone(), |(_, end)| end.to_owned()))
            .collect();
        names.sort();
        names
    }
}

#[test]
fn percent_is_whole_and_never_above_a_hundred() {
    let percent = |bytes_done, bytes_total| Progress { bytes_done, bytes_total }.percent();
    assert_eq!(percent(0, None), None);
    assert_eq!(percent(0, Some(0)), None);
    assert_eq!(percent(1, Some(3)), Some(33));
    assert_eq!(percent(9, Some(3)), Some(100));
    assert_eq!(percent(u64::MAX, Some(u64::MAX)), Some(100));
}

#[tokio::test]
async fn a_second_process_is_kept_out_and_leftovers_are_removed() {
    let root = tempfile::tempdir().expect("temporary directory");
    let write = |name: &str| std::fs::write(root.path().join(name), b"x").expect("written");
    for name in ["old.partial", "old.partial.json", "unrecorded.gguf", "broken.json.tmp", "kept.json", "kept.gguf"] {
        write(name);
    }
    let config = StoreConfig { partial_max_age: Duration::ZERO, ..config(root.path()) };
    let store = Store::open(config.clone()).await.expect("opened");
    let mut left: Vec<_> =
        std::fs::read_dir(root.path()).expect("listed").map(|e| e.expect("an entry").file_name()).collect();
    left.sort();
    assert_eq!(left, ["kept.gguf", "kept.json", "lock"]);

    let second = Store::open(config.clone()).await.expect_err("in use");
    assert_eq!(second.reason(), "StoreInUse");
    drop(store);
    Store::open(config).await.expect("free again");
}

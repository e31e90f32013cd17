//! Room on the disk: what is there, and what downloads under way will need.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::{StoreError, blocking, layout};

/// Bytes that are never filled, so that the file system keeps working for others.
const HEADROOM_BYTES: u64 = 64 << 20;

/// Shared account of the store's directory.
#[derive(Debug, Clone)]
pub(super) struct Quota {
    root: PathBuf,
    capacity: Option<u64>,
    /// Length that each file under way will have, by key.
    claims: Arc<Mutex<BTreeMap<String, u64>>>,
}

/// Bytes of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that the store may hold: the configured ones, else those of the file system.
    pub capacity_bytes: u64,
    /// Bytes of model files, whole and partial.
    pub used_bytes: u64,
}

impl Quota {
    pub(super) fn new(root: PathBuf, capacity: Option<u64>) -> Self {
        Self { root, capacity, claims: Arc::default() }
    }

    /// Claims room for a file of so many bytes, of which some may be on the disk already.
    pub(super) async fn claim(&self, key: &str, bytes: u64) -> Result<(), StoreError> {
        let (this, key) = (self.clone(), key.to_owned());
        blocking(move || this.claim_now(key, bytes)).await
    }

    /// Ends the claim; what is on the disk counts on.
    pub(super) fn release(&self, key: &str) {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    pub(super) async fn usage(&self) -> Result<Usage, StoreError> {
        let this = self.clone();
        blocking(move || {
            let used_bytes = layout::sizes(&this.root)?.iter().map(|(_, bytes)| bytes).sum();
            let capacity_bytes = match this.capacity {
                Some(capacity) => capacity,
                None => layout::filesystem(&this.root)?.0,
            };
            Ok(Usage { capacity_bytes, used_bytes })
        })
        .await
    }

    fn claim_now(&self, key: String, bytes: u64) -> Result<(), StoreError> {
        let sizes = layout::sizes(&self.root)?;
        let free = layout::filesystem(&self.root)?.1.saturating_sub(HEADROOM_BYTES);
        // Held while counting, so that two downloads never take the same gap.
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let on_disk = |key: &str| sizes.iter().filter(|(k, _)| k == key).map(|(_, b)| b).sum::<u64>();
        // What others have claimed and not yet written is in neither the sizes nor the free bytes.
        let to_come: u64 =
            claims.iter().filter(|(k, _)| **k != key).map(|(k, claimed)| claimed.saturating_sub(on_disk(k))).sum();
        let others = sizes.iter().filter(|(k, _)| *k != key).map(|(_, b)| b).sum::<u64>() + to_come;
        let by_disk = (free + on_disk(&key)).saturating_sub(to_come);
        let by_capacity = self.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(others));
        let (available_bytes, capacity) =
            if by_capacity < by_disk { (by_capacity, "the store's capacity") } else { (by_disk, "the file system") };
        if bytes > available_bytes {
            return Err(StoreError::InsufficientStorage { needed_bytes: bytes, available_bytes, capacity });
        }
        claims.insert(key, bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn claims_count_what_is_there_and_what_is_to_come() {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join("old.gguf"), vec![0; 300]).expect("written");
        std::fs::write(dir.path().join("b.partial"), vec![0; 100]).expect("written");
        let quota = Quota::new(dir.path().to_owned(), Some(1000));
        let available = async |key: &str| match quota.claim(key, 1 << 40).await {
            Err(StoreError::InsufficientStorage { available_bytes, .. }) => available_bytes,
            other => panic!("{other:?}"),
        };
        assert_eq!(available("a").await, 600, "1000 less the old file and the partial one");
        assert_eq!(available("b").await, 700, "its own partial file does not stand in its way");
        quota.claim("b", 500).await.expect("room");
        assert_eq!(available("a").await, 200, "the rest of b is claimed");
        quota.release("b");
        assert_eq!(available("a").await, 600);
        let usage = quota.usage().await.expect("counted");
        assert_eq!(usage, Usage { capacity_bytes: 1000, used_bytes: 400 });
    }
}

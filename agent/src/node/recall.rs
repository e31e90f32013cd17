//! What this node was last told, on disk: an agent that starts while the API server is away goes on with it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use altiplano_crds::model_node::RawAssignment;
use tokio::sync::watch;

use super::observe::Desired;

/// How long the ModelNode may take to be seen before what is remembered counts.
const PATIENCE: Duration = Duration::from_secs(3);

/// Largest file that is read: 64 entries with a chat template of 64 KiB each, and room.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Remembers what a node was told.
#[derive(Clone, Debug)]
pub struct Recall {
    path: PathBuf,
}

impl Recall {
    /// Remembers below `state_dir`, for one node.
    #[must_use]
    pub fn new(state_dir: &Path, node: &str) -> Self {
        Self { path: state_dir.join(format!("assignments-{node}.json")) }
    }

    /// Writes down what the node was told, whole or not at all. A failure is logged: it does no harm yet.
    pub async fn save(&self, models: &[RawAssignment]) {
        if let Err(error) = self.try_save(models).await {
            tracing::warn!(%error, path = %self.path.display(), "cannot remember what this node was told");
        }
    }

    async fn try_save(&self, models: &[RawAssignment]) -> std::io::Result<()> {
        let text = serde_json::to_vec(models)?;
        let partial = self.path.with_extension("partial");
        tokio::fs::write(&partial, text).await?;
        tokio::fs::rename(&partial, &self.path).await
    }

    /// What is remembered.
    pub async fn load(&self) -> Option<Desired> {
        match self.try_load().await {
            // Of no generation: it is not known whether it is still what the ModelNode says.
            Ok(models) => Some(Desired::new(None, &models)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(%error, path = %self.path.display(), "cannot read what this node was told");
                None
            }
        }
    }

    async fn try_load(&self) -> std::io::Result<Vec<RawAssignment>> {
        if tokio::fs::metadata(&self.path).await?.len() > MAX_BYTES {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        Ok(serde_json::from_slice(&tokio::fs::read(&self.path).await?)?)
    }

    /// Waits a moment for word from the cluster; without it, what is remembered counts. Ends then.
    pub async fn stand_in(self, wanted: watch::Sender<Option<Desired>>) {
        let mut heard = wanted.subscribe();
        if tokio::time::timeout(PATIENCE, heard.wait_for(Option::is_some)).await.is_ok() {
            return;
        }
        let Some(remembered) = self.load().await else { return };
        tracing::warn!(
            models = remembered.entries.len(),
            "nothing is heard of the ModelNode; going on with the last one"
        );
        wanted.send_if_modified(|wanted| {
            let is_unknown = wanted.is_none();
            if is_unknown {
                *wanted = Some(remembered);
            }
            is_unknown
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_said_is_remembered_and_nonsense_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let recall = Recall::new(folder.path(), "n1");
        assert_eq!(recall.load().await, None);
        let models = [RawAssignment(serde_json::json!({"uid": "a", "revision": "r", "odd": true}))];
        recall.save(&models).await;
        assert_eq!(recall.load().await, Some(Desired::new(None, &models)));
        std::fs::write(folder.path().join("assignments-n1.json"), "[{]").unwrap();
        assert_eq!(recall.load().await, None);
    }

    #[tokio::test]
    async fn the_clusters_word_counts_more() {
        let folder = tempfile::tempdir().unwrap();
        let recall = Recall::new(folder.path(), "n1");
        recall.save(&[RawAssignment(serde_json::json!({"uid": "a", "revision": "r"}))]).await;
        let told = Desired { generation: Some(7), ..Desired::default() };
        let (heard, _keep) = watch::channel(Some(told.clone()));
        recall.clone().stand_in(heard.clone()).await;
        assert_eq!(*heard.borrow(), Some(told));
        let (silent, _keep) = watch::channel(None);
        recall.stand_in(silent.clone()).await;
        assert_eq!(silent.borrow().as_ref().map(|desired| desired.entries.len()), Some(1));
    }
}

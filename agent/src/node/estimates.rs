//! What models were said to take and what they were measured to take, on disk: a model that is loaded again in the same
//! way is planned with what it took, also by the next agent.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::runner::protocol::{EstimateReport, MemoryUse};

/// Ways of loading models that are remembered; those of no use for longest are forgotten.
const MAX_ENTRIES: usize = 256;

/// Largest file that is read: 256 entries of a kilobyte, and room.
const MAX_BYTES: u64 = 4 << 20;

/// Answers of dry runs, and measurements.
#[derive(Debug, Default)]
pub struct Estimates {
    /// `None`: nothing is kept.
    path: Option<PathBuf>,
    known: Mutex<Known>,
    saving: Mutex<()>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Known {
    entries: BTreeMap<String, Entry>,
    /// Bytes that a process takes of a device by opening it, by device and driver.
    processes: BTreeMap<String, u64>,
    /// Counts uses.
    clock: u64,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Entry {
    report: EstimateReport,
    /// What it took when it had been loaded.
    measured: Vec<MemoryUse>,
    used_at: u64,
}

impl Estimates {
    /// Those of an agent with this state directory. Blocking.
    #[must_use]
    pub fn open(state: &Path) -> Self {
        let path = state.join("estimates.json");
        let known = match read(&path) {
            Ok(known) => known,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Known::default(),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "cannot read what models took before");
                Known::default()
            }
        };
        Self { path: Some(path), known: Mutex::new(known), saving: Mutex::new(()) }
    }

    /// What is known: the dry run's answer, with what was measured in place of what it predicted.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<EstimateReport> {
        let mut known = self.lock();
        known.clock += 1;
        let now = known.clock;
        let entry = known.entries.get_mut(key)?;
        entry.used_at = now;
        let mut report = entry.report.clone();
        if !entry.measured.is_empty() {
            report.memory.clone_from(&entry.measured);
        }
        Some(report)
    }

    /// A dry run's answer.
    pub fn predicted(&self, key: &str, report: EstimateReport) {
        let mut known = self.lock();
        known.clock += 1;
        let used_at = known.clock;
        known.entries.insert(key.to_owned(), Entry { report, measured: Vec::new(), used_at });
        while known.entries.len() > MAX_ENTRIES {
            let oldest = known.entries.iter().min_by_key(|(_, entry)| entry.used_at).map(|(key, _)| key.clone());
            oldest.map(|key| known.entries.remove(&key));
        }
    }

    /// What a model that was loaded took; whether that is news.
    pub fn measured(&self, key: &str, memory: &[MemoryUse]) -> bool {
        let mut known = self.lock();
        let Some(entry) = known.entries.get_mut(key) else { return false };
        let is_news = entry.measured != memory;
        entry.measured = memory.to_vec();
        is_news
    }

    /// Bytes that a process takes of a device by opening it.
    #[must_use]
    pub fn process(&self, device: &str) -> Option<u64> {
        self.lock().processes.get(device).copied()
    }

    /// The same, measured.
    pub fn process_measured(&self, device: String, bytes: u64) {
        let mut known = self.lock();
        // One for each device and driver; drivers change.
        if known.processes.len() >= MAX_ENTRIES {
            known.processes.clear();
        }
        known.processes.insert(device, bytes);
    }

    /// Writes it down, whole or not at all. A failure is logged: it does no harm yet. Blocking.
    pub fn save(&self) {
        let Some(path) = &self.path else { return };
        // One at a time, so that the last one's is the newest.
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let partial = path.with_extension("partial");
        let text = serde_json::to_vec(&*self.lock());
        let written = text
            .map_err(std::io::Error::from)
            .and_then(|text| std::fs::write(&partial, text))
            .and_then(|()| std::fs::rename(&partial, path));
        if let Err(error) = written {
            tracing::warn!(%error, path = %path.display(), "cannot remember what models take");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A short key of everything that an estimate depends on.
#[must_use]
pub fn key(parts: &impl Serialize) -> Option<String> {
    let text = serde_json::to_vec(parts).ok()?;
    Some(Sha256::digest(text).iter().take(16).fold(String::new(), |mut key, byte| {
        // Writing to a string cannot fail.
        let _ = write!(key, "{byte:02x}");
        key
    }))
}

fn read(path: &Path) -> std::io::Result<Known> {
    if std::fs::metadata(path)?.len() > MAX_BYTES {
        return Err(std::io::ErrorKind::FileTooLarge.into());
    }
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(bytes: u64) -> Vec<MemoryUse> {
        vec![MemoryUse { device: "CPU".to_owned(), weights_bytes: bytes, ..MemoryUse::default() }]
    }

    fn report(bytes: u64) -> EstimateReport {
        EstimateReport { memory: part(bytes), layers_total: 5, ..EstimateReport::default() }
    }

    #[test]
    fn what_was_measured_replaces_what_was_predicted_also_for_the_next_agent() {
        let folder = tempfile::tempdir().unwrap();
        let estimates = Estimates::open(folder.path());
        assert_eq!(estimates.get("a"), None);
        assert!(!estimates.measured("a", &part(7)), "of something that nobody has estimated");
        estimates.predicted("a", report(5));
        estimates.predicted("b", report(6));
        assert!(estimates.measured("a", &part(7)) && !estimates.measured("a", &part(7)));
        estimates.process_measured("CUDA0 570.1".to_owned(), 500);
        estimates.save();
        for estimates in [estimates, Estimates::open(folder.path())] {
            assert_eq!(estimates.get("a"), Some(report(7)));
            assert_eq!(estimates.get("b"), Some(report(6)));
            assert_eq!(estimates.process("CUDA0 570.1"), Some(500));
            assert_eq!(estimates.process("CUDA0 571.2"), None, "another driver takes something else");
        }
        std::fs::write(folder.path().join("estimates.json"), "[").unwrap();
        assert_eq!(Estimates::open(folder.path()).get("a"), None);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let estimates = Estimates::default();
        for number in 0..MAX_ENTRIES {
            estimates.predicted(&number.to_string(), report(1));
        }
        assert!(estimates.get("0").is_some(), "it is used");
        estimates.predicted("new", report(1));
        assert!(estimates.get("0").is_some() && estimates.get("1").is_none() && estimates.get("new").is_some());
        estimates.save();
    }

    #[test]
    fn keys_differ_where_anything_does() {
        assert_eq!(key(&("a", 1)), key(&("a", 1)));
        assert_ne!(key(&("a", 1)), key(&("a", 2)));
    }
}

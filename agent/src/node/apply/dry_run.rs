//! What a model would take: asked of a dry run, unless it is known.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::super::estimates::{self, Estimates};
use super::super::observe::{Model, Observed};
use super::PROBE_TIMEOUT;
use crate::engine::llama_cpp_version;
use crate::ledger::Need;
use crate::runner::protocol::{EstimateReport, ProbeReport, ProbedDevice, RunnerConfig};
use crate::runner::spawn::{Runner, SpawnError};
use crate::store::StoredModel;

/// How long a dry run may take; it reads no weights.
const ESTIMATE_TIMEOUT: Duration = Duration::from_mins(1);

pub(super) async fn estimate(
    runner: &Runner,
    known: &Arc<Estimates>,
    question: &Question,
) -> Result<EstimateReport, SpawnError> {
    let key = question.key().await;
    if let Some(report) = key.as_ref().and_then(|key| known.get(key)) {
        return Ok(report);
    }
    let report = runner.estimate(&question.config, ESTIMATE_TIMEOUT).await?;
    if let Some(key) = key {
        known.predicted(&key, report.clone());
        save(known).await;
    }
    Ok(report)
}

pub(super) async fn save(known: &Arc<Estimates>) {
    let known = Arc::clone(known);
    if let Err(error) = tokio::task::spawn_blocking(move || known.save()).await {
        tracing::error!(%error, "remembering what models take failed");
    }
}

/// What a process takes of each GPU by opening it: measured once for each device and driver.
pub(super) async fn processes(runner: &Runner, known: &Arc<Estimates>, report: &ProbeReport) -> Need {
    let gpus: Vec<&ProbedDevice> = report.devices.iter().filter(|device| device.kind == "GPU").collect();
    let name = |gpu: &ProbedDevice| format!("{} {} {}", gpu.id, gpu.description, gpu.driver);
    if gpus.iter().any(|gpu| known.process(&name(gpu)).is_none()) {
        match runner.process_bytes(PROBE_TIMEOUT).await {
            Ok(measured) => {
                for gpu in &gpus {
                    known.process_measured(name(gpu), measured.get(&gpu.id).copied().unwrap_or(0));
                }
                save(known).await;
            }
            Err(error) => tracing::warn!(%error, "cannot measure what a process takes of a device"),
        }
    }
    gpus.iter().filter_map(|gpu| Some((gpu.id.clone(), known.process(&name(gpu))?))).collect()
}

/// What is asked of a dry run.
pub(super) struct Question {
    pub(super) config: RunnerConfig,
    /// Digests of the files, by path, where they are known.
    digests: Vec<(PathBuf, String)>,
    /// Names and drivers of the devices.
    drivers: Vec<String>,
}

impl Question {
    pub(super) fn new(config: RunnerConfig, model: &Model, observed: &Observed) -> Self {
        let files = model.file.known().map_or([None, None], |stored| [Some(&stored.model), stored.draft.as_ref()]);
        let digest = |file: &StoredModel| Some((file.path.clone(), file.sha256.clone()?));
        let devices = observed.devices.iter().flat_map(|devices| &devices.list);
        let devices = devices.filter(|device| config.devices.contains(&device.id));
        Self {
            digests: files.into_iter().flatten().filter_map(digest).collect(),
            drivers: devices.map(|device| format!("{} {}", device.description, device.driver)).collect(),
            config,
        }
    }

    /// Everything that the answer depends on; `None` for a file that is gone.
    pub(super) async fn key(&self) -> Option<String> {
        let RunnerConfig {
            model_path,
            projector,
            draft_path,
            adapters,
            context,
            engine,
            devices,
            gpu_layers,
            expert_layers_on_cpu,
            parts,
            threads,
            ..
        } = &self.config;
        let mut files = Vec::new();
        let adapter_paths = adapters.iter().map(|adapter| &adapter.path);
        for path in std::iter::once(model_path).chain(projector).chain(draft_path).chain(adapter_paths) {
            let digest = self.digests.iter().find(|(of, _)| of == path).map(|(_, digest)| digest.clone());
            files.push(if let Some(digest) = digest {
                (digest, 0, String::new())
            } else {
                let metadata = tokio::fs::metadata(path).await.ok()?;
                let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
                (path.display().to_string(), metadata.len(), modified.to_string())
            });
        }
        let versions = (env!("CARGO_PKG_VERSION"), llama_cpp_version());
        let part = (gpu_layers, expert_layers_on_cpu, parts);
        estimates::key(&(versions, files, context, engine, (devices, &self.drivers), part, threads))
    }
}

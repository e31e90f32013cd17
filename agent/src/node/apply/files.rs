//! A model's files: its own, and then its projector, draft model and adapters.

use altiplano_crds::model_deployment::{AdapterSpec, ModelSource};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::super::observe::{Happened, Sources, StoredFiles, Trouble};
use super::{Report, chain};
use crate::runner::protocol::AdapterFile;
use crate::store::{Progress, Source, Store, StoreError, StoredModel};

/// How much of files is wanted.
#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    /// All of them, and word of the progress of the model's own.
    Whole(&'a watch::Sender<Progress>, &'a CancellationToken),
    /// What they say of themselves.
    Headers,
}

impl Way<'_> {
    async fn file(self, store: &Store, source: &ModelSource, is_own: bool) -> Result<StoredModel, StoreError> {
        let source = Source::from(source);
        let quiet = watch::Sender::default();
        match self {
            Self::Whole(progress, cancel) => {
                store.ensure(&source, if is_own { progress } else { &quiet }, cancel).await
            }
            Self::Headers => match store.peek(&source).await? {
                Some(peeked) => Ok(peeked),
                None => store.ensure(&source, &quiet, &CancellationToken::new()).await,
            },
        }
    }
}

/// Sees to the model's own file and then to its projector, draft model and adapters, which are smaller.
pub(super) async fn files(store: &Store, sources: &Sources, way: Way<'_>) -> Result<StoredFiles, Trouble> {
    let Sources { model, projector, draft, adapters: adapter_specs } = sources;
    let model = way.file(store, model, true).await.map_err(|error| unstored(None, &error))?;
    let projector = match projector {
        None => None,
        Some(source) => {
            let stored = way.file(store, source, false).await;
            Some(stored.map_err(|error| unstored(Some("projector"), &error))?.path)
        }
    };
    let draft = match draft {
        None => None,
        Some(source) => {
            let stored = way.file(store, source, false).await;
            Some(stored.map_err(|error| unstored(Some("draft"), &error))?)
        }
    };
    let mut adapters = Vec::with_capacity(adapter_specs.len());
    for AdapterSpec { name, source, scale_percent } in adapter_specs {
        let stored = way.file(store, source, false).await;
        let stored = stored.map_err(|error| unstored(Some(&format!("adapter {name}")), &error))?;
        let scale_percent = u32::try_from(*scale_percent).unwrap_or(0);
        adapters.push(AdapterFile { name: name.clone(), path: stored.path, scale_percent });
    }
    Ok(StoredFiles { model, projector, draft, adapters })
}

/// Why a file is not there; `what` names one that is not the model's own.
pub(super) fn unstored(what: Option<&str>, error: &StoreError) -> Trouble {
    let message = what.map_or_else(|| chain(error), |what| format!("{what}: {}", chain(error)));
    Trouble { reason: error.reason().to_owned(), message }
}

/// Passes on whole steps of progress; never ends.
pub(super) async fn tell_progress(
    mut seen: watch::Receiver<Progress>,
    reports: &mpsc::Sender<Report>,
    uid: &str,
    source: &Sources,
) {
    let mut last = None;
    while seen.changed().await.is_ok() {
        let step = seen.borrow_and_update().percent().map(|percent| percent / 5 * 5);
        if let Some(percent) = step
            && step != last
        {
            last = step;
            let what = Happened::FetchProgress(source.clone(), percent);
            // A full channel drops it: the next one is better anyway.
            let _ = reports.try_send(Report { uid: uid.to_owned(), what });
        }
    }
    std::future::pending::<()>().await;
}

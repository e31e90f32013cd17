//! A process that holds a model.

use std::time::{Duration, Instant};

use crate::ledger::Need;
use crate::runner::protocol::RunnerReport;

/// How long a worker may take to give back what its context has grown by. What it has not given back then it keeps.
const SHRINK_TIME: Duration = Duration::from_secs(5);

/// A process that holds a model.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Revision of the model in it.
    pub revision: String,
    /// The devices that it was given; empty is the CPU alone.
    pub devices: Vec<String>,
    /// What people should know about where it runs.
    pub note: Option<String>,
    /// Bytes that the dry run predicted.
    pub predicted: Need,
    /// What it reported.
    pub report: Option<RunnerReport>,
    /// Bytes that it measured.
    pub measured: Need,
    /// The same when it had just been loaded: what was predicted.
    pub loaded: Need,
    /// Bytes of its weights that are pages of the file.
    pub mapped_bytes: u64,
    /// When it was started.
    pub started: Instant,
    /// How far it is.
    pub phase: Phase,
    /// Requests in it, running and waiting.
    pub requests: u32,
    /// Another agent has started it, so how it was when it was loaded is not known.
    pub adopted: bool,
    /// When it was asked to give back what its context has grown by; forgotten with its next request.
    pub shrink_asked: Option<Instant>,
    /// It is on its way out.
    pub leaving: Option<Leaving>,
}

/// How far a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Loading its model.
    Loading {
        /// 0 to 100.
        percent: u8,
    },
    /// Serving.
    Ready {
        /// Since when.
        since: Instant,
    },
}

/// A worker's way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// When it began.
    pub since: Instant,
    /// When its requests must have ended.
    pub deadline: Instant,
    /// Since it lost its route no request of its model was seen, so none is on its way to it.
    pub settled: bool,
    /// It was asked to end.
    pub stopped: bool,
}

impl Worker {
    /// What it took when it was loaded, as it says that it is ready now: of one that was taken over no more than what was
    /// predicted, because it may have grown since.
    pub(super) fn when_loaded(&self, measured: &Need) -> Need {
        let predicted = |device: &String| self.predicted.get(device).copied().filter(|_| self.adopted);
        measured
            .iter()
            .map(|(device, now)| (device.clone(), predicted(device).map_or(*now, |then| then.min(*now))))
            .collect()
    }

    /// Bytes that it has taken since it was loaded, as its context grew: what it can give back.
    #[must_use]
    pub fn grown(&self) -> Need {
        let more = |(device, loaded): (&String, &u64)| {
            let more = self.measured.get(device)?.saturating_sub(*loaded);
            (more > 0).then(|| (device.clone(), more))
        };
        self.loaded.iter().filter_map(more).collect()
    }

    /// Whether it was asked to give that back and may still be about to.
    #[must_use]
    pub fn shrinks_until(&self, now: Instant) -> Option<Instant> {
        self.shrink_asked.map(|asked| asked + SHRINK_TIME).filter(|until| now < *until)
    }

    /// How long its load took.
    #[must_use]
    pub fn load_time(&self) -> Option<Duration> {
        self.report.as_ref().map(|report| Duration::from_millis(report.load_milliseconds))
    }
}

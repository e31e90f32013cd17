//! What a plan says to do.

use std::time::Instant;

use super::super::observe::RouteTo;
use crate::devices::{Target, Trial};
use crate::ledger::Need;
use crate::runner::supervise::WorkerId;

/// Something to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Open the model's port, or tell its listener what has changed.
    Publish {
        /// The model.
        uid: String,
    },
    /// Fetch and check the model's file.
    Fetch {
        /// The model.
        uid: String,
    },
    /// Fetch the header of the model's file.
    Peek {
        /// The model.
        uid: String,
    },
    /// Make a dry run.
    Estimate {
        /// The model.
        uid: String,
        /// Its revision.
        revision: String,
        /// About what.
        on: Trial,
    },
    /// Start a worker.
    Load {
        /// The model.
        uid: String,
        /// Its revision.
        revision: String,
        /// The worker's number.
        worker: WorkerId,
        /// Where.
        target: Target,
        /// Bytes to reserve.
        need: Need,
        /// What people should know about where it runs.
        note: Option<String>,
    },
    /// Send the model's requests somewhere else.
    Route {
        /// The model.
        uid: String,
        /// Where.
        to: RouteTo,
    },
    /// Take the model out of memory until a request asks for it.
    Unload {
        /// The model.
        uid: String,
        /// Why.
        why: String,
        /// Another model needs the room.
        for_room: bool,
    },
    /// Give the model no new requests, so that it becomes idle: another waits for its memory. Those that run go on.
    Yield {
        /// The model.
        uid: String,
    },
    /// Give the model its requests again.
    Resume {
        /// The model.
        uid: String,
    },
    /// Hold the model in memory again.
    Wake {
        /// The model.
        uid: String,
    },
    /// Ask a worker for what its context has grown by.
    Shrink {
        /// The model.
        uid: String,
        /// The worker.
        worker: WorkerId,
        /// Who needs the memory, for people.
        why: String,
    },
    /// Let a worker's requests end; no new ones go to it.
    Drain {
        /// The model.
        uid: String,
        /// The worker.
        worker: WorkerId,
        /// When they must have ended.
        deadline: Instant,
    },
    /// Ask a worker to end.
    Stop {
        /// The model.
        uid: String,
        /// The worker.
        worker: WorkerId,
        /// When it is killed.
        kill_at: Instant,
    },
    /// Kill a worker, before the kernel kills one of its own choice or all of them.
    End {
        /// The model.
        uid: String,
        /// The worker.
        worker: WorkerId,
        /// With the numbers.
        message: String,
    },
    /// Close the model's port and forget the model.
    Remove {
        /// The model.
        uid: String,
    },
}

impl Step {
    /// The model that it is about.
    #[must_use]
    pub fn uid(&self) -> &str {
        match self {
            Self::Publish { uid }
            | Self::Fetch { uid }
            | Self::Peek { uid }
            | Self::Estimate { uid, .. }
            | Self::Load { uid, .. }
            | Self::Route { uid, .. }
            | Self::Unload { uid, .. }
            | Self::Yield { uid }
            | Self::Resume { uid }
            | Self::Wake { uid }
            | Self::Shrink { uid, .. }
            | Self::Drain { uid, .. }
            | Self::Stop { uid, .. }
            | Self::End { uid, .. }
            | Self::Remove { uid } => uid,
        }
    }
}

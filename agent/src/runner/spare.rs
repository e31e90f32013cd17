//! A runner that was started before anybody needs it: executed, linked, its arguments parsed, no device opened. A load gives
//! it its configuration and does not wait for a process to start.
//!
//! It ends with its standard input, so with the agent, and never becomes an orphan.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::process::{Child, Command};

/// Name of its process, until it gets a model.
pub const SPARE: &str = "spare-runner";

/// Name of a process that got one.
pub const RUNNER: &str = "runner";

/// Bytes of host memory that it takes beyond what all runners share.
pub const BYTES: u64 = 16 << 20;

/// How long after a load began the next one is started: the load has the machine to itself until then.
pub(super) const PAUSE: Duration = Duration::from_secs(2);

/// At most one spare runner. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Spare(Arc<Mutex<Slot>>);

#[derive(Default)]
struct Slot {
    child: Option<Child>,
    /// Somebody is about to start it.
    is_coming: bool,
    /// None is kept any more.
    is_closed: bool,
}

impl Spare {
    /// The runner that waits, if it still lives.
    pub(super) fn take(&self) -> Option<Child> {
        let mut child = self.slot().child.take()?;
        // One that has ended would not say so before it is written to.
        matches!(child.try_wait(), Ok(None)).then_some(child)
    }

    /// Starts one in `pause` from now, if there is none.
    pub(super) fn prepare(&self, pause: Duration, command: impl FnOnce() -> Command + Send + 'static) {
        {
            let mut slot = self.slot();
            if slot.is_coming || slot.is_closed || slot.child.is_some() {
                return;
            }
            slot.is_coming = true;
        }
        let this = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let mut slot = this.slot();
            slot.is_coming = false;
            if slot.is_closed || slot.child.is_some() {
                return;
            }
            match command().spawn() {
                Ok(child) => slot.child = Some(child),
                Err(error) => tracing::warn!(%error, "cannot start a spare runner; a load will start its own"),
            }
        });
    }

    /// Ends it; the next load has another one started.
    pub(super) fn end(&self) {
        // Dropping kills it.
        self.slot().child = None;
    }

    /// Ends it for good.
    pub(super) fn close(&self) {
        let mut slot = self.slot();
        slot.is_closed = true;
        slot.child = None;
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Spare").field("is_there", &self.slot().child.is_some()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(script: &'static str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(std::process::Stdio::piped()).kill_on_drop(true);
        command
    }

    async fn until(what: &str, is_so: impl Fn() -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_mins(2);
        while !is_so() {
            assert!(tokio::time::Instant::now() < deadline, "waited for: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn there_is_one_at_most_and_none_that_has_ended() {
        let spare = Spare::default();
        let prepare = |script| spare.prepare(Duration::ZERO, move || command(script));
        assert!(spare.take().is_none());
        for _ in 0..3 {
            prepare("read line");
        }
        until("it is there", || spare.slot().child.is_some()).await;
        let mut child = spare.take().expect("it was started");
        assert!(spare.take().is_none(), "there is one");
        drop(child.stdin.take());
        child.wait().await.unwrap();

        prepare("exit 3");
        until("it is there", || spare.slot().child.is_some()).await;
        let has_ended = || spare.slot().child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(Some(_))));
        until("it has ended", has_ended).await;
        assert!(spare.take().is_none(), "it has ended");

        prepare("read line");
        until("it is there", || spare.slot().child.is_some()).await;
        spare.close();
        assert!(spare.take().is_none(), "it is closed");
        prepare("read line");
        assert!(!spare.slot().is_coming, "for good");
    }
}

//! What the planner remembers between rounds. All of it can be lost: a new leader learns it again, at the price of an
//! estimate or of a refusal tried once more.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::capacity::{Need, Shape};
use super::observe::Fleet;

/// What the planner remembers. Times are the operator's monotonic time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// Bytes needed, by settings and kind of node.
    pub estimates: BTreeMap<(String, Shape), Need>,
    /// Refusals, by the model's uid and the node.
    pub refusals: BTreeMap<(String, String), Refusal>,
    /// When the deletion of a model was first seen.
    pub deleting: BTreeMap<String, Duration>,
    /// Since when a model is to leave a node.
    pub leaving: BTreeMap<(String, String), Duration>,
    /// Since when a node with a ModelNode has no Lease.
    pub absent: BTreeMap<String, Duration>,
    /// When a node was last seen lost.
    pub lost: BTreeMap<String, Duration>,
    /// Revision that a node has served of a model, while it still holds it.
    pub served: BTreeMap<(String, String), String>,
    /// The latest moves.
    pub moves: VecDeque<Duration>,
}

/// A node's no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Revision that was refused.
    pub revision: String,
    /// How often in a row.
    pub tries: u32,
    /// Until when the node is not asked again.
    pub until: Duration,
    /// Reason in the node's status.
    pub reason: String,
    /// Message in the node's status.
    pub message: String,
}

/// First pause after a refusal; it doubles up to [`LONGEST_REFUSAL`].
pub const FIRST_REFUSAL: Duration = Duration::from_secs(10);
/// Longest pause after a refusal.
pub const LONGEST_REFUSAL: Duration = Duration::from_mins(10);
/// Moves off nodes that may start within [`MOVE_WINDOW`].
pub const MOVES: usize = 5;
/// See [`MOVES`].
pub const MOVE_WINDOW: Duration = Duration::from_secs(10);

impl Memory {
    /// Notes that the node refuses the model, and until when it is not asked again.
    pub fn refused(&mut self, uid: &str, node: &str, revision: &str, why: (&str, &str), now: Duration) {
        let key = (uid.to_owned(), node.to_owned());
        let before = self.refusals.get(&key).filter(|refusal| refusal.revision == revision);
        let (tries, until) = match before {
            Some(refusal) if refusal.until > now => (refusal.tries, refusal.until),
            _ => {
                let tries = before.map_or(0, |refusal| refusal.tries);
                let pause = FIRST_REFUSAL.saturating_mul(1 << tries.min(10)).min(LONGEST_REFUSAL);
                (tries + 1, now + pause)
            }
        };
        let (reason, message) = (why.0.to_owned(), why.1.to_owned());
        self.refusals.insert(key, Refusal { revision: revision.to_owned(), tries, until, reason, message });
    }

    /// The refusal that keeps the model off that node for now.
    #[must_use]
    pub fn refusal(&self, uid: &str, node: &str, revision: &str, now: Duration) -> Option<&Refusal> {
        let refusal = self.refusals.get(&(uid.to_owned(), node.to_owned()))?;
        (refusal.revision == revision && refusal.until > now).then_some(refusal)
    }

    /// Whether another move may start now; if not, when.
    ///
    /// # Errors
    /// The time from which one may.
    pub fn may_move(&mut self, now: Duration) -> Result<(), Duration> {
        while self.moves.front().is_some_and(|at| *at + MOVE_WINDOW <= now) {
            self.moves.pop_front();
        }
        match self.moves.front() {
            Some(oldest) if self.moves.len() >= MOVES => Err(*oldest + MOVE_WINDOW),
            _ => Ok(()),
        }
    }

    /// Forgets what is about nothing that exists, so that it stays as small as the fleet.
    pub fn prune(&mut self, fleet: &Fleet, now: Duration) {
        let Self { estimates, refusals, deleting, leaving, absent, lost, served: _, moves: _ } = self;
        estimates.retain(|(settings, _), _| fleet.models().any(|model| model.settings == *settings));
        refusals.retain(|(uid, node), refusal| {
            let stands = fleet.model(uid).is_some_and(|model| model.revision == refusal.revision);
            stands && fleet.nodes.contains_key(node) && refusal.until + LONGEST_REFUSAL > now
        });
        deleting.retain(|uid, _| fleet.models.contains_key(uid));
        leaving.retain(|(uid, node), _| fleet.models.contains_key(uid) && fleet.nodes.contains_key(node));
        absent.retain(|node, _| fleet.nodes.get(node).is_some_and(|node| node.agent.is_none()));
        lost.retain(|node, _| fleet.nodes.contains_key(node));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_back_off_and_double_to_a_cap() {
        let mut memory = Memory::default();
        let mut now = Duration::ZERO;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            memory.refused("m", "a", "r", ("InsufficientMemory", ""), now);
            let until = memory.refusal("m", "a", "r", now).unwrap().until;
            memory.refused("m", "a", "r", ("InsufficientMemory", ""), now + Duration::from_secs(1));
            assert_eq!(memory.refusal("m", "a", "r", now).unwrap().until, until, "one refusal, seen twice");
            pauses.push(until.saturating_sub(now).as_secs());
            now = until;
        }
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
        assert_eq!(memory.refusal("m", "a", "other", Duration::ZERO), None, "another revision may fit");
    }

    #[test]
    fn moves_are_counted_in_a_window() {
        let mut memory = Memory::default();
        for second in 0..5 {
            let now = Duration::from_secs(second);
            assert_eq!(memory.may_move(now), Ok(()));
            memory.moves.push_back(now);
        }
        assert_eq!(memory.may_move(Duration::from_secs(5)), Err(Duration::from_secs(10)));
        assert_eq!(memory.may_move(Duration::from_secs(10)), Ok(()));
    }
}

//! Events: one for each transition, none for a reconcile. Pure.

use altiplano_crds::conditions::{reasons, types};
use altiplano_crds::model_deployment::{Placement, Termination};
use altiplano_crds::{ModelDeploymentStatus, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

/// Characters of a note; the API takes 1 kB.
pub const LONGEST_NOTE: usize = 900;

/// An Event to be published.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    /// Warning, or else Normal.
    pub warning: bool,
    /// Reason, as in the condition.
    pub reason: String,
    /// Message for people.
    pub note: String,
}

/// Reasons with which a condition is False without anything being wrong.
const IN_ORDER: [&str; 14] = [
    reasons::SCALED_TO_ZERO,
    reasons::ESTIMATING,
    reasons::FETCHING,
    reasons::LOADING,
    reasons::NOT_FETCHED,
    reasons::SETTLED,
    reasons::ROLLING_OUT,
    reasons::DRAINING,
    reasons::AS_WANTED,
    reasons::SERVING,
    reasons::IDLE,
    reasons::ALL_PLACED,
    reasons::REPLICAS_MISSING,
    reasons::AGENT_UPGRADE,
];

/// What has happened between two states of a ModelDeployment. A cause that shows in several conditions is one Event.
#[must_use]
pub fn events(before: &ModelDeploymentStatus, after: &ModelDeploymentStatus) -> Vec<Note> {
    let mut notes: Vec<Note> = Vec::new();
    let mut add = |warning: bool, condition: &Condition| {
        if !notes.iter().any(|note| note.reason == condition.reason) {
            let note = names::clip(&condition.message, LONGEST_NOTE);
            notes.push(Note { warning, reason: condition.reason.clone(), note });
        }
    };
    let was = |type_: &str, status: &str| before.conditions.iter().any(|c| c.type_ == type_ && c.status == status);
    let had_reason = |reason: &str| before.conditions.iter().any(|condition| condition.reason == reason);
    for condition in &after.conditions {
        let is_false = condition.status == "False" && condition.type_ != types::DEGRADED;
        let is_degraded = condition.status == "True" && condition.type_ == types::DEGRADED;
        let wrong = (is_false || is_degraded) && !IN_ORDER.contains(&condition.reason.as_str());
        if wrong && !had_reason(&condition.reason) {
            add(true, condition);
        }
        let good = condition.status == "True" && matches!(condition.type_.as_str(), types::READY | types::PLACED);
        if good && !was(&condition.type_, "True") && condition.reason != reasons::SCALED_TO_ZERO {
            add(false, condition);
        }
    }
    // One for each reason: the publisher tells a reason once in a while, and a status says the rest.
    for (placement, end) in terminations(before, after) {
        if !notes.iter().any(|note| note.reason == end.reason) {
            let note = names::clip(&format!("{}: {}", placement.node, end.message), LONGEST_NOTE);
            notes.push(Note { warning: true, reason: end.reason.clone(), note });
        }
    }
    notes
}

/// Workers that have ended on their own since.
fn terminations<'a>(
    before: &'a ModelDeploymentStatus,
    after: &'a ModelDeploymentStatus,
) -> impl Iterator<Item = (&'a Placement, &'a Termination)> {
    after.placements.iter().filter_map(|now| {
        let was = before.placements.iter().find(|was| was.node == now.node);
        let counted = was.and_then(|was| was.restarts).unwrap_or(0);
        // An agent that was started again counts from nothing.
        let ended = now.restarts.is_some_and(|count| count != counted);
        now.last_termination.as_ref().filter(|_| ended).map(|end| (now, end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn status(conditions: &[(&str, &str, &str)]) -> ModelDeploymentStatus {
        let condition = |(type_, status, reason): &(&str, &str, &str)| Condition {
            type_: (*type_).to_owned(),
            status: (*status).to_owned(),
            reason: (*reason).to_owned(),
            message: format!("{type_} is {status}"),
            last_transition_time: Time(jiff::Timestamp::UNIX_EPOCH),
            observed_generation: None,
        };
        ModelDeploymentStatus { conditions: conditions.iter().map(condition).collect(), ..Default::default() }
    }

    fn reasons_of(before: &[(&str, &str, &str)], after: &[(&str, &str, &str)]) -> Vec<String> {
        let kind = |note: &Note| if note.warning { "Warning" } else { "Normal" };
        let notes = events(&status(before), &status(after));
        notes.iter().map(|note| format!("{} {}", kind(note), note.reason)).collect()
    }

    #[test]
    fn table_of_transitions() {
        let loading = [("Ready", "False", "Loading"), ("Placed", "True", "AllPlaced")];
        let serving = [("Ready", "True", "Serving"), ("Placed", "True", "AllPlaced")];
        let missing = [("Ready", "False", "FileNotFound"), ("ModelAvailable", "False", "FileNotFound")];
        assert_eq!(reasons_of(&[], &loading), ["Normal AllPlaced"]);
        assert_eq!(reasons_of(&loading, &serving), ["Normal Serving"]);
        assert_eq!(reasons_of(&serving, &serving), Vec::<String>::new(), "nothing has happened");
        assert_eq!(reasons_of(&[], &missing), ["Warning FileNotFound"], "one cause, one Event");
        assert_eq!(reasons_of(&missing, &missing), Vec::<String>::new());
        let idle = [("Ready", "True", "Idle"), ("Placed", "True", "AllPlaced")];
        assert_eq!(reasons_of(&serving, &idle), Vec::<String>::new(), "unloading is no news");
        assert_eq!(reasons_of(&serving, &[("Degraded", "True", "OnCPU")]), ["Warning OnCPU"]);
    }

    #[test]
    fn an_end_of_a_worker_is_told_with_its_reason() {
        let status = |nodes: &[(&str, i32, &str)]| {
            let placement = |(node, restarts, reason): &(&str, i32, &str)| Placement {
                node: (*node).to_owned(),
                restarts: (*restarts > 0).then_some(*restarts),
                last_termination: (*restarts > 0)
                    .then(|| Termination { reason: (*reason).to_owned(), message: "the worker ended".to_owned() }),
                ..Placement::default()
            };
            ModelDeploymentStatus { placements: nodes.iter().map(placement).collect(), ..Default::default() }
        };
        let told = |before: &[(&str, i32, &str)], after: &[(&str, i32, &str)]| -> Vec<String> {
            let notes = events(&status(before), &status(after));
            notes.iter().map(|note| format!("{} {} {}", note.warning, note.reason, note.note)).collect()
        };
        let none: [String; 0] = [];
        let first = [("a", 0, ""), ("b", 1, "OutOfMemory")];
        assert_eq!(told(&[("a", 0, "")], &first), ["true OutOfMemory b: the worker ended"]);
        assert_eq!(told(&first, &first), none, "nothing has happened");
        let both = [("a", 1, "WorkerExited"), ("b", 2, "WorkerExited")];
        assert_eq!(told(&first, &both), ["true WorkerExited a: the worker ended"], "one for each reason");
        assert_eq!(told(&first, &[("a", 0, ""), ("b", 0, "")]), none, "the agent was started again");
        assert_eq!(told(&[("a", 3, "x")], &[("a", 1, "WorkerHung")]), ["true WorkerHung a: the worker ended"]);
    }
}

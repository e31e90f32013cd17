//! What is said of the upgrade: a condition on the agents' DaemonSet, and Events. Pure.

use altiplano_crds::conditions::{reasons, types};
use altiplano_crds::names;
use k8s_openapi::api::apps::v1::DaemonSetCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::observe::DaemonSetSeen;
use super::plan::Progress;
use crate::clock::Now;
use crate::fleet::events::{LONGEST_NOTE, Note};

/// Nodes that are named in a message.
const MOST_NAMED: usize = 5;

/// The condition.
#[must_use]
pub fn condition(daemon_set: &DaemonSetSeen, progress: &Progress, now: Now) -> DaemonSetCondition {
    let Progress { agents, updated, steps, blocked, paused } = progress;
    let (status, reason) = if !blocked.is_empty() {
        ("False", reasons::UPGRADE_BLOCKED)
    } else if *paused && updated < agents {
        ("False", reasons::UPGRADE_PAUSED)
    } else if updated == agents && steps.is_empty() {
        ("True", reasons::UP_TO_DATE)
    } else {
        ("False", reasons::ROLLING_OUT)
    };
    let mut message = format!("{updated} of {agents} agents are of the newest revision");
    let first = steps.iter().filter(|(place, _)| blocked.contains(*place));
    let rest = steps.iter().filter(|(place, _)| !blocked.contains(*place));
    for (place, step) in first.chain(rest).take(MOST_NAMED) {
        message = format!("{message}; {place}: {step}");
    }
    if !blocked.is_empty() {
        message.push_str("; until that has changed no other agent is replaced");
    }
    let before = daemon_set.condition.as_ref().filter(|before| before.status == status);
    DaemonSetCondition {
        type_: types::AGENTS_UP_TO_DATE.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(names::clip(&message, names::MAX_MESSAGE_CHARS)),
        last_transition_time: before.map_or(Some(Time(now.wall)), |before| before.last_transition_time.clone()),
    }
}

/// What has happened since the condition was written last; the first one is no news when all is well.
#[must_use]
pub fn event(before: Option<&DaemonSetCondition>, after: &DaemonSetCondition) -> Option<Note> {
    let reason = after.reason.clone().unwrap_or_default();
    let is_first = before.is_none() && reason == reasons::UP_TO_DATE;
    if is_first || before.is_some_and(|before| before.reason == after.reason) {
        return None;
    }
    let warning = reason == reasons::UPGRADE_BLOCKED;
    let note = names::clip(after.message.as_deref().unwrap_or_default(), LONGEST_NOTE);
    Some(Note { warning, reason, note })
}

//! Pure: which messages of a conversation go, or what of their texts, and whether the rest fits.

use std::ops::Range;

use altiplano_crds::model_deployment::OverflowPolicy;
use serde_json::Value;

use super::Budget;
use super::layout::Size;

/// Renderings of one request at most, beside the first: an estimate that was too low is mended so often.
const ROUNDS: usize = 3;

/// Tokens of the mark, about.
const MARK_TOKENS: u32 = 8;

/// Tokens of text that are left at least where a text is cut.
const LEAST_TEXT: u32 = 16;

/// A conversation as the model reads it.
pub(crate) trait Reading {
    /// Tokens in all.
    fn tokens(&self) -> u32;
    /// Tokens of each message.
    fn sizes(&self) -> Vec<Size>;
    /// The text of a message of so many tokens without its middle.
    fn cut(&self, message: usize, size: u32, head: u32, tail: u32) -> String;
}

/// A conversation that fits.
pub(crate) struct Fitted<P> {
    /// What is left of it.
    pub(crate) messages: Vec<Value>,
    /// The same as it was read.
    pub(crate) prepared: P,
    /// Tokens of that.
    pub(crate) tokens: u32,
    /// Messages that are gone whole.
    pub(crate) dropped: u32,
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Keep,
    Drop,
    /// So many tokens of its text stay, at its beginning and at its end.
    Cut {
        head: u32,
        tail: u32,
    },
}

/// Takes away from a conversation that does not fit, which was read as `first`. `read` reads what would be left and counts
/// its tokens; `None`: it cannot be read. Returns `None` when nothing that may go is enough.
pub(crate) fn fit<P>(
    policy: OverflowPolicy,
    budget: Budget,
    messages: &[Value],
    first: &impl Reading,
    mut read: impl FnMut(&[Value]) -> Option<(u32, P)>,
) -> Option<Fitted<P>> {
    let sizes = first.sizes();
    let mut excess = budget.excess(first.tokens());
    let mut longer = None;
    for _ in 0..ROUNDS {
        let fates = match policy {
            OverflowPolicy::Reject => None,
            OverflowPolicy::DropOldest => {
                let drop = |excess| drop_oldest(messages, &sizes, excess);
                drop(budget.in_steps(excess)).or_else(|| drop(excess))
            }
            OverflowPolicy::DropMiddle => drop_middle(messages, &sizes, excess),
        };
        let Some(fates) = fates else { break };
        let left = apply(messages, &sizes, &fates, first);
        let (tokens, prepared) = read(&left)?;
        let dropped = fates.iter().filter(|fate| **fate == Fate::Drop).count();
        let fitted = Fitted { messages: left, prepared, tokens, dropped: u32::try_from(dropped).unwrap_or(u32::MAX) };
        if budget.is_good(tokens) {
            return Some(fitted);
        }
        // It may be a little too long for a long answer and the best there is.
        if tokens < budget.limit {
            longer = Some(fitted);
        }
        excess = excess.saturating_add(budget.excess(tokens).max(1));
    }
    longer
}

fn apply(messages: &[Value], sizes: &[Size], fates: &[Fate], reading: &impl Reading) -> Vec<Value> {
    let one = |(at, (message, fate)): (usize, (&Value, &Fate))| match *fate {
        Fate::Keep => Some(message.clone()),
        Fate::Drop => None,
        Fate::Cut { head, tail } => {
            let mut message = message.clone();
            message["content"] = reading.cut(at, sizes[at].text, head, tail).into();
            Some(message)
        }
    };
    messages.iter().zip(fates).enumerate().filter_map(one).collect()
}

/// What decides over a message's fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    System,
    User,
    Other,
}

fn role(message: &Value) -> Role {
    match message.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        _ => Role::Other,
    }
}

/// Drops messages, oldest first, until `excess` tokens are gone. Whole turns go: a user's message with all that answers
/// it, so that an assistant's words never stand without what they answer, nor a tool's result without its call. System
/// messages, the last user message and the end of the conversation stay; of a last turn with many tool calls the oldest
/// calls go with their results. `None`: not enough can go.
fn drop_oldest(messages: &[Value], sizes: &[Size], excess: u32) -> Option<Vec<Fate>> {
    let mut fates = vec![Fate::Keep; messages.len()];
    let mut gone = 0_u32;
    for group in groups(messages) {
        if gone >= excess {
            break;
        }
        for index in group.filter(|&index| role(&messages[index]) != Role::System) {
            gone = gone.saturating_add(sizes[index].whole);
            fates[index] = Fate::Drop;
        }
    }
    (gone >= excess).then_some(fates)
}

/// Takes `excess` tokens from the middle of all that users, the assistant and tools said, as if it were one text. Turns
/// that lie in it go whole; the messages at its edges lose the part that lies in it, as do others that have to stay. What
/// is said since the last user message stays if it can.
fn drop_middle(messages: &[Value], sizes: &[Size], excess: u32) -> Option<Vec<Fate>> {
    let last_turn = messages.iter().rposition(|message| role(message) == Role::User).unwrap_or(messages.len());
    [last_turn, messages.len()].into_iter().find_map(|end| cut_texts(messages, sizes, end, excess))
}

/// The same among the first `end` messages.
fn cut_texts(messages: &[Value], sizes: &[Size], end: usize, excess: u32) -> Option<Vec<Fate>> {
    let has_text = |index: usize| role(&messages[index]) != Role::System && sizes[index].text > 0;
    let texts: Vec<usize> = (0..end).filter(|&index| has_text(index)).collect();
    let total = texts.iter().fold(0_u32, |sum, &index| sum.saturating_add(sizes[index].whole));
    let gone = excess.saturating_add(MARK_TOKENS);
    let left = total.checked_sub(gone).filter(|&left| left >= LEAST_TEXT)?;
    let middle = left.div_ceil(2)..left.div_ceil(2) + gone;

    let mut fates = vec![Fate::Keep; messages.len()];
    let mut at = 0_u32;
    for index in texts {
        let Size { whole, text } = sizes[index];
        let own = at..at + whole;
        at = own.end;
        let (from, to) = (own.start.max(middle.start), own.end.min(middle.end));
        if from < to {
            // What the template writes around it stays with it.
            let stays = text.saturating_sub(to - from);
            let head = stays.min(from - own.start);
            fates[index] = Fate::Cut { head, tail: stays - head };
        }
    }
    let all_gone = |index: usize| fates[index] == Fate::Cut { head: 0, tail: 0 };
    let may_go = |index: usize| role(&messages[index]) == Role::System || all_gone(index) || !has_text(index);
    let goes = |group: &Range<usize>| group.clone().all(may_go) && group.clone().any(all_gone);
    let gone: Vec<_> = groups(messages).into_iter().filter(goes).collect();
    for index in gone.into_iter().flatten().filter(|&index| role(&messages[index]) != Role::System) {
        fates[index] = Fate::Drop;
    }
    Some(fates)
}

/// Groups of messages that may go, each as a whole, the oldest first.
fn groups(messages: &[Value]) -> Vec<Range<usize>> {
    let last_user = messages.iter().rposition(|message| role(message) == Role::User);
    let turns_end = last_user.unwrap_or(0);
    let mut groups = Vec::new();
    // Turns before the last one: each begins with a user's message, the first also with what stands before it.
    let mut start = 0;
    for index in 0..turns_end {
        let begins = role(&messages[index]) == Role::User
            && index > start
            && messages[start..index].iter().any(|message| role(message) != Role::System)
            && role(&messages[index - 1]) != Role::User;
        if begins {
            groups.push(start..index);
            start = index;
        }
    }
    if start < turns_end {
        groups.push(start..turns_end);
    }
    // Behind the last user message: each assistant's message with the results of its calls, all but the last group.
    let mut steps: Vec<Range<usize>> = Vec::new();
    for (index, message) in messages.iter().enumerate().skip(turns_end + usize::from(last_user.is_some())) {
        let is_result = message.get("role").and_then(Value::as_str) == Some("tool");
        match steps.last_mut() {
            Some(Range { end, .. }) if is_result => *end = index + 1,
            _ => steps.push(index..index + 1),
        }
    }
    steps.pop();
    groups.extend(steps);
    groups.retain(|group| messages[group.clone()].iter().any(|message| role(message) != Role::System));
    groups
}

#[cfg(test)]
mod tests;

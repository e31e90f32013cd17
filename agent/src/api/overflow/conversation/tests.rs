use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::api::overflow::MARK;

/// One letter a message: s(ystem), u(ser), a(ssistant), c(all of a tool), t(ool's result).
fn conversation(letters: &str, words: usize) -> Vec<Value> {
    let message = |(at, letter): (usize, char)| {
        let text = (0..words).map(|word| format!("{letter}{at}.{word}")).collect::<Vec<_>>().join(" ");
        match letter {
            's' => json!({"role": "system", "content": text}),
            'u' => json!({"role": "user", "content": text}),
            'a' => json!({"role": "assistant", "content": text, "reasoning_content": "because"}),
            'c' => json!({"role": "assistant", "content": "", "tool_calls": [{"id": at.to_string()}]}),
            _ => json!({"role": "tool", "tool_call_id": "1", "content": text}),
        }
    };
    letters.chars().enumerate().map(message).collect()
}

/// Words are tokens, and each message has two more.
struct Words(Vec<Value>);

impl Words {
    fn text(&self, message: usize) -> Vec<&str> {
        self.0[message]["content"].as_str().unwrap().split_whitespace().collect()
    }
}

fn number(number: usize) -> u32 {
    u32::try_from(number).unwrap()
}

impl Reading for Words {
    fn tokens(&self) -> u32 {
        self.sizes().iter().map(|size| size.whole).sum()
    }

    fn sizes(&self) -> Vec<Size> {
        let size = |at| {
            let text = number(self.text(at).len());
            Size { whole: text + 2, text }
        };
        (0..self.0.len()).map(size).collect()
    }

    fn cut(&self, message: usize, _: u32, head: u32, tail: u32) -> String {
        let words = self.text(message);
        let (head, tail) = (head as usize, words.len() - tail as usize);
        [&words[..head], &[MARK], &words[tail..]].concat().join(" ")
    }
}

/// What stays, in the same letters, when messages of ten tokens each have to lose `excess`.
fn left(letters: &str, excess: u32) -> Option<String> {
    let messages = conversation(letters, 8);
    let fates = drop_oldest(&messages, &vec![Size { whole: 10, text: 8 }; messages.len()], excess)?;
    Some(letters.chars().zip(fates).filter(|(_, fate)| *fate == Fate::Keep).map(|(letter, _)| letter).collect())
}

#[test]
fn the_oldest_turns_go_whole() {
    for (letters, excess, expected) in [
        ("suauau", 0, Some("suauau")),
        ("suauau", 1, Some("suau")),
        ("suauau", 20, Some("suau")),
        ("suauau", 21, Some("su")),
        ("suauau", 41, None),
        ("u", 1, None),
        ("su", 1, None),
        ("", 1, None),
        // The call of a tool goes with its result, and with the question that led to it.
        ("suctauau", 1, Some("suau")),
        // Two messages of a user in a row are one turn.
        ("uuauau", 5, Some("uau")),
        // System messages stay wherever they stand.
        ("suasau", 5, Some("ssu")),
        // A conversation that begins with the assistant's greeting.
        ("sauau", 5, Some("suau")),
        // The last turn's own calls: the oldest go, the last one stays.
        ("suctctct", 5, Some("suctct")),
        ("suctctct", 40, Some("suct")),
        ("suctctct", 41, None),
        ("suauctct", 30, Some("suct")),
        // An answer that is to be continued stays.
        ("suaua", 5, Some("sua")),
        // No user at all.
        ("saaa", 5, Some("saa")),
    ] {
        assert_eq!(left(letters, excess).as_deref(), expected, "{letters} - {excess}");
    }
}

/// What stays of messages of 30 words each: capital letters are cut, `-` is gone.
fn middle(letters: &str, excess: u32) -> Option<String> {
    let messages = conversation(letters, 30);
    let fates = drop_middle(&messages, &Words(messages.clone()).sizes(), excess)?;
    let show = |(letter, fate): (char, Fate)| match fate {
        Fate::Keep => letter,
        Fate::Drop => '-',
        Fate::Cut { .. } => letter.to_ascii_uppercase(),
    };
    Some(letters.chars().zip(fates).map(show).collect())
}

#[test]
fn the_middle_of_a_conversation_goes() {
    for (letters, excess, expected) in [
        // One long text.
        ("su", 6, Some("sU")),
        ("su", 9, None),
        ("u", 1, Some("U")),
        ("", 1, None),
        // The last question stays while the rest has enough; the middle lies at the edge of both.
        ("suau", 20, Some("sUAu")),
        ("suau", 60, Some("sUAU")),
        ("suau", 73, None),
        // A turn that lies in it goes whole, and with it calls and results.
        ("uauauau", 80, Some("uA--Uau")),
        ("uauctuau", 80, Some("uA---Uau")),
        // The turn that is only touched keeps its place.
        ("uauauau", 30, Some("uaUAuau")),
        // System messages stay.
        ("uasuauau", 80, Some("uAs--Uau")),
    ] {
        assert_eq!(middle(letters, excess).as_deref(), expected, "{letters} - {excess}");
    }
}

#[test]
fn the_marks_stand_where_words_were() {
    let messages = conversation("su", 40);
    let budget = Budget { limit: 80, target: 70 };
    let read = |left: &[Value]| Some((Words(left.to_vec()).tokens(), ()));
    let fitted = fit(OverflowPolicy::DropMiddle, budget, &messages, &Words(messages.clone()), read).unwrap();
    assert_eq!((fitted.messages.len(), fitted.dropped), (2, 0));
    assert_eq!(fitted.messages[0], messages[0]);
    let said = fitted.messages[1]["content"].as_str().unwrap();
    let (head, tail) = said.split_once(MARK).unwrap();
    assert!(head.starts_with("u1.0 u1.1 ") && tail.ends_with(" u1.38 u1.39"), "{said}");
    assert!(fitted.tokens <= 70);
}

#[test]
fn an_estimate_that_was_too_low_is_mended() {
    /// Says at first that messages are twice as long as they are.
    struct Wrong(Words);
    impl Reading for Wrong {
        fn tokens(&self) -> u32 {
            self.0.tokens()
        }
        fn sizes(&self) -> Vec<Size> {
            self.0.sizes().iter().map(|size| Size { whole: size.whole * 2, text: size.text }).collect()
        }
        fn cut(&self, message: usize, size: u32, head: u32, tail: u32) -> String {
            self.0.cut(message, size, head, tail)
        }
    }
    let messages = conversation("suauauauauau", 18);
    let mut readings = 0;
    let read = |left: &[Value]| {
        readings += 1;
        Some((Words(left.to_vec()).tokens(), ()))
    };
    let budget = Budget::new(160, None);
    let fitted = fit(OverflowPolicy::DropOldest, budget, &messages, &Wrong(Words(messages.clone())), read).unwrap();
    assert!(budget.is_good(fitted.tokens), "{}", fitted.tokens);
    assert!(readings <= ROUNDS, "{readings}");
    // One that cannot be read is not tried again.
    let fitted = fit(OverflowPolicy::DropOldest, budget, &messages, &Words(messages.clone()), |_| None::<(u32, ())>);
    assert!(fitted.is_none());
}

/// A conversation that grows is cut at the same place for some turns, so that what was read can be used again.
#[test]
fn the_beginning_stays_the_same_for_some_turns() {
    let budget = Budget::new(400, Some(50));
    let mut beginnings = Vec::new();
    for turns in 20..40 {
        let messages = conversation(&format!("s{}u", "ua".repeat(turns)), 8);
        let read = |left: &[Value]| Some((Words(left.to_vec()).tokens(), ()));
        let fitted = fit(OverflowPolicy::DropOldest, budget, &messages, &Words(messages.clone()), read).unwrap();
        beginnings.push(fitted.messages[1].clone());
    }
    beginnings.dedup();
    assert!(beginnings.len() <= 9, "{}", beginnings.len());
}

proptest! {
    #[test]
    fn what_must_stay_stays(letters in "[suact]{0,40}", words in 1usize..60, limit in 16u32..2000, max in 0u32..600) {
        let messages = conversation(&letters, words);
        let budget = Budget::new(limit, Some(max));
        let whole = Words(messages.clone());
        let read = |left: &[Value]| Some((Words(left.to_vec()).tokens(), ()));
        for policy in [OverflowPolicy::DropOldest, OverflowPolicy::DropMiddle] {
            if whole.tokens() < limit {
                continue;
            }
            let Some(fitted) = fit(policy, budget, &messages, &whole, read) else { continue };
            let Fitted { messages: left, prepared: (), tokens, dropped } = fitted;
            prop_assert!(tokens < limit);
            prop_assert_eq!(left.len() + dropped as usize, messages.len());
            // Which of the messages each of those that are left was; order is kept.
            let mut from = 0;
            let mut places = Vec::new();
            for message in &left {
                let same = |other: &Value| {
                    let text = |of: &Value| of["content"].as_str().unwrap().to_owned();
                    let (now, before) = (text(message), text(other));
                    let is_cut = now.split_once(MARK).is_some_and(|(head, tail)| {
                        before.starts_with(head.trim()) && before.ends_with(tail.trim())
                    });
                    message["role"] == other["role"] && message["tool_calls"] == other["tool_calls"] && (now == before || is_cut)
                };
                let place = messages[from..].iter().position(same);
                prop_assert!(place.is_some(), "order, or a stranger: {} of {}", message, letters);
                from += place.unwrap() + 1;
                places.push(from - 1);
            }
            let last_user = messages.iter().rposition(|message| role(message) == Role::User);
            for (at, message) in messages.iter().enumerate() {
                if role(message) == Role::System {
                    prop_assert!(left.contains(message), "a system message is as it was");
                }
                if policy == OverflowPolicy::DropOldest && (Some(at) == last_user || at + 1 == messages.len()) {
                    prop_assert!(left.contains(message), "the last ones are as they were");
                }
            }
            let is_last = |message: &Value| message["role"] == messages[messages.len() - 1]["role"];
            prop_assert!(left.last().is_some_and(is_last));
            // A result stays with its call and goes with it.
            let calls = |of: &[Value]| of.windows(2).filter(|pair| pair[1]["role"] == "tool" && pair[0].get("tool_calls").is_some()).count();
            let (calls_left, answered) = (left.iter().filter(|message| message.get("tool_calls").is_some()), calls(&left));
            let unanswered = messages.windows(2).filter(|pair| pair[0].get("tool_calls").is_some() && pair[1]["role"] != "tool").count()
                + usize::from(messages.last().is_some_and(|last| last.get("tool_calls").is_some()));
            prop_assert!(calls_left.count() <= answered + unanswered, "a call lost its result: {:?}", left);
            // What fits is left alone: what is left is what would be left of it.
            prop_assert_eq!(Words(left.clone()).tokens(), tokens);
        }
    }
}

//! Where in a grammar an output is.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use llguidance::toktrie::{Recognizer, SimpleVob, TokTrie};

use super::parse::{self, FindToken};
use super::program::{Op, Program};

/// Work for one mask or one token: nodes looked at.
const FUEL: usize = 100_000;

/// Nodes and states that are kept between two tokens; with more, all but the present ones are forgotten.
pub(super) const KEPT: usize = 50_000;

/// No node: the end of the grammar comes next.
const NONE: u32 = u32::MAX;

/// Not looked for yet.
const UNKNOWN: u32 = u32::MAX;

/// The state from which nothing goes on.
const DEAD: u32 = 0;

/// A place in the grammar: the operation that comes next and what follows the rule it is in. Equal ones are one.
pub(super) type Node = (u32, u32);

/// Why a matcher cannot go on.
type Error = &'static str;

const TOO_AMBIGUOUS: Error = "the grammar is too ambiguous: too many ways to go on have to be followed at once";

/// All places that an output may be in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    /// Sorted; their operations take a byte or a token.
    nodes: Box<[u32]>,
    /// The output may end here.
    accepting: bool,
}

/// Follows one output.
#[derive(Clone, Debug)]
pub(in crate::engine) struct Matcher {
    program: Arc<Program>,
    pub(super) nodes: Vec<Node>,
    node_ids: HashMap<Node, u32>,
    pub(super) states: Vec<Arc<State>>,
    state_ids: HashMap<Arc<State>, u32>,
    /// Where each byte leads, for the states in which it was asked.
    next: Vec<Option<Box<[u32; 256]>>>,
    now: u32,
    fuel: usize,
}

impl Matcher {
    /// The beginning of a grammar.
    pub(in crate::engine) fn new(source: &str, find_token: FindToken<'_>) -> Result<Self, String> {
        let program = Arc::new(parse::parse(source, find_token)?);
        let mut matcher = Self {
            program,
            nodes: Vec::new(),
            node_ids: HashMap::new(),
            states: Vec::new(),
            state_ids: HashMap::new(),
            next: Vec::new(),
            now: DEAD,
            fuel: FUEL,
        };
        matcher.forget();
        let root = matcher.program.root;
        let begins: Vec<Node> = matcher.program.rules[root as usize].iter().map(|&start| (start, NONE)).collect();
        matcher.now = matcher.state_after(begins)?;
        if matcher.now == DEAD {
            return Err("the grammar allows no text".to_owned());
        }
        Ok(matcher)
    }

    /// Goes on with bytes that are a text; on an error nothing has changed.
    pub(in crate::engine) fn push_bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.fuel = FUEL;
        let end = self.after_bytes(self.now, bytes)?;
        self.go(end)
    }

    /// Goes on with a token that stands for these bytes; on an error nothing has changed.
    pub(in crate::engine) fn push_token(&mut self, token: i32, bytes: &[u8]) -> Result<(), Error> {
        self.fuel = FUEL;
        let end = self.after_token(token, bytes)?;
        self.go(end)
    }

    /// Whether the token, which stands for these bytes, may come.
    pub(in crate::engine) fn allows(&mut self, token: i32, bytes: &[u8]) -> Result<bool, Error> {
        self.fuel = FUEL;
        Ok(self.after_token(token, bytes)? != DEAD)
    }

    /// Sets the bits of the tokens that may come.
    pub(in crate::engine) fn mask(&mut self, trie: &TokTrie) -> Result<SimpleVob, Error> {
        self.fuel = FUEL;
        let mut mask = trie.alloc_token_set();
        let mut walk = Walk { stack: vec![self.now], failed: None, matcher: self };
        trie.add_bias(&mut walk, &mut mask, &[]);
        if let Some(error) = walk.failed {
            return Err(error);
        }
        let state = Arc::clone(&self.states[self.now as usize]);
        let size = u32::try_from(trie.vocab_size()).unwrap_or(0);
        for &node in &state.nodes {
            match self.op(self.nodes[node as usize].0) {
                Op::Token(token) => {
                    if let Some(token) = u32::try_from(token).ok().filter(|token| *token < size) {
                        mask.allow_token(token);
                    }
                }
                Op::NotToken(not) => {
                    let others =
                        (0..size).filter(|&token| i64::from(token) != i64::from(not) && !trie.token(token).is_empty());
                    others.for_each(|token| mask.allow_token(token));
                }
                Op::Bytes(..) | Op::Rule(_) | Op::End => {}
            }
        }
        Ok(mask)
    }

    /// The output may end here.
    pub(in crate::engine) fn is_accepting(&self) -> bool {
        self.states[self.now as usize].accepting
    }

    /// The output must end here.
    pub(in crate::engine) fn is_complete(&self) -> bool {
        self.is_accepting() && self.states[self.now as usize].nodes.is_empty()
    }

    fn go(&mut self, to: u32) -> Result<(), Error> {
        if to == DEAD {
            return Err("the grammar does not allow this token");
        }
        self.now = to;
        if self.nodes.len() + self.states.len() > KEPT {
            self.compact();
        }
        Ok(())
    }

    fn op(&self, position: u32) -> Op {
        self.program.ops[position as usize]
    }

    fn after_bytes(&mut self, mut state: u32, bytes: &[u8]) -> Result<u32, Error> {
        for &byte in bytes {
            if state == DEAD {
                break;
            }
            state = self.after_byte(state, byte)?;
        }
        Ok(state)
    }

    fn after_token(&mut self, token: i32, bytes: &[u8]) -> Result<u32, Error> {
        let by_bytes = if bytes.is_empty() { DEAD } else { self.after_bytes(self.now, bytes)? };
        let present = Arc::clone(&self.states[self.now as usize]);
        let mut reached: Vec<Node> = Vec::new();
        for &node in &present.nodes {
            let (position, after) = self.nodes[node as usize];
            let takes = match self.op(position) {
                Op::Token(wanted) => wanted == token,
                Op::NotToken(not) => not != token && !bytes.is_empty(),
                Op::Bytes(..) | Op::Rule(_) | Op::End => false,
            };
            if takes {
                reached.push((position + 1, after));
            }
        }
        if reached.is_empty() {
            return Ok(by_bytes);
        }
        let state = Arc::clone(&self.states[by_bytes as usize]);
        reached.extend(state.nodes.iter().map(|&node| self.nodes[node as usize]));
        self.closure(reached, state.accepting)
    }

    fn after_byte(&mut self, state: u32, byte: u8) -> Result<u32, Error> {
        let known = self.next[state as usize].as_ref().map_or(UNKNOWN, |next| next[byte as usize]);
        if known != UNKNOWN {
            return Ok(known);
        }
        let present = Arc::clone(&self.states[state as usize]);
        self.spend(present.nodes.len() + 1)?;
        let mut reached = Vec::new();
        for &node in &present.nodes {
            let (position, after) = self.nodes[node as usize];
            if let Op::Bytes(low, high) = self.op(position)
                && (low..=high).contains(&byte)
            {
                reached.push((position + 1, after));
            }
        }
        let to = self.state_after(reached)?;
        self.next[state as usize].get_or_insert_with(|| Box::new([UNKNOWN; 256]))[byte as usize] = to;
        Ok(to)
    }

    fn spend(&mut self, work: usize) -> Result<(), Error> {
        self.fuel = self.fuel.checked_sub(work).ok_or(TOO_AMBIGUOUS)?;
        Ok(())
    }

    fn state_after(&mut self, places: Vec<Node>) -> Result<u32, Error> {
        self.closure(places, false)
    }

    /// The state of all places that are reached from these without a byte.
    fn closure(&mut self, mut todo: Vec<Node>, mut accepting: bool) -> Result<u32, Error> {
        let program = Arc::clone(&self.program);
        let mut seen: HashSet<Node> = HashSet::new();
        let mut found: Vec<u32> = Vec::new();
        while let Some((position, after)) = todo.pop() {
            self.spend(1)?;
            match program.ops[position as usize] {
                Op::End if after == NONE => accepting = true,
                Op::End => todo.push(self.nodes[after as usize]),
                Op::Rule(rule) => {
                    if !seen.insert((position, after)) {
                        continue;
                    }
                    // What follows a rule at the end of another is what follows that one.
                    let then = match program.ops[position as usize + 1] {
                        Op::End => after,
                        _ => self.node((position + 1, after)),
                    };
                    todo.extend(program.rules[rule as usize].iter().map(|&start| (start, then)));
                }
                Op::Bytes(..) | Op::Token(_) | Op::NotToken(_) => found.push(self.node((position, after))),
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(self.state(State { nodes: found.into(), accepting }))
    }

    fn node(&mut self, node: Node) -> u32 {
        let next = u32::try_from(self.nodes.len()).unwrap_or(NONE);
        *self.node_ids.entry(node).or_insert_with(|| {
            self.nodes.push(node);
            next
        })
    }

    fn state(&mut self, state: State) -> u32 {
        if let Some(&known) = self.state_ids.get(&state) {
            return known;
        }
        let id = u32::try_from(self.states.len()).unwrap_or(DEAD);
        let state = Arc::new(state);
        self.states.push(Arc::clone(&state));
        self.state_ids.insert(state, id);
        self.next.push(None);
        id
    }

    /// Back to the state that is none.
    fn forget(&mut self) {
        self.nodes.clear();
        self.node_ids.clear();
        self.states.clear();
        self.state_ids.clear();
        self.next.clear();
        let dead = self.state(State { nodes: Box::default(), accepting: false });
        debug_assert_eq!(dead, DEAD);
    }

    /// Forgets all states but the present one.
    fn compact(&mut self) {
        let old = std::mem::take(&mut self.nodes);
        let present = Arc::clone(&self.states[self.now as usize]);
        self.forget();
        let mut kept: HashMap<u32, u32> = HashMap::new();
        let mut nodes: Vec<u32> = Vec::with_capacity(present.nodes.len());
        for &node in &present.nodes {
            // What follows must have its number first, from the outermost rule inwards.
            let mut chain = Vec::new();
            let mut at = node;
            while at != NONE && !kept.contains_key(&at) {
                chain.push(at);
                at = old[at as usize].1;
            }
            for at in chain.into_iter().rev() {
                let (position, after) = old[at as usize];
                let after = kept.get(&after).copied().unwrap_or(NONE);
                let number = self.node((position, after));
                kept.insert(at, number);
            }
            nodes.extend(kept.get(&node));
        }
        nodes.sort_unstable();
        self.now = self.state(State { nodes: nodes.into(), accepting: present.accepting });
    }
}

/// A walk over the vocabulary.
struct Walk<'m> {
    matcher: &'m mut Matcher,
    /// The states after each byte of the present prefix.
    stack: Vec<u32>,
    failed: Option<Error>,
}

impl Recognizer for Walk<'_> {
    fn pop_bytes(&mut self, count: usize) {
        self.stack.truncate(self.stack.len().saturating_sub(count).max(1));
    }

    fn collapse(&mut self) {}

    fn trie_finished(&mut self) {
        self.stack.truncate(1);
    }

    fn try_push_byte(&mut self, byte: u8) -> bool {
        let state = self.stack.last().copied().unwrap_or(DEAD);
        if self.failed.is_some() {
            return false;
        }
        match self.matcher.after_byte(state, byte) {
            Ok(DEAD) => false,
            Ok(next) => {
                self.stack.push(next);
                true
            }
            Err(error) => {
                self.failed = Some(error);
                false
            }
        }
    }
}

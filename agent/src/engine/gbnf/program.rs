//! The rules of a grammar as one list of operations on bytes.

/// Operations of a grammar, its repetitions written out.
pub(super) const MAX_OPS: usize = 200_000;

/// One step of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// A byte from the first to the second.
    Bytes(u8, u8),
    /// This token.
    Token(i32),
    /// Any token but this one.
    NotToken(i32),
    /// What this rule allows.
    Rule(u32),
    /// The alternative is complete.
    End,
}

/// A grammar that can be followed.
#[derive(Debug)]
pub(super) struct Program {
    /// All alternatives of all rules, each with [`Op::End`] at its end.
    pub(super) ops: Vec<Op>,
    /// Where the alternatives of each rule begin in `ops`.
    pub(super) rules: Vec<Vec<u32>>,
    pub(super) root: u32,
}

impl Program {
    /// Rules refer to each other by their index.
    pub(super) fn new(rules: Vec<Vec<Vec<Op>>>, root: u32) -> Result<Self, String> {
        let empty = may_be_empty(&rules);
        if is_left_recursive(&rules, &empty) {
            return Err("a rule of the grammar begins with itself (left recursion)".to_owned());
        }
        let mut ops = Vec::new();
        let mut starts = Vec::with_capacity(rules.len());
        for rule in rules {
            let mut alternatives = Vec::with_capacity(rule.len());
            for alternative in rule {
                alternatives.push(u32::try_from(ops.len()).map_err(|error| error.to_string())?);
                ops.extend(alternative);
                ops.push(Op::End);
            }
            starts.push(alternatives);
        }
        Ok(Self { ops, rules: starts, root })
    }
}

fn may_be_empty(rules: &[Vec<Vec<Op>>]) -> Vec<bool> {
    // Who becomes empty when a rule does, so that each alternative is looked at again only then.
    let mut waits: Vec<Vec<usize>> = vec![Vec::new(); rules.len()];
    for (index, rule) in rules.iter().enumerate() {
        for op in rule.iter().flatten() {
            if let Op::Rule(other) = op {
                waits[*other as usize].push(index);
            }
        }
    }
    let mut empty = vec![false; rules.len()];
    let mut todo: Vec<usize> = (0..rules.len()).collect();
    while let Some(index) = todo.pop() {
        let is_empty = |op: &Op| matches!(op, Op::Rule(other) if empty[*other as usize]);
        if !empty[index] && rules[index].iter().any(|alternative| alternative.iter().all(is_empty)) {
            empty[index] = true;
            todo.append(&mut waits[index]);
        }
    }
    empty
}

/// Whether some rule can come to itself again without a byte in between.
fn is_left_recursive(rules: &[Vec<Vec<Op>>], empty: &[bool]) -> bool {
    let mut first: Vec<Vec<usize>> = Vec::with_capacity(rules.len());
    for rule in rules {
        let mut begins = Vec::new();
        for alternative in rule {
            for op in alternative {
                let Op::Rule(other) = op else { break };
                begins.push(*other as usize);
                if !empty[*other as usize] {
                    break;
                }
            }
        }
        begins.sort_unstable();
        begins.dedup();
        first.push(begins);
    }
    // A cycle is there when not every rule can be taken away after those that it begins with.
    let mut left: Vec<usize> = first.iter().map(Vec::len).collect();
    let mut begun_by: Vec<Vec<usize>> = vec![Vec::new(); rules.len()];
    for (index, begins) in first.iter().enumerate() {
        for &other in begins {
            begun_by[other].push(index);
        }
    }
    let mut free: Vec<usize> = (0..rules.len()).filter(|&index| left[index] == 0).collect();
    let mut gone = 0;
    while let Some(index) = free.pop() {
        gone += 1;
        for &other in &begun_by[index] {
            left[other] -= 1;
            if left[other] == 0 {
                free.push(other);
            }
        }
    }
    gone < rules.len()
}

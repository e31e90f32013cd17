//! What an output must be: compiling it, and following an output through it.
//!
//! JSON schemas are llguidance's work, GBNF is [`gbnf`](super::gbnf)'s. Both are fed by anybody, so both are bounded:
//! size and depth of the source here, the work of compiling and of each mask by their own limits. Compiling takes
//! milliseconds (the first of a model, which reads the whole vocabulary, up to a second), so it happens on the thread of
//! who asks, never on the engine's.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, SimpleVob, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::ffi::Model;
use super::gbnf::{self, MAX_SOURCE_BYTES};
use super::request::Token;
use super::sampling::Grammar;
use super::schema;
use super::trigger::Trigger;

/// Compiled grammars that are kept for requests that ask for the same again.
const KEPT: usize = 16;

/// Stack of the thread that compiles: schemas and parsers are trees, and what walks them calls itself.
const STACK: usize = 16 << 20;

/// Between the parts of JSON: nothing, a space, or a new line with its indentation.
const WHITESPACE: &str = r"[ ]|\n[ \t]{0,20}";

/// The grammars of one model.
#[derive(Default)]
pub(super) struct Grammars {
    schemas: OnceLock<Result<ParserFactory, String>>,
    plain: OnceLock<Arc<Vocabulary>>,
    ends: OnceLock<Arc<[Token]>>,
    /// The one asked for last at the end.
    kept: Mutex<Vec<(Grammar, Machine)>>,
}

/// What each token stands for.
struct Vocabulary {
    /// Control tokens with their names, tokens that end a generation with nothing.
    trie: TokTrie,
}

/// Follows one output.
pub(super) struct Constraint {
    machine: Machine,
    /// Tokens that end a generation.
    ends: Arc<[Token]>,
    /// Whether the model may end where the grammar may.
    may_end: bool,
    /// Tokens that turned out to be wrong while everything is allowed.
    rejected: Vec<Token>,
}

#[derive(Clone)]
enum Machine {
    Schema(Box<Matcher>),
    Gbnf {
        matcher: Box<gbnf::Matcher>,
        vocabulary: Arc<Vocabulary>,
        /// Until it comes, everything is allowed.
        trigger: Option<Trigger>,
    },
}

impl Grammars {
    /// Compiles, or finds what was compiled before. Takes a while: not for the engine's thread, nor for one that serves
    /// others. The error is for people. `may_end` is false where the model's own end is ignored.
    pub(super) fn compile(&self, model: &Model, grammar: &Grammar, may_end: bool) -> Result<Constraint, String> {
        let machine = if let Some(machine) = self.find(grammar) {
            machine
        } else {
            let machine = on_deep_stack(|| self.machine(model, grammar))?;
            self.keep(grammar, &machine);
            machine
        };
        Ok(Constraint { machine, ends: Arc::clone(self.ends(model)), may_end, rejected: Vec::new() })
    }

    fn ends(&self, model: &Model) -> &Arc<[Token]> {
        self.ends.get_or_init(|| model.end_tokens().into())
    }

    fn find(&self, grammar: &Grammar) -> Option<Machine> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let index = kept.iter().position(|(known, _)| known == grammar)?;
        let found = kept.remove(index);
        let machine = found.1.fresh();
        kept.push(found);
        Some(machine)
    }

    fn keep(&self, grammar: &Grammar, machine: &Machine) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.remove(0);
        }
        kept.push((grammar.clone(), machine.fresh()));
    }

    fn machine(&self, model: &Model, grammar: &Grammar) -> Result<Machine, String> {
        match grammar {
            Grammar::JsonSchema(schema) => {
                schema::check(schema)?;
                let factory = self.schemas.get_or_init(|| factory(model)).as_ref().map_err(Clone::clone)?;
                let grammar = TopLevelGrammar::from_grammar(GrammarWithLexer::from_json_schema(with_options(schema)));
                let mut matcher = Matcher::new(factory.create_parser(grammar));
                if let Some(error) = matcher.get_error() {
                    return Err(first_line(&error));
                }
                // The first mask shows what the grammar alone does not.
                if matcher.compute_mask().is_err() || matcher.is_stopped() {
                    let too_much = matcher.get_error().filter(|error| error.contains("limit"));
                    let reason = too_much.map(|error| first_line(&error));
                    return Err(reason.unwrap_or_else(|| "no JSON is allowed by this schema".to_owned()));
                }
                Ok(Machine::Schema(Box::new(matcher)))
            }
            Grammar::Gbnf { source, lazy, prefix } => {
                if source.len() > MAX_SOURCE_BYTES {
                    return Err(format!(
                        "the grammar has {} bytes; at most {MAX_SOURCE_BYTES} are allowed",
                        source.len()
                    ));
                }
                let find_token = |text: &str| match model.tokenize(text, false, true).as_deref() {
                    Ok(&[token]) => Some(token),
                    _ => None,
                };
                let mut matcher = gbnf::Matcher::new(source, &find_token)?;
                let trigger = lazy.as_ref().map(Trigger::new).transpose()?;
                if !prefix.is_empty() {
                    matcher.push_bytes(prefix.as_bytes()).map_err(|_| "the grammar does not allow its prefix")?;
                }
                let vocabulary = self.plain.get_or_init(|| Arc::new(Vocabulary::new(model, self.ends(model))));
                let vocabulary = Arc::clone(vocabulary);
                Ok(Machine::Gbnf { matcher: Box::new(matcher), vocabulary, trigger })
            }
        }
    }
}

impl Machine {
    /// For another output. llguidance's clones share what they learn, which then could only grow.
    fn fresh(&self) -> Self {
        match self {
            Self::Schema(matcher) => Self::Schema(Box::new(matcher.deep_clone())),
            other @ Self::Gbnf { .. } => other.clone(),
        }
    }
}

impl Constraint {
    /// Whether the token may come.
    pub(super) fn allows(&mut self, token: Token) -> Result<bool, String> {
        let is_end = self.ends.contains(&token);
        if is_end && !self.may_end {
            return Ok(false);
        }
        match &mut self.machine {
            Machine::Schema(matcher) if is_end => matcher.is_accepting().map_err(|error| reason(&error)),
            Machine::Schema(matcher) => {
                matcher.validate_tokens(&[id(token)?]).map(|valid| valid == 1).map_err(|error| reason(&error))
            }
            Machine::Gbnf { matcher, vocabulary, trigger } => {
                let bytes = vocabulary.bytes(token);
                let allowed = match trigger {
                    Some(_) if is_end => true,
                    Some(trigger) => match trigger.begins(token, bytes) {
                        None => true,
                        Some(said) => matcher.allows(token, &said)?,
                    },
                    None if is_end => matcher.is_accepting(),
                    None => matcher.allows(token, bytes)?,
                };
                if !allowed && trigger.is_some() {
                    self.rejected.push(token);
                }
                Ok(allowed)
            }
        }
    }

    /// The tokens that may come, after [`Self::allows`] has refused one; each bit is a token. While a lazy grammar waits
    /// these are all that were not refused yet, so the next one has to be asked about too.
    pub(super) fn mask(&mut self) -> Result<SimpleVob, String> {
        let mut mask = match &mut self.machine {
            Machine::Schema(matcher) => matcher.compute_mask().map_err(|error| reason(&error))?,
            Machine::Gbnf { matcher, vocabulary, trigger: None } => {
                let mut mask = matcher.mask(&vocabulary.trie)?;
                if matcher.is_accepting() {
                    self.ends.iter().filter_map(|end| id(*end).ok()).for_each(|end| mask.allow_token(end));
                }
                mask
            }
            Machine::Gbnf { vocabulary, trigger: Some(_), .. } => {
                let mut mask = vocabulary.trie.alloc_token_set();
                mask.set_all(true);
                self.rejected.iter().filter_map(|token| id(*token).ok()).for_each(|token| mask.disallow_token(token));
                mask
            }
        };
        if !self.may_end {
            self.ends.iter().filter_map(|end| id(*end).ok()).for_each(|end| mask.disallow_token(end));
        }
        Ok(mask)
    }

    /// Goes on with a token that is allowed.
    pub(super) fn accept(&mut self, token: Token) -> Result<(), String> {
        self.rejected.clear();
        if self.ends.contains(&token) {
            return Ok(());
        }
        match &mut self.machine {
            Machine::Schema(matcher) => matcher.consume_token(id(token)?).map_err(|error| reason(&error)),
            Machine::Gbnf { matcher, vocabulary, trigger } => {
                let bytes = vocabulary.bytes(token);
                let Some(waiting) = trigger else { return Ok(matcher.push_token(token, bytes)?) };
                if let Some(said) = waiting.begins(token, bytes) {
                    matcher.push_token(token, &said)?;
                    *trigger = None;
                } else {
                    waiting.push(bytes);
                }
                Ok(())
            }
        }
    }

    /// Nothing more may come.
    pub(super) fn is_complete(&self) -> bool {
        match &self.machine {
            Machine::Schema(matcher) => matcher.is_stopped() && matcher.stop_reason().is_ok(),
            Machine::Gbnf { matcher, trigger, .. } => trigger.is_none() && matcher.is_complete(),
        }
    }
}

impl Vocabulary {
    fn new(model: &Model, ends: &[Token]) -> Self {
        let size = model.n_vocab();
        let words: Vec<Vec<u8>> = (0..size)
            .map(|token| {
                let token = Token::try_from(token).unwrap_or(-1);
                let mut bytes = Vec::new();
                if !ends.contains(&token) && model.append_piece(token, true, &mut bytes).is_err() {
                    bytes.clear();
                }
                bytes
            })
            .collect();
        let end = ends.first().and_then(|end| id(*end).ok()).unwrap_or(0);
        Self { trie: TokTrie::from(&TokRxInfo::new(size, end), &words) }
    }

    fn bytes(&self, token: Token) -> &[u8] {
        match id(token) {
            Ok(token) if (token as usize) < self.trie.vocab_size() => self.trie.token(token),
            _ => &[],
        }
    }
}

fn factory(model: &Model) -> Result<ParserFactory, String> {
    let environment = model.tok_env();
    let slices = SlicedBiasComputer::json_slices();
    let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
        .map_err(|error| format!("the vocabulary cannot be used for schemas: {}", first_line(&error.to_string())))?;
    factory.quiet();
    let limits = factory.limits_mut();
    // A fifth of llguidance's own, which are for schemas of friends. Measured: 20 ms of compiling, 5 ms for a mask.
    limits.initial_lexer_fuel = 300_000;
    limits.step_lexer_fuel = 100_000;
    limits.step_max_items = 50_000;
    limits.max_lexer_states = 20_000;
    limits.max_grammar_size = 100_000;
    limits.verbose_errors = false;
    Ok(factory)
}

/// `oneOf` is read as `anyOf`, and there is a little whitespace at most, as with llama.cpp: a small model would go on with
/// it for ever. Options for llguidance do not come from clients.
fn with_options(schema: &Value) -> Value {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        other => other.clone(),
    };
    if let Some(fields) = schema.as_object_mut() {
        fields.insert("x-guidance".to_owned(), json!({"coerce_one_of": true, "whitespace_pattern": WHITESPACE}));
    }
    schema
}

fn id(token: Token) -> Result<u32, String> {
    u32::try_from(token).map_err(|_| format!("{token} is no token"))
}

/// llguidance's errors may have a trace of the stack behind the first line.
fn first_line(text: &str) -> String {
    const MOST: usize = 400;
    let lines: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.starts_with('<')).collect();
    lines.join(" ").chars().take(MOST).collect()
}

fn reason(error: &impl std::fmt::Display) -> String {
    first_line(&error.to_string())
}

/// Runs `work` on a thread of its own; a panic becomes an error.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK).spawn_scoped(scope, work);
        match thread {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err("it cannot be compiled".to_owned())),
            Err(error) => Err(format!("cannot start a thread: {error}")),
        }
    })
}

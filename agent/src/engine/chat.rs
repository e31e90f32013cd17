//! Chat templates, and the formats in which models call tools and think aloud: llama.cpp's, which knows some by their
//! template and finds the others by comparing renderings. Templates come from model files and conversations from
//! clients: what either may cost is bounded (`ffi/allowance.h`).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::ffi;
use super::ffi::Model;

/// Bytes of a template's source. The longest in use have some 30 KiB.
pub const MAX_TEMPLATE_BYTES: usize = 128 << 10;

/// Brackets that may be open at once in what a model writes; its reader recurses for each.
const MAX_NESTING: usize = 1000;

/// Bytes of all formats that are kept, with what they are kept under.
const KEPT_BYTES: usize = 8 << 20;

/// Lines that are tried to find the one at which a template cannot be read.
const TRIED_LINES: usize = 512;

/// Why a conversation could not be rendered, or an answer not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The source is not Jinja.
    #[error("the chat template cannot be read: {message} (line {line})")]
    Syntax {
        /// Line of the source, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// The template refused these messages by `raise_exception`.
    #[error("the chat template refuses these messages: {message} (line {line})")]
    Raised {
        /// Line of the source, from 1.
        line: usize,
        /// The template's own words.
        message: String,
    },
    /// Rendering failed.
    #[error("the chat template failed: {message} (line {line})")]
    Failed {
        /// Line of the source, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// Something else, such as a schema that cannot become a grammar.
    #[error("{0}")]
    Other(String),
}

impl ChatError {
    /// llama.cpp's words, taken apart.
    fn from_words(words: &str) -> Self {
        let place = words.find("While executing ").and_then(|at| {
            let rest = &words[at..];
            let number = &rest[rest.find(" at line ")? + " at line ".len()..];
            let digits = number.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(number.len());
            let (_, message) = rest.split_once("\nError: ")?;
            Some((number[..digits].parse().ok()?, message))
        });
        let Some((line, message)) = place else { return Self::Other(words.trim().to_owned()) };
        match message.strip_prefix("Jinja Exception: ") {
            Some(said) => Self::Raised { line, message: said.to_owned() },
            None => Self::Failed { line, message: message.to_owned() },
        }
    }
}

/// Whether and which tools may be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// None.
    None,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// Whether the last message, an assistant's, is gone on with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Continuation {
    /// It is complete.
    #[default]
    None,
    /// Its reasoning goes on when it has nothing else, its content otherwise.
    Auto,
    /// Its content goes on.
    Content,
    /// Its reasoning goes on.
    Reasoning,
}

/// A conversation in OpenAI's form, and what a template is told beside it.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
pub struct ChatInput<'r> {
    /// Messages; content is text.
    pub messages: &'r [Value],
    /// Tools of type `function`.
    pub tools: &'r [Value],
    /// Which may be called.
    pub tool_choice: &'r ToolChoice,
    /// More than one call in an answer.
    pub parallel_tool_calls: bool,
    /// What the answer's content must be.
    pub json_schema: Option<&'r Value>,
    /// The prompt ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// Whether the last message goes on.
    pub continuation: Continuation,
    /// The model may think, where its template knows how to say so.
    pub enable_thinking: bool,
    /// Reasoning is told apart from content.
    pub parse_reasoning: bool,
    /// `chat_template_kwargs`.
    pub variables: &'r Map<String, Value>,
}

/// A block of reasoning, as a template marks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinkingTags {
    /// Begins it.
    pub start: String,
    /// Any of them ends it; the first is the usual one.
    pub ends: Vec<String>,
}

/// What begins a lazy grammar.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", content = "value", rename_all = "snake_case")]
pub enum Trigger {
    /// A text.
    Word(String),
    /// A regular expression somewhere in the output.
    Pattern(String),
    /// A regular expression for all of the output.
    PatternFull(String),
}

/// How the answer to a conversation is to be generated and read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatFormat {
    /// The end of the prompt, with which grammar and reader begin.
    pub generation_prompt: String,
    /// GBNF of the answer; empty for none.
    pub grammar: String,
    /// The grammar begins with one of the triggers.
    pub grammar_lazy: bool,
    /// What begins it.
    pub triggers: Vec<Trigger>,
    /// Tokens whose text belongs to the answer, though they are control tokens.
    pub preserved_tokens: Vec<String>,
    /// Texts that end the answer.
    pub additional_stops: Vec<String>,
    /// Where the template knows reasoning.
    pub thinking: Option<ThinkingTags>,
    /// An answer is content as it stands: there is nothing to look for.
    pub plain: bool,
    format: i32,
    parser: String,
}

impl ChatFormat {
    /// A reader for one answer.
    pub fn reader(&self) -> Result<ChatReader, ChatError> {
        let reader = ffi::ChatReader::new(self.format, &self.parser, &self.generation_prompt);
        Ok(ChatReader { reader: reader.map_err(ChatError::Other)? })
    }

    /// Tried with what looks most like marks.
    fn is_plain(&self) -> bool {
        const PROBE: &str = "One.\n\n{\"two\": [3]} <four>";
        self.thinking.is_none()
            && self.preserved_tokens.is_empty()
            && self.reader().and_then(|mut reader| reader.read(PROBE, false)).is_ok_and(|read| read.content == PROBE)
    }

    fn bytes(&self) -> usize {
        self.parser.len() + self.grammar.len() + self.generation_prompt.len() + 1024
    }
}

/// A rendered conversation.
#[derive(Clone, Debug)]
pub struct Rendered {
    /// The prompt.
    pub prompt: String,
    /// How the answer is to be read.
    pub format: Arc<ChatFormat>,
}

/// What an answer says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ChatMessage {
    /// Text for the user.
    pub content: String,
    /// The model's reasoning.
    pub reasoning: String,
    /// Calls of tools.
    pub calls: Vec<ChatCall>,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ChatCall {
    /// Empty where the format has none.
    pub id: String,
    /// Name of the function.
    pub name: String,
    /// JSON, or its beginning.
    pub arguments: String,
}

/// Reads one answer.
pub struct ChatReader {
    reader: ffi::ChatReader,
}

impl ChatReader {
    /// What `output` says; `partial`: more of it may come. Takes as long as the output is.
    pub fn read(&mut self, output: &str, partial: bool) -> Result<ChatMessage, ChatError> {
        if nesting(output) > MAX_NESTING {
            return Err(ChatError::Other(format!("the output has more than {MAX_NESTING} open brackets")));
        }
        let json = self.reader.read(output, partial).map_err(ChatError::Other)?;
        serde_json::from_str(&json).map_err(|error| ChatError::Other(error.to_string()))
    }
}

/// Brackets that are open at once, at most. Those in strings count too, which is on the safe side.
fn nesting(text: &str) -> usize {
    let mut open = 0_usize;
    let mut most = 0;
    for byte in text.bytes() {
        match byte {
            b'[' | b'{' => {
                open += 1;
                most = most.max(open);
            }
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
    }
    most
}

/// What a template can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "llama.cpp's own list")]
pub struct ChatCapabilities {
    /// It tells the model of tools.
    #[serde(default)]
    pub supports_tools: bool,
    /// It renders calls of tools.
    #[serde(default)]
    pub supports_tool_calls: bool,
    /// It renders several calls in one message.
    #[serde(default)]
    pub supports_parallel_tool_calls: bool,
    /// It has a place for the system's message.
    #[serde(default)]
    pub supports_system_role: bool,
    /// It keeps the reasoning of earlier answers when asked to.
    #[serde(default)]
    pub supports_preserve_reasoning: bool,
    /// It knows `reasoning_effort`.
    #[serde(default)]
    pub supports_reasoning_effort: bool,
    /// A format depends on nothing but the settings and the generation prompt.
    #[serde(default, skip_serializing)]
    analysed: bool,
}

/// The chat templates of a model.
pub struct ChatTemplates {
    templates: ffi::ChatTemplates,
    capabilities: ChatCapabilities,
    kept: Mutex<Kept>,
}

impl ChatTemplates {
    /// Compiles `source`; `bos` and `eos` are the texts of the model's tokens.
    pub fn compile(source: &str, bos: &str, eos: &str) -> Result<Self, ChatError> {
        Self::new(None, source, true, bos, eos)
    }

    /// Compiles the templates of a model: `source`, which replaces those of the file where it is not one of them.
    pub(super) fn of_model(
        model: &Model,
        source: &str,
        replaced: bool,
        bos: &str,
        eos: &str,
    ) -> Result<Self, ChatError> {
        Self::new(Some(model), source, replaced, bos, eos)
    }

    fn new(model: Option<&Model>, source: &str, given: bool, bos: &str, eos: &str) -> Result<Self, ChatError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            let message = format!("the chat template has {} bytes, more than {MAX_TEMPLATE_BYTES}", source.len());
            return Err(ChatError::Other(message));
        }
        let compile = |source: &str| ffi::ChatTemplates::new(None, Some(source), bos, eos);
        let templates = ffi::ChatTemplates::new(model, given.then_some(source), bos, eos).map_err(|words| {
            let first = |words: &str| words.trim().lines().next().unwrap_or_default().to_owned();
            let message = first(&words);
            let is_same = |beginning: &str| compile(beginning).err().is_some_and(|words| first(&words) == message);
            let line = line_of_failure(source, is_same);
            let message = message.strip_prefix("Parser Error: ").unwrap_or(&message).to_owned();
            ChatError::Syntax { line, message }
        })?;
        let capabilities = templates.capabilities().map_err(ChatError::Other)?;
        let capabilities = serde_json::from_str(&capabilities).map_err(|error| ChatError::Other(error.to_string()))?;
        Ok(Self { templates, capabilities, kept: Mutex::default() })
    }

    /// What they can do.
    #[must_use]
    pub fn capabilities(&self) -> ChatCapabilities {
        self.capabilities
    }

    /// Renders a conversation. Takes as long as it is, some milliseconds for tools that were not seen before.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<Rendered, ChatError> {
        if !self.capabilities.analysed || input.continuation != Continuation::None {
            let Applied { prompt, mut format } = self.apply(input, false)?;
            format.plain = format.is_plain();
            return Ok(Rendered { prompt, format: Arc::new(format) });
        }
        let Applied { prompt, format } = self.apply(input, true)?;
        let settings = Request { messages: &[], ..Request::new(input, false) };
        let settings = serde_json::to_string(&settings).map_err(|error| ChatError::Other(error.to_string()))?;
        let key = format!("{}\n{settings}", format.generation_prompt);
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(format) = kept().get(&key) {
            return Ok(Rendered { prompt, format });
        }
        let Applied { mut format, .. } = self.apply(input, false)?;
        format.plain = format.is_plain();
        let format = Arc::new(format);
        kept().put(key, Arc::clone(&format));
        Ok(Rendered { prompt, format })
    }

    fn apply(&self, input: &ChatInput<'_>, prompt_only: bool) -> Result<Applied, ChatError> {
        let request = Request::new(input, prompt_only);
        let request = serde_json::to_string(&request).map_err(|error| ChatError::Other(error.to_string()))?;
        let applied = self.templates.apply(&request).map_err(|words| ChatError::from_words(&words))?;
        let applied: Answer = serde_json::from_str(&applied).map_err(|error| ChatError::Other(error.to_string()))?;
        Ok(applied.into())
    }
}

impl std::fmt::Debug for ChatTemplates {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ChatTemplates").field("capabilities", &self.capabilities).finish_non_exhaustive()
    }
}

/// The first of the last lines with which the source fails as it does as a whole.
fn line_of_failure(source: &str, is_same: impl Fn(&str) -> bool) -> usize {
    let ends: Vec<usize> = source.match_indices('\n').map(|(at, _)| at + 1).chain([source.len()]).collect();
    let mut line = ends.len();
    while line > 1 && ends.len() - line < TRIED_LINES && is_same(&source[..ends[line - 2]]) {
        line -= 1;
    }
    line
}

/// What the shim reads.
#[derive(Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
struct Request<'r> {
    messages: &'r [Value],
    tools: &'r [Value],
    tool_choice: &'static str,
    named_tool: Option<&'r str>,
    parallel_tool_calls: bool,
    json_schema: Option<&'r Value>,
    add_generation_prompt: bool,
    continue_final_message: Value,
    enable_thinking: bool,
    parse_reasoning: bool,
    variables: &'r Map<String, Value>,
    prompt_only: bool,
}

impl<'r> Request<'r> {
    fn new(input: &ChatInput<'r>, prompt_only: bool) -> Self {
        let ChatInput {
            messages,
            tools,
            tool_choice,
            parallel_tool_calls,
            json_schema,
            add_generation_prompt,
            continuation,
            enable_thinking,
            parse_reasoning,
            variables,
        } = *input;
        let (tool_choice, named_tool) = match tool_choice {
            ToolChoice::Auto => ("auto", None),
            ToolChoice::None => ("none", None),
            ToolChoice::Required => ("required", None),
            ToolChoice::Named(name) => ("required", Some(name.as_str())),
        };
        let continue_final_message = match continuation {
            Continuation::None => false.into(),
            Continuation::Auto => true.into(),
            Continuation::Content => "content".into(),
            Continuation::Reasoning => "reasoning_content".into(),
        };
        Self {
            messages,
            tools,
            tool_choice,
            named_tool,
            parallel_tool_calls,
            json_schema,
            add_generation_prompt,
            continue_final_message,
            enable_thinking,
            parse_reasoning,
            variables,
            prompt_only,
        }
    }
}

/// What the shim answers.
#[derive(Deserialize)]
struct Answer {
    prompt: String,
    generation_prompt: String,
    format: i32,
    parser: String,
    grammar: String,
    grammar_lazy: bool,
    triggers: Vec<Trigger>,
    preserved_tokens: Vec<String>,
    additional_stops: Vec<String>,
    supports_thinking: bool,
    thinking_start: String,
    thinking_ends: Vec<String>,
}

struct Applied {
    prompt: String,
    format: ChatFormat,
}

impl From<Answer> for Applied {
    fn from(answer: Answer) -> Self {
        let Answer { prompt, generation_prompt, format, parser, grammar, grammar_lazy, .. } = answer;
        let Answer { triggers, preserved_tokens, additional_stops, .. } = answer;
        let knows_thinking =
            answer.supports_thinking && !answer.thinking_start.is_empty() && !answer.thinking_ends.is_empty();
        let thinking =
            knows_thinking.then_some(ThinkingTags { start: answer.thinking_start, ends: answer.thinking_ends });
        let format = ChatFormat {
            generation_prompt,
            grammar,
            grammar_lazy,
            triggers,
            preserved_tokens,
            additional_stops,
            thinking,
            plain: false,
            format,
            parser,
        };
        Self { prompt, format }
    }
}

/// Formats by what they follow from; the oldest goes when there are too many.
#[derive(Default)]
struct Kept {
    formats: HashMap<Arc<str>, Arc<ChatFormat>>,
    order: VecDeque<Arc<str>>,
    bytes: usize,
}

impl Kept {
    fn get(&self, key: &str) -> Option<Arc<ChatFormat>> {
        self.formats.get(key).cloned()
    }

    fn put(&mut self, key: String, format: Arc<ChatFormat>) {
        let bytes = key.len() + format.bytes();
        if bytes > KEPT_BYTES || self.formats.contains_key(key.as_str()) {
            return;
        }
        while self.bytes + bytes > KEPT_BYTES {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some(gone) = self.formats.remove(&oldest) {
                self.bytes -= oldest.len() + gone.bytes();
            }
        }
        self.bytes += bytes;
        let key: Arc<str> = key.into();
        self.order.push_back(Arc::clone(&key));
        self.formats.insert(key, format);
    }
}

#[cfg(test)]
mod tests;

//! Chat templates: the model's own Jinja source, rendered as Hugging Face's `apply_chat_template` renders it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;

/// Name of the template in messages.
const NAME: &str = "chat_template";

/// Instructions that one rendering may run: hundreds for each message, and an end to a template that loops.
const FUEL: u64 = 5_000_000;

/// A template that could not be compiled or rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
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
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles `source`; `bos` and `eos` are the texts of the model's tokens.
    pub fn compile(source: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| syntax_error(&error))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", python_json);
        environment.add_template_owned(NAME, source.to_owned()).map_err(|error| syntax_error(&error))?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The prompt for `messages`. `variables` are the request's `chat_template_kwargs`: what the template itself is
    /// given cannot be replaced by them.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, TemplateError> {
        // Hugging Face passes `none` for what is not there, and templates ask `is not none`.
        let given = context! {
            messages => Serde(messages),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let all = context! { ..given, ..Value::from(Serde(variables)) };
        let template = self.environment.get_template(NAME).map_err(|error| failure(&error))?;
        template.render(all).map_err(|error| failure(&error))
    }
}

/// Marks an error of `raise_exception` among minijinja's own.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

/// The time in UTC, so that nodes agree.
#[expect(clippy::needless_pass_by_value, reason = "minijinja's functions take owned arguments")]
fn strftime_now(format: String) -> Result<String, Error> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(&format, &now)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

/// `json.dumps(value, ensure_ascii=False)`: models were trained on Python's spaces.
#[expect(clippy::needless_pass_by_value, reason = "minijinja's filters take owned arguments")]
fn python_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted because templates pass them; the output is the same without.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let done = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonSpaces)),
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, pretty))
        }
    };
    done.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// `", "` and `": "`.
struct PythonSpaces;

impl serde_json::ser::Formatter for PythonSpaces {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn line_of(error: &Error) -> usize {
    error.line().unwrap_or(1)
}

fn words_of(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

fn syntax_error(error: &Error) -> TemplateError {
    TemplateError::Syntax { line: line_of(error), message: words_of(error) }
}

fn failure(error: &Error) -> TemplateError {
    let line = line_of(error);
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(each) = cause {
        if let Some(Raised(message)) = each.downcast_ref() {
            return TemplateError::Raised { line, message: message.clone() };
        }
        cause = each.source();
    }
    TemplateError::Failed { line, message: words_of(error) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    const CHATML: &str = "{%- for message in messages %}\n\
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n\
        {%- endfor %}\n\
        {%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n";

    /// The shape of Meta's template for Llama 3.
    const LLAMA3: &str = "{{- bos_token }}\n\
        {%- if not tools is defined or tools is none %}{% set note = '' %}{% endif %}\n\
        {%- if strftime_now is defined %}\n    {%- set year = strftime_now(\"%Y\") %}\n{%- endif %}\n\
        {%- if messages[0]['role'] == 'system' %}\n\
        {%- set system_message = messages[0]['content']|trim %}\n\
        {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n\
        {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_message + '<|eot_id|>' }}\n\
        {%- for message in messages %}\n\
        {%- if loop.index0 % 2 == 0 and message.role != 'user' %}\n\
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\n{%- endif %}\n\
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' }}\n\
        {%- endfor %}\n\
        {%- if add_generation_prompt %}\n\
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n";

    fn render(
        source: &str,
        messages: impl Into<serde_json::Value>,
        variables: impl Into<serde_json::Value>,
    ) -> Result<String, TemplateError> {
        let messages: Vec<_> = messages.into().as_array().unwrap().clone();
        let variables: Map<_, _> = variables.into().as_object().unwrap().clone();
        ChatTemplate::compile(source, "<s>", "</s>")?.render(&messages, true, &variables)
    }

    #[test]
    fn chatml() {
        let messages =
            json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>Hi</b> & \"you\""}]);
        assert_eq!(
            render(CHATML, messages, json!({})).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<b>Hi</b> & \"you\"<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn llama_3() {
        let messages = json!([{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\n"}]);
        assert_eq!(
            render(LLAMA3, messages, json!({})).unwrap(),
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
    }

    #[test]
    fn a_refusal_is_the_templates_own_words_and_line() {
        let error = render(LLAMA3, json!([{"role": "assistant", "content": "me first"}]), json!({})).unwrap_err();
        let TemplateError::Raised { line, message } = &error else { panic!("{error:?}") };
        assert_eq!(message, "Conversation roles must alternate user/assistant/user/assistant/...");
        assert_eq!(*line, 15, "{error}");
    }

    #[test]
    fn errors_name_the_line() {
        let cases = [
            ("one\n{% if %}", "the chat template cannot be read: ", "(line 2)"),
            ("one\n\n{{ messages | nothing }}", "the chat template failed: unknown filter", "(line 3)"),
            ("one\n{{ messages.nothing.more }}", "the chat template failed: undefined value", "(line 2)"),
            (
                "{% for i in range(100000) %}{% for j in range(100000) %}\n{% endfor %}{% endfor %}",
                "the chat template failed: engine ran out of fuel",
                "line",
            ),
            ("{{ strftime_now('%Q%!') }}", "the chat template failed: ", "strftime_now"),
        ];
        for (source, begins, has) in cases {
            let message = render(source, json!([]), json!({})).unwrap_err().to_string();
            assert!(message.starts_with(begins) && message.contains(has), "{source}: {message}");
        }
    }

    #[test]
    fn variables_reach_the_template_but_replace_nothing() {
        let source = "{{ enable_thinking }} {{ bos_token }} {{ messages|length }}";
        let variables = json!({"enable_thinking": false, "bos_token": "x", "messages": []});
        assert_eq!(render(source, json!([{"role": "user", "content": "a"}]), variables).unwrap(), "False <s> 1");
    }

    #[test]
    fn json_has_pythons_spaces_and_blocks_are_trimmed() {
        assert_eq!(
            render("{{ {'a': [1, 'ü<'], 'b': none}|tojson }}", json!([]), json!({})).unwrap(),
            r#"{"a": [1, "ü<"], "b": null}"#
        );
        assert_eq!(render("a\n  {% if true %}\nb\n  {% endif %}\nc\n", json!([]), json!({})).unwrap(), "a\nb\nc");
        let loops = "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}";
        assert_eq!(render(loops, json!([{"content": "1"}, {"content": "2"}]), json!({})).unwrap(), "1");
    }
}

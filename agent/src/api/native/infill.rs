//! `POST /infill`: the tokens that a model trained for it needs to fill a gap in a text.

use axum::response::Response;
use serde_json::Value;

use super::completion::{self, Options};
use super::tokens::text_tokens;
use crate::api::error::ApiError;
use crate::api::fields::{Fields, wrong_type};
use crate::api::intake::Intake;
use crate::api::state::ApiState;
use crate::engine::{FimTokens, Token};

/// Other files that a request may show.
const MAX_EXTRAS: usize = 256;

/// Stands between pieces of other files where the model has no token for it; llama-server's words.
const SNIPPET: &str = "\n\n--- snippet ---\n\n";

/// Name of the repository, as llama-server calls it.
const REPOSITORY: &str = "myproject\n";

/// Name of the file with the gap, as llama-server calls it.
const FILE: &str = "filename\n";

/// A text with a gap.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::api) struct Gap {
    /// What stands before it.
    pub(in crate::api) prefix: String,
    /// What stands after it.
    pub(in crate::api) suffix: String,
    /// What it begins with.
    pub(in crate::api) begin: String,
    /// Other files: name and text.
    pub(in crate::api) extras: Vec<(String, String)>,
}

/// The handler: `/completion` with a prompt of its own.
pub(in crate::api) async fn infill(intake: Intake) -> Result<Response, ApiError> {
    let Intake { state, visit, mut fields } = intake;
    let gap = Gap::read(&mut fields)?;
    let options = Options::read(fields, state.defaults())?;
    let prompt = state.prepare(move |state| gap.tokens(state, "input_prefix")).await?;
    completion::answer(&state, visit, options, vec![prompt], Vec::new(), None).await
}

impl Gap {
    fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let mut text = |name: &'static str| match fields.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(name, "a string", &other)),
        };
        let (prefix, suffix, begin) = (text("input_prefix")?, text("input_suffix")?, text("prompt")?);
        if prefix.is_none() {
            return Err(ApiError::missing("input_prefix"));
        }
        if suffix.is_none() {
            return Err(ApiError::missing("input_suffix"));
        }
        let extras = match fields.take("input_extra") {
            None => Vec::new(),
            Some(Value::Array(extras)) if extras.len() <= MAX_EXTRAS => {
                extras.iter().map(read_extra).collect::<Result<_, _>>()?
            }
            Some(Value::Array(extras)) => {
                let message = format!("'input_extra' may have {MAX_EXTRAS} entries, not {}", extras.len());
                return Err(ApiError::invalid("input_extra", message));
            }
            Some(other) => return Err(wrong_type("input_extra", "an array of objects", &other)),
        };
        let or_empty = Option::unwrap_or_default;
        Ok(Self { prefix: or_empty(prefix), suffix: or_empty(suffix), begin: or_empty(begin), extras })
    }

    /// The prompt, or 400 for a model that was not trained for it. What stands around the gap is text and nothing else:
    /// control tokens in it are not read as such.
    pub(in crate::api) fn tokens(&self, state: &ApiState, param: &'static str) -> Result<Vec<Token>, ApiError> {
        let facts = state.engine().model();
        let Some(fim) = facts.fim else {
            let message = "this model was not trained for infilling: its vocabulary has no tokens for it";
            return Err(ApiError::unsupported(param, message));
        };
        let bos = facts.bos.filter(|_| facts.adds_bos);
        self.compose(fim, bos, |text, parse_special| text_tokens(state, text, false, parse_special))
    }

    /// `<BOS><REPO>name <SEP>file text … <SEP>file <PRE>prefix<SUF>suffix<MID>begin`
    fn compose(
        &self,
        fim: FimTokens,
        bos: Option<Token>,
        tokenize: impl Fn(&str, bool) -> Result<Vec<Token>, ApiError>,
    ) -> Result<Vec<Token>, ApiError> {
        let text = |text: &str| tokenize(text, false);
        let mut prompt: Vec<Token> = bos.into_iter().collect();
        if !self.extras.is_empty() {
            if let Some(repository) = fim.repository {
                prompt.push(repository);
                prompt.extend(text(REPOSITORY)?);
            }
            for (name, extra) in &self.extras {
                if let Some(separator) = fim.separator {
                    prompt.push(separator);
                    prompt.extend(text(&format!("{name}\n"))?);
                } else {
                    prompt.extend(text(SNIPPET)?);
                }
                prompt.extend(text(extra)?);
            }
            if let Some(separator) = fim.separator {
                prompt.push(separator);
                prompt.extend(text(FILE)?);
            }
        }
        prompt.push(fim.prefix);
        prompt.extend(text(&self.prefix)?);
        prompt.push(fim.suffix);
        prompt.extend(text(&self.suffix)?);
        prompt.push(fim.middle);
        prompt.extend(tokenize(&self.begin, true)?);
        Ok(prompt)
    }
}

fn read_extra(extra: &Value) -> Result<(String, String), ApiError> {
    let text = |name: &str| extra.get(name).and_then(Value::as_str).map(str::to_owned);
    let wrong = || {
        let message = "each of 'input_extra' must be an object with the string 'text', and 'filename' if it has one";
        ApiError::invalid("input_extra", message)
    };
    if extra.get("filename").is_some_and(|name| !name.is_string()) {
        return Err(wrong());
    }
    Ok((text("filename").unwrap_or_else(|| "tmp".to_owned()), text("text").ok_or_else(wrong)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::body::parse_object;

    fn read(json: &str) -> Result<Gap, ApiError> {
        Gap::read(&mut Fields(parse_object(json.as_bytes()).unwrap()))
    }

    /// Letters are their own tokens; control tokens are 1000 and more.
    fn compose(gap: &Gap, repository: bool) -> String {
        let fim = FimTokens {
            prefix: 1001,
            suffix: 1002,
            middle: 1003,
            repository: repository.then_some(1004),
            separator: repository.then_some(1005),
        };
        let letters = |text: &str, _: bool| Ok(text.chars().map(|letter| letter as Token).collect());
        let show = |token: Token| match token {
            1000 => "<BOS>".to_owned(),
            1001 => "<PRE>".to_owned(),
            1002 => "<SUF>".to_owned(),
            1003 => "<MID>".to_owned(),
            1004 => "<REP>".to_owned(),
            1005 => "<SEP>".to_owned(),
            letter => char::from_u32(letter.unsigned_abs()).unwrap().to_string(),
        };
        gap.compose(fim, Some(1000), letters).unwrap().into_iter().map(show).collect()
    }

    #[test]
    fn the_pattern_is_llama_servers() {
        let gap = read(r#"{"input_prefix": "a", "input_suffix": "b", "prompt": "c"}"#).unwrap();
        assert_eq!(compose(&gap, true), "<BOS><PRE>a<SUF>b<MID>c");
        let gap = Gap { extras: vec![("x.rs".into(), "one".into()), ("y.rs".into(), "two".into())], ..gap };
        assert_eq!(
            compose(&gap, true),
            "<BOS><REP>myproject\n<SEP>x.rs\none<SEP>y.rs\ntwo<SEP>filename\n<PRE>a<SUF>b<MID>c"
        );
        assert_eq!(compose(&gap, false), "<BOS>\n\n--- snippet ---\n\none\n\n--- snippet ---\n\ntwo<PRE>a<SUF>b<MID>c");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let many = format!(r#"{{"input_prefix": "", "input_suffix": "", "input_extra": {:?}}}"#, vec![0; 257]);
        for (json, param) in [
            ("{}", "input_prefix"),
            (r#"{"input_prefix": "a"}"#, "input_suffix"),
            (r#"{"input_prefix": 1, "input_suffix": ""}"#, "input_prefix"),
            (r#"{"input_prefix": "", "input_suffix": "", "prompt": []}"#, "prompt"),
            (r#"{"input_prefix": "", "input_suffix": "", "input_extra": {}}"#, "input_extra"),
            (r#"{"input_prefix": "", "input_suffix": "", "input_extra": [{"filename": "x"}]}"#, "input_extra"),
            (
                r#"{"input_prefix": "", "input_suffix": "", "input_extra": [{"filename": 1, "text": ""}]}"#,
                "input_extra",
            ),
            (many.as_str(), "input_extra"),
        ] {
            let error = read(json).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{json}");
        }
        let gap = read(r#"{"input_prefix": "a", "input_suffix": "", "input_extra": [{"text": "t"}]}"#).unwrap();
        assert_eq!(gap.extras, [("tmp".to_owned(), "t".to_owned())]);
    }
}

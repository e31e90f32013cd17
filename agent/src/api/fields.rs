//! The fields of a request's JSON object, read by name with errors that name the field and its limits.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::{ApiError, clip};

/// A JSON object; `null` is the same as absent, as with OpenAI.
#[derive(Debug, PartialEq)]
pub(crate) struct Fields(pub(crate) Map<String, Value>);

impl Fields {
    /// The value, unless absent or null.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// Takes the value out, unless absent or null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn boolean(&self, name: &'static str) -> Result<Option<bool>, ApiError> {
        self.get(name).map(|value| value.as_bool().ok_or_else(|| wrong_type(name, "true or false", value))).transpose()
    }

    pub(crate) fn integer(&self, name: &'static str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        // 16.0 is an integer in JSON's eyes, and some clients send it.
        #[expect(clippy::cast_possible_truncation, reason = "only exact integers below 2^53 pass")]
        let number = value.as_i64().or_else(|| {
            value.as_f64().filter(|float| float.fract() == 0.0 && float.abs() < 9.0e15).map(|float| float as i64)
        });
        match number {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            None if !value.is_number() => Err(wrong_type(name, "an integer", value)),
            _ => Err(out_of_range(name, "an integer ", range.start(), range.end(), value)),
        }
    }

    pub(crate) fn number(&self, name: &'static str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            #[expect(clippy::cast_possible_truncation, reason = "llama.cpp samples with f32")]
            Some(number) if range.contains(&number) => Ok(Some(number as f32)),
            Some(_) => Err(out_of_range(name, "", range.start(), range.end(), value)),
            None => Err(wrong_type(name, "a number", value)),
        }
    }
}

pub(crate) fn wrong_type(name: &str, expected: &str, got: &Value) -> ApiError {
    let got = match got {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    ApiError::invalid(name, format!("'{name}' must be {expected}, not {got}"))
}

/// Takes the string `field` out of the object that is called `name`.
pub(crate) fn string(name: &str, field: &str, fields: &mut Map<String, Value>) -> Result<String, ApiError> {
    let name = format!("{name}.{field}");
    match fields.remove(field) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong_type(&name, "a string", &other)),
        None => {
            let message = format!("'{name}' is missing");
            Err(ApiError::invalid(name, message))
        }
    }
}

/// 400: an object's `type` is one that is not known here.
pub(crate) fn unsupported_type(name: &str, kind: &str) -> ApiError {
    let message = format!("'{name}' is of type '{}', which is not supported by this server", clip(kind));
    ApiError::unsupported(name, message)
}

fn out_of_range(name: &str, what: &str, low: impl Display, high: impl Display, got: &Value) -> ApiError {
    ApiError::invalid(name, format!("'{name}' must be {what}from {low} to {high}, not {got}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields(super::super::body::parse_object(json.as_bytes()).unwrap())
    }

    #[test]
    fn integers() {
        let read = |json: &str| fields(json).integer("n", 1..=8).map_err(|error| error.message);
        assert_eq!(read("{}"), Ok(None));
        assert_eq!(read(r#"{"n": null}"#), Ok(None));
        assert_eq!(read(r#"{"n": 8}"#), Ok(Some(8)));
        assert_eq!(read(r#"{"n": 2.0}"#), Ok(Some(2)));
        for bad in ["0", "9", "-1", "1.5", "1e300", "99999999999999999999"] {
            let message = read(&format!(r#"{{"n": {bad}}}"#)).unwrap_err();
            assert!(message.starts_with("'n' must be an integer from 1 to 8, not "), "{bad}: {message}");
        }
        assert_eq!(read(r#"{"n": "2"}"#).unwrap_err(), "'n' must be an integer, not a string");
    }

    #[test]
    fn numbers() {
        let read = |json: &str| fields(json).number("p", 0.0..=1.0).map_err(|error| error.message);
        assert_eq!(read(r#"{"p": 0.5}"#), Ok(Some(0.5)));
        assert_eq!(read(r#"{"p": 1}"#), Ok(Some(1.0)));
        assert_eq!(read(r#"{"p": 1.01}"#).unwrap_err(), "'p' must be from 0 to 1, not 1.01");
        assert_eq!(read(r#"{"p": [1]}"#).unwrap_err(), "'p' must be a number, not an array");
    }
}

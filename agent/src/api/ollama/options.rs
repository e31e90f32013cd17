//! Ollama's `options`, and what becomes of each.
//!
//! | option | |
//! |---|---|
//! | `num_predict` | tokens to generate; 0 and less: until the model ends |
//! | `num_ctx` | tokens of context to aim for; a larger or smaller one than before never causes a reload, one above what a request may use counts as that |
//! | `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `repeat_last_n`, `repeat_penalty`, `presence_penalty`, `frequency_penalty`, `mirostat`, `mirostat_tau`, `mirostat_eta`, `seed`, `stop` | as [`params`](crate::api::params) has them |
//! | `num_batch`, `num_gpu`, `num_thread`, `use_mmap`, … | ignored: how a model is loaded is the ModelDeployment's to say |
//! | `num_keep`, `penalize_newline`, `tfs_z` | ignored: there is no such thing any more |
//! | others | ignored, as Ollama does |

use serde_json::{Map, Value};

use crate::api::error::ApiError;
use crate::api::fields::{Fields, wrong_type};

/// Options that have the same name everywhere.
const SAME: [&str; 14] = [
    "num_ctx",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_last_n",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "stop",
];

/// Takes `options` out and puts what it says into `into`, under OpenAI's names.
pub(super) fn take(fields: &mut Fields, into: &mut Map<String, Value>) -> Result<(), ApiError> {
    let options = match fields.take("options") {
        None => return Ok(()),
        Some(Value::Object(options)) => Fields(options),
        Some(other) => return Err(wrong_type("options", "an object", &other)),
    };
    for name in SAME {
        if let Some(value) = options.get(name) {
            into.insert(name.to_owned(), value.clone());
        }
    }
    // Clients send the defaults of their forms, and an empty list of stop texts is one.
    if into.get("stop").and_then(Value::as_array).is_some_and(Vec::is_empty) {
        into.remove("stop");
    }
    if let Some(tokens) = options.integer("num_predict", i64::from(i32::MIN)..=i64::from(i32::MAX))? {
        into.insert("max_tokens".to_owned(), if tokens > 0 { tokens } else { -1 }.into());
    }
    if let Some(seed) = options.integer("seed", i64::MIN..=i64::MAX)? {
        into.insert("seed".to_owned(), seed.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(options: Value) -> Result<Value, ApiError> {
        let mut fields = Fields(Map::from_iter([("options".to_owned(), options)]));
        let mut into = Map::new();
        take(&mut fields, &mut into).map(|()| into.into())
    }

    #[test]
    fn options_get_openais_names() {
        let given = json!({
            "num_predict": 5, "num_ctx": 4096, "temperature": 0.5, "seed": 42, "stop": ["a"], "mirostat": 0,
            "num_gpu": 99, "num_thread": 3, "use_mmap": true, "num_keep": 4, "n": 7, "something": {},
        });
        let expected = json!({
            "max_tokens": 5, "num_ctx": 4096, "temperature": 0.5, "seed": 42, "stop": ["a"], "mirostat": 0,
        });
        assert_eq!(read(given).unwrap(), expected);
        for unlimited in [-2, -1, 0] {
            assert_eq!(read(json!({"num_predict": unlimited})).unwrap(), json!({"max_tokens": -1}));
        }
        assert_eq!(read(json!({"stop": []})).unwrap(), json!({}));
        assert_eq!(read(Value::Null).unwrap(), json!({}));
        for (bad, param) in [(json!([]), "options"), (json!({"num_predict": "x"}), "num_predict")] {
            assert_eq!(read(bad).unwrap_err().param.as_deref(), Some(param));
        }
    }
}

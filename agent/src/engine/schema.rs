//! Pure: what is refused of a JSON schema before it is compiled. llguidance bounds most of the work itself; here is what
//! it does not bound.

use serde_json::Value;

/// Values in a schema: objects, arrays, strings, numbers.
const MAX_VALUES: usize = 20_000;

/// Bytes of all names and strings.
const MAX_BYTES: usize = 256 << 10;

/// Values within each other.
const MAX_DEPTH: usize = 64;

/// The product of all `multipleOf`: an automaton has a state for each remainder.
const MAX_MULTIPLE: f64 = 10_000.0;

/// Refuses what is too large.
pub(super) fn check(schema: &Value) -> Result<(), String> {
    if !schema.is_object() && !schema.is_boolean() {
        return Err("a schema must be an object or a boolean".to_owned());
    }
    let mut size = Size { values: 0, bytes: 0, multiples: Vec::new() };
    size.add(schema, 0)?;
    let product: f64 = size.multiples.iter().product();
    if product > MAX_MULTIPLE {
        return Err(format!("'multipleOf' is too large: all of them multiplied must be at most {MAX_MULTIPLE}"));
    }
    Ok(())
}

struct Size {
    values: usize,
    bytes: usize,
    /// Different ones, without their decimal points.
    multiples: Vec<f64>,
}

impl Size {
    fn add(&mut self, value: &Value, depth: usize) -> Result<(), String> {
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err(format!("the schema has more than {MAX_VALUES} values"));
        }
        if depth > MAX_DEPTH {
            return Err(format!("the schema is nested deeper than {MAX_DEPTH} levels"));
        }
        match value {
            Value::String(text) => self.bytes += text.len(),
            Value::Array(items) => items.iter().try_for_each(|item| self.add(item, depth + 1))?,
            Value::Object(fields) => {
                for (name, field) in fields {
                    self.bytes += name.len();
                    if let (true, Some(number)) = (name == "multipleOf", field.as_f64()) {
                        self.multiple(number);
                    }
                    self.add(field, depth + 1)?;
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
        if self.bytes > MAX_BYTES {
            return Err(format!("the schema has more than {MAX_BYTES} bytes of text"));
        }
        Ok(())
    }

    fn multiple(&mut self, number: f64) {
        let mut whole = number.abs();
        for _ in 0..20 {
            if whole.fract() == 0.0 {
                break;
            }
            whole *= 10.0;
        }
        let whole = whole.max(1.0);
        if !self.multiples.contains(&whole) {
            self.multiples.push(whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_too_large_is_refused() {
        let deep = (0..40).fold(json!({"type": "string"}), |inner, _| json!({"items": inner}));
        let deeper = (0..70).fold(json!({"type": "string"}), |inner, _| json!({"items": inner}));
        let cases = [
            (json!({"type": "object"}), None),
            (json!(true), None),
            (deep, None),
            (json!({"multipleOf": 0.01}), None),
            (json!({"properties": {"a": {"multipleOf": 5}, "b": {"multipleOf": 5}, "c": {"multipleOf": 2000}}}), None),
            (json!("string"), Some("must be an object or a boolean")),
            (deeper, Some("nested deeper than 64")),
            (json!({"enum": (0..30_000).collect::<Vec<_>>()}), Some("more than 20000 values")),
            (json!({"const": "x".repeat(300_000)}), Some("262144 bytes")),
            (json!({"multipleOf": 1_000_003}), Some("'multipleOf' is too large")),
            (json!({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}), Some("'multipleOf' is too large")),
            (json!({"multipleOf": 0.000_001_7}), None),
            (json!({"multipleOf": 0.123_456_7}), Some("'multipleOf' is too large")),
        ];
        for (schema, refused) in cases {
            let shown: String = schema.to_string().chars().take(80).collect();
            match (check(&schema), refused) {
                (Ok(()), None) => {}
                (Err(error), Some(says)) => assert!(error.contains(says), "{shown}: {error}"),
                (result, _) => panic!("{shown}: {result:?}"),
            }
        }
    }
}

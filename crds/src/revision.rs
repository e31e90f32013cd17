//! The revision: a hash of everything whose change needs a new worker.
//!
//! | change of | effect |
//! |---|---|
//! | `model.source`, `model.projector`, `model.draft`, `model.adapters`, `model.chatTemplate`, `servedName` | a new worker |
//! | `context` (all of it), `engine` (all of it) | a new worker |
//! | `unload`, `traffic`, `rollout`, `placement.priority` | taken over by the running worker or the agent before it |
//! | `replicas`, the rest of `placement`, `autoscaling`, `model.secretRef` | none on a replica that stays |
//!
//! Fields that have their default are left out of the hash. So a field that a later version adds changes no revision,
//! and an upgrade of the operator restarts nothing.

use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::model_deployment::{ContextSpec, EngineSpec, ModelSpec};

/// The first 16 hexadecimal digits of the SHA-256 over the canonical JSON of what needs a new worker.
#[must_use]
pub fn revision(served_name: &str, model: &ModelSpec, context: &ContextSpec, engine: &EngineSpec) -> String {
    // No `..`: whoever adds a field decides here which kind it is.
    let ModelSpec { source, secret_ref: _, projector, draft, adapters, chat_template } = model;
    let mut canonical = Map::new();
    let mut put = |key: &str, value: Value| {
        if !is_default(&value) {
            canonical.insert(key.to_owned(), value);
        }
    };
    put("servedName", served_name.into());
    put("source", json(source));
    put("projector", json(projector));
    put("draft", json(draft));
    put("adapters", json(adapters));
    put("chatTemplate", json(chat_template));
    put("context", without(json(context), &json(&ContextSpec::default())));
    put("engine", without(json(engine), &json(&EngineSpec::default())));
    let mut text = String::new();
    write_sorted(&Value::Object(canonical), &mut text);
    let digest = Sha256::digest(text);
    digest.iter().take(8).fold(String::new(), |mut hex, byte| {
        use std::fmt::Write as _;
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// JSON with sorted keys, whatever order a build's `serde_json` keeps: equal content is equal text.
fn write_sorted(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let sorted: std::collections::BTreeMap<_, _> = map.iter().collect();
            out.push('{');
            for (key, field) in sorted {
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                write_sorted(field, out);
                out.push(',');
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for item in items {
                write_sorted(item, out);
                out.push(',');
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

fn json(value: &impl Serialize) -> Value {
    // Plain data with string keys: cannot fail. Null would only leave the field out.
    serde_json::to_value(value).unwrap_or(Value::Null)
}

fn is_default(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

fn without(value: Value, default: &Value) -> Value {
    match value {
        Value::Object(map) => {
            map.into_iter().filter(|(key, field)| !is_default(field) && default.get(key) != Some(field)).collect()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelDeploymentSpec;

    fn spec(yaml: &str) -> ModelDeploymentSpec {
        serde_saphyr::from_str(yaml).unwrap()
    }

    fn of(spec: &ModelDeploymentSpec) -> String {
        revision(spec.served_name.as_deref().unwrap_or("m"), &spec.model, &spec.context, &spec.engine)
    }

    const BASE: &str = "model: {source: {uri: 'https://example.com/m.gguf'}}";

    #[test]
    fn the_hash_never_changes_between_versions() {
        // Literal on purpose: a changed hash reloads every model of every cluster on upgrade.
        assert_eq!(of(&spec(BASE)), "67efb852aff61431");
        assert_eq!(
            of(&spec(&format!("{BASE}\ncontext: {{maxTokens: 8192}}\nengine: {{gpu: Required}}"))),
            "baf607795ee10b2e"
        );
    }

    #[test]
    fn table_of_effects() {
        let same = [
            "replicas: 5",
            "unload: {policy: Never}",
            "traffic: {maxQueued: 1}",
            "rollout: {drainSeconds: 5}",
            "placement: {priority: 9, nodeSelector: {a: b}}",
            "context: {parallel: 4}",
            "engine: {gpu: Preferred}",
        ];
        for change in same {
            assert_eq!(of(&spec(&format!("{BASE}\n{change}"))), of(&spec(BASE)), "{change} must restart nothing");
        }
        let other = [
            "servedName: x",
            "context: {parallel: 2}",
            "context: {maxTokens: 8192}",
            "context: {overflow: DropOldest}",
            "context: {keyCacheType: Q8_0}",
            "engine: {gpu: Never}",
            "engine: {gpuLayers: 3}",
            "engine: {speculative: {type: NGram}}",
            "engine: {sampling: {temperature: '0.5'}}",
        ];
        for change in other {
            assert_ne!(of(&spec(&format!("{BASE}\n{change}"))), of(&spec(BASE)), "{change} needs a new worker");
        }
        let other_model = [
            "model: {source: {uri: 'https://example.com/n.gguf'}}",
            "model: {source: {uri: 'https://example.com/m.gguf', revision: v2}}",
            "model: {source: {uri: 'https://example.com/m.gguf'}, chatTemplate: x}",
            "model: {source: {uri: 'https://example.com/m.gguf'}, draft: {uri: 'https://example.com/d.gguf'}}",
        ];
        for yaml in other_model {
            assert_ne!(of(&spec(yaml)), of(&spec(BASE)), "{yaml} needs a new worker");
        }
        let secret = "model: {source: {uri: 'https://example.com/m.gguf'}, secretRef: {name: s}}";
        assert_eq!(of(&spec(secret)), of(&spec(BASE)), "another credential is the same model");
    }
}

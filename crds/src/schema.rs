//! Small pieces of JSON schema shared by the kinds.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

/// An atomic list: it has one writer, who replaces it whole.
pub(crate) fn atomic<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = <Vec<T>>::json_schema(generator);
    schema.insert("x-kubernetes-list-type".into(), "atomic".into());
    schema
}

/// An atomic list of short names, such as devices.
pub(crate) fn short_names(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "array", "items": {"type": "string", "maxLength": 64}, "x-kubernetes-list-type": "atomic"})
}

/// The standard conditions: a list-map keyed by `type`.
pub(crate) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": {"type": "string", "maxLength": 316, "description": "What the condition is about, in CamelCase."},
                "status": {"type": "string", "enum": ["True", "False", "Unknown"], "description": "True, False or Unknown."},
                "reason": {"type": "string", "minLength": 1, "maxLength": 1024, "description": "Why the condition has this status, one word in CamelCase."},
                "message": {"type": "string", "maxLength": 32768, "description": "The same for people, with the numbers."},
                "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0, "description": "Generation of the spec that this was computed from."},
                "lastTransitionTime": {"type": "string", "format": "date-time", "description": "When the status last changed."}
            }
        }
    })
}

/// Kubernetes' own tolerations.
pub(crate) fn tolerations(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 32,
        "x-kubernetes-list-type": "atomic",
        "items": {
            "type": "object",
            "properties": {
                "key": {"type": "string", "maxLength": 317, "description": "Key of the taint; absent (with operator Exists) matches all."},
                "operator": {"type": "string", "enum": ["Exists", "Equal"], "description": "Exists ignores the value; Equal, the default, compares it."},
                "value": {"type": "string", "maxLength": 63, "description": "Value of the taint."},
                "effect": {"type": "string", "enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"], "description": "Effect of the taint; absent matches all."},
                "tolerationSeconds": {"type": "integer", "format": "int64", "description": "For NoExecute: seconds that the model stays on the node."}
            }
        }
    })
}

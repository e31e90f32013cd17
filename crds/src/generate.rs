//! The CRDs as YAML, from the types.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::Value;

use crate::{ModelDeployment, ModelNode};

/// Name of the generated file and the CRD in it.
#[must_use]
pub fn crds() -> [(&'static str, Value); 2] {
    [
        ("altiplano.dev_modeldeployments.yaml", normalised(&ModelDeployment::crd())),
        ("altiplano.dev_modelnodes.yaml", normalised(&ModelNode::crd())),
    ]
}

/// An entry of a ModelNode's `spec.models`.
const ASSIGNMENT: &str = "/properties/spec/properties/models/items";

fn normalised(crd: &CustomResourceDefinition) -> Value {
    // Plain data with string keys: cannot fail.
    let mut value = serde_json::to_value(crd).unwrap_or(Value::Null);
    if let Some(versions) = value.pointer_mut("/spec/versions").and_then(Value::as_array_mut) {
        for version in versions {
            if let Some(schema) = version.pointer_mut("/schema/openAPIV3Schema") {
                tidy(schema);
                if let Some(assignment) = schema.pointer_mut(ASSIGNMENT) {
                    relax(assignment);
                }
                if let Some(status) = schema.pointer_mut("/properties/status") {
                    drop_defaults(status);
                }
            }
        }
    }
    value.sort_all_objects();
    value
}

/// Makes derived JSON schema read like a hand-written CRD: absent is absent (not `null`), descriptions flow, a nested
/// object's default is `{}` (its own fields have theirs), and numbers and formats are those that Kubernetes knows.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.remove("nullable");
            if let Some(Value::Array(variants)) = map.get_mut("enum") {
                variants.retain(|variant| !variant.is_null());
            }
            if let Some(Value::String(format)) = map.get("format")
                && !matches!(format.as_str(), "int32" | "int64" | "date-time")
            {
                map.remove("format");
            }
            if let Some(Value::String(text)) = map.get_mut("description") {
                *text = text.split("\n\n").map(|part| part.replace('\n', " ")).collect::<Vec<_>>().join("\n\n");
            }
            if let Some(Value::Object(default)) = map.get_mut("default") {
                default.clear();
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        Value::Number(number) => {
            if let Some(whole) = whole(number) {
                *number = whole.into();
            }
        }
        _ => {}
    }
}

/// schemars writes bounds as floating point; Kubernetes' own CRDs do not.
fn whole(number: &serde_json::Number) -> Option<i64> {
    #[expect(clippy::cast_possible_truncation, reason = "checked: the bounds are small whole numbers")]
    number.as_f64().filter(|value| value.fract() == 0.0 && value.abs() < 9e15).map(|value| value as i64)
}

/// Removes what belongs to the object that a user writes: rules, enums and defaults. A newer operator may send an older
/// ModelNode what that schema would refuse or change.
fn relax(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if map.remove("enum").is_some() {
                map.insert("maxLength".into(), 64.into());
            }
            map.remove("x-kubernetes-validations");
            map.remove("default");
            map.values_mut().for_each(relax);
        }
        Value::Array(items) => items.iter_mut().for_each(relax),
        _ => {}
    }
}

/// A status has no defaults: what its writer leaves out is absent.
fn drop_defaults(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.remove("default");
            map.values_mut().for_each(drop_defaults);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_defaults),
        _ => {}
    }
}

/// A generated CRD as the text of its committed file.
///
/// # Errors
/// When the value cannot be written as YAML.
pub fn to_yaml(crd: &Value) -> Result<String, serde_saphyr::ser::Error> {
    Ok(format!("# Generated from crds/src by `cargo xtask crds`. Do not edit.\n{}", serde_saphyr::to_string(crd)?))
}

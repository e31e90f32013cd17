//! The committed YAML is what the types say, and the schema keeps Kubernetes' API conventions.

#![expect(clippy::expect_used, reason = "a helper of tests fails like a test")]

use std::path::Path;

use altiplano_crds::generate::{crds, to_yaml};
use serde_json::Value;

/// `UPDATE=1 cargo test -p altiplano-crds` rewrites what is stale; so does `cargo xtask crds`.
#[test]
fn committed_yaml_is_not_stale() {
    for (name, crd) in crds() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        let expected = to_yaml(&crd).unwrap();
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&file, &expected).unwrap();
        }
        let committed = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(committed == expected, "{} is stale: run `cargo xtask crds`", file.display());
    }
}

fn schema_of(crd: &Value) -> &Value {
    crd.pointer("/spec/versions/0/schema/openAPIV3Schema").expect("a CRD has a schema")
}

/// Calls `visit` with the path and the schema of every field below `schema`.
fn walk(path: &str, schema: &Value, visit: &mut dyn FnMut(&str, &Value)) {
    visit(path, schema);
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        for (name, property) in properties {
            walk(&format!("{path}.{name}"), property, visit);
        }
    }
    if let Some(items) = schema.get("items") {
        walk(&format!("{path}[]"), items, visit);
    }
    if let Some(values) = schema.get("additionalProperties").filter(|v| v.is_object()) {
        walk(&format!("{path}{{}}"), values, visit);
    }
}

#[test]
fn the_schema_keeps_the_api_conventions() {
    let mut problems = Vec::new();
    let mut fields = 0;
    for (name, crd) in crds() {
        walk("", schema_of(&crd), &mut |path, schema| {
            let mut problem = |text: &str| problems.push(format!("{name}{path}: {text}"));
            let field = path.rsplit('.').next().unwrap_or_default().trim_end_matches(['[', ']', '{', '}']);
            let kind = schema.get("type").and_then(Value::as_str);
            fields += 1;
            if path.is_empty() {
                return;
            }
            if !path.ends_with("[]")
                && !path.ends_with("{}")
                && !schema.get("description").is_some_and(Value::is_string)
            {
                problem("no description");
            }
            if !field.starts_with(|c: char| c.is_ascii_lowercase()) || field.contains(['_', '-']) {
                problem("not camelCase");
            }
            match kind {
                None => problem("no type"),
                Some("number") => problem("floating point: use an integer or a decimal string"),
                Some("integer") => {
                    let format = schema.get("format").and_then(Value::as_str);
                    if !matches!(format, Some("int32" | "int64")) {
                        problem("an integer is int32 or int64");
                    }
                }
                Some("string") => {
                    let bounded = ["maxLength", "enum", "format"].iter().any(|key| schema.get(*key).is_some());
                    let map_value = path.ends_with("{}");
                    if !bounded && !map_value {
                        problem("a string without maxLength");
                    }
                }
                Some("array") => {
                    if schema.get("maxItems").is_none() {
                        problem("a list without maxItems");
                    }
                    if schema.get("x-kubernetes-list-type").is_none() {
                        problem("a list without x-kubernetes-list-type");
                    }
                }
                Some(_) => {}
            }
            for key in ["nullable", "anyOf", "oneOf", "allOf", "$ref"] {
                if schema.get(key).is_some() {
                    problem(&format!("has {key}"));
                }
            }
            if field.starts_with("no") && field.chars().nth(2).is_some_and(char::is_uppercase)
                || field.starts_with("disable")
            {
                problem("a negative name");
            }
        });
    }
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
    assert!(fields > 150, "walked only {fields} fields");
}

#[test]
fn a_status_has_neither_enums_nor_defaults() {
    for (name, crd) in crds() {
        let status = schema_of(&crd).pointer("/properties/status").expect("a status");
        walk("status", status, &mut |path, schema| {
            assert!(schema.get("default").is_none(), "{name} {path}: default");
            let condition_status = path.ends_with("conditions[].status");
            assert!(
                schema.get("enum").is_none() || condition_status,
                "{name} {path}: an unknown value would refuse the whole status"
            );
        });
    }
}

#[test]
fn assignments_carry_no_rules_of_their_own() {
    let (_, crd) = crds().into_iter().nth(1).expect("two CRDs");
    let models = schema_of(&crd).pointer("/properties/spec/properties/models/items").expect("spec.models").clone();
    walk("spec.models[]", &models, &mut |path, schema| {
        for key in ["enum", "default", "x-kubernetes-validations"] {
            assert!(schema.get(key).is_none(), "{path} has {key}: an older agent's entry would be refused or changed");
        }
    });
}

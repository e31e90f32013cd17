//! The accept and reject table of `validation/cases.yaml`, against schema and CEL rules, without a cluster.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails like a test")]

#[path = "validation/case.rs"]
mod case;

use altiplano_crds::generate::crds;
use case::Case;
use kube::core::cel::{ValidationErrors, Validator, apply_defaults};
use serde_json::{Value, json};

fn cel(schema: &Value, object: &Value, old: Option<&Value>) -> Result<(), ValidationErrors> {
    // An API server evaluates rules after it has filled in defaults, those inside a defaulted object too.
    let object = apply_defaults(schema, &apply_defaults(schema, object));
    Validator::new().validate(schema, &object, old)
}

/// What an API server would say, one problem a line.
fn problems(schema: &Value, object: &Value) -> Vec<String> {
    let structural = jsonschema::options().with_draft(jsonschema::Draft::Draft4).build(schema).unwrap();
    let mut problems: Vec<String> = structural
        .iter_errors(object)
        .map(|error| {
            format!("{}: {error}", error.instance_path().to_string().trim_start_matches('/').replace('/', "."))
        })
        .collect();
    if problems.is_empty()
        && let Err(errors) = cel(schema, object, None)
    {
        problems.extend(errors.into_vec().into_iter().map(|error| error.to_string()));
    }
    problems
}

#[test]
fn accept_and_reject_table() {
    let [(_, crd), _] = crds();
    let schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema").unwrap();
    let cases = case::all().unwrap();
    assert!(cases.len() > 30, "the table has lost its rows");
    let mut wrong = Vec::new();
    for Case { title: case, name, spec, refused, strict_only } in cases {
        if strict_only {
            continue; // Unknown fields are the API server's to see: tests/tests/api_validation.rs.
        }
        let object = json!({"metadata": {"name": name.as_deref().unwrap_or("m")}, "spec": spec});
        let problems = problems(schema, &object).join("\n");
        match refused {
            None if !problems.is_empty() => wrong.push(format!("{case}: refused: {problems}")),
            Some(expected) if problems.is_empty() => wrong.push(format!("{case}: accepted, expected `{expected}`")),
            // jsonschema names the parent of a missing property; the API server names the property.
            Some(expected) if !problems.contains(&expected) && !problems.contains("is a required property") => {
                wrong.push(format!("{case}: expected `{expected}`, got: {problems}"));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{} cases went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn an_epoch_never_goes_back() {
    let [_, (_, crd)] = crds();
    let schema = crd.pointer("/spec/versions/0/schema/openAPIV3Schema").unwrap();
    let node = |epoch: i64| json!({"metadata": {"name": "n"}, "spec": {"epoch": epoch, "models": []}});
    assert!(cel(schema, &node(5), Some(&node(4))).is_ok());
    assert!(cel(schema, &node(5), Some(&node(5))).is_ok());
    let refused = cel(schema, &node(4), Some(&node(5))).unwrap_err();
    assert!(refused.to_string().contains("epoch must not go back"), "{refused}");
}

#[test]
fn one_unreadable_assignment_leaves_the_others() {
    use altiplano_crds::ModelNodeSpec;
    let spec: ModelNodeSpec = serde_saphyr::from_str(
        "epoch: 1
models:
- {uid: a, revision: r1, generation: 1, namespace: ns, name: a, servedName: a, model: {source: {uri: 'file:///a.gguf'}}}
- {uid: b, revision: r2, generation: 1, namespace: ns, name: b, servedName: b, mode: Hover, model: {source: {uri: 'file:///b.gguf'}}}
- 42
- {uid: c, revision: r3, generation: 1, namespace: ns, name: c, servedName: c, futureField: {x: 1}, model: {source: {uri: 'file:///c.gguf'}}}
",
    )
    .unwrap();
    let parsed: Vec<_> = spec.models.iter().map(altiplano_crds::model_node::RawAssignment::parse).collect();
    assert_eq!(parsed[0].as_ref().unwrap().uid, "a");
    let bad = parsed[1].as_ref().unwrap_err();
    assert_eq!((bad.uid.as_str(), bad.revision.as_str()), ("b", "r2"));
    assert!(bad.message.contains("Hover"), "{}", bad.message);
    assert!(parsed[2].is_err());
    assert_eq!(parsed[3].as_ref().unwrap().uid, "c", "a field of a newer operator is no reason to refuse an entry");
}

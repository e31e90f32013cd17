//! The accept and reject table of crds/tests/validation/cases.yaml against a real API server, as `kubectl apply` sees it.

#[path = "../../crds/tests/validation/case.rs"]
mod case;

use altiplano_tests::ControlPlane;
use anyhow::Result;
use case::Case;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_and_reject_table() -> Result<()> {
    let cluster = ControlPlane::shared_with_chart().await?;
    let namespace = cluster.namespace("validation").await?;
    let mut wrong = Vec::new();
    for Case { title: case, name, spec, refused, strict_only } in case::all()? {
        let object = json!({
            "apiVersion": "altiplano.dev/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": {"name": name.as_deref().unwrap_or("m"), "namespace": namespace},
            "spec": spec,
        });
        // Server-side dry run: nothing stays, and every case starts from nothing.
        let create = |validate: &str| {
            cluster.kubectl_with(&["create", "--dry-run=server", validate, "-f", "-"], &object.to_string())
        };
        let answer = create("--validate=strict");
        if strict_only && let Err(error) = create("--validate=ignore") {
            wrong.push(format!("{case}: refused by more than strictness: {error:#}"));
        }
        match (refused, answer) {
            (None, Err(error)) => wrong.push(format!("{case}: refused: {error:#}")),
            (Some(expected), Ok(_)) => wrong.push(format!("{case}: accepted, expected `{expected}`")),
            (Some(expected), Err(error)) if !format!("{error:#}").contains(&expected) => {
                wrong.push(format!("{case}: expected `{expected}`, got: {error:#}"));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{} cases went wrong:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_explains_the_fields() -> Result<()> {
    let cluster = ControlPlane::shared_with_chart().await?;
    let text = cluster.kubectl(&["explain", "mdep.spec.context"])?;
    for expected in ["maxTokens", "Tokens that one request (prompt and answer) may use", "Dynamic", "overflow"] {
        assert!(text.contains(expected), "`{expected}` is missing:\n{text}");
    }
    for field in ["mdep", "mdep.spec", "mdep.status", "modelnode.spec", "modelnode.status"] {
        let text = cluster.kubectl(&["explain", field])?;
        assert!(text.contains("DESCRIPTION:") && !text.contains("<empty>"), "{field} lacks a description:\n{text}");
    }
    let all = cluster.kubectl(&["api-resources", "--categories=altiplano", "-o", "name"])?;
    assert_eq!(all.lines().count(), 2, "{all}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn defaults_stand_in_the_stored_object() -> Result<()> {
    let cluster = ControlPlane::shared_with_chart().await?;
    let namespace = cluster.namespace("defaults").await?;
    let manifest = format!(
        "apiVersion: altiplano.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: m, namespace: {namespace}}}\n\
         spec: {{model: {{source: {{uri: 'https://example.com/m.gguf'}}}}}}\n"
    );
    let stored: Value = serde_json::from_str(&cluster.kubectl_with(&["create", "-o", "json", "-f", "-"], &manifest)?)?;
    let expected = json!({
        "model": {"source": {"uri": "https://example.com/m.gguf"}},
        "replicas": 1,
        "context": {"sizing": "Dynamic", "parallel": 4, "keyCacheType": "F16", "valueCacheType": "F16", "overflow": "Reject"},
        "unload": {"policy": "WhenIdle", "idleSeconds": 300, "graceSeconds": 2, "minResidentSeconds": 30},
        "engine": {"gpu": "Preferred", "flashAttention": "Auto"},
        "placement": {"priority": 0},
        "rollout": {"maxSurge": 1, "maxUnavailable": 1, "drainSeconds": 30},
        "traffic": {"maxQueued": 64, "queueTimeoutSeconds": 60, "requestTimeoutSeconds": 600},
    });
    assert_eq!(stored["spec"], expected);
    cluster.kubectl(&["-n", &namespace, "scale", "mdep/m", "--replicas=0"])?;
    let replicas = cluster.kubectl(&["-n", &namespace, "get", "mdep/m", "-o", "jsonpath={.spec.replicas}"])?;
    assert_eq!(replicas, "0");
    cluster.kubectl(&["-n", &namespace, "delete", "mdep/m"])?;
    Ok(())
}

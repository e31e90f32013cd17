//! The harness's own promises, and what the API server makes of the CRDs and the chart's rights.

use std::time::Duration;

use altiplano_crds::ModelNode;
use altiplano_tests::{ControlPlane, NAMESPACE, wait_for};
use anyhow::Result;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;

const SOON: Duration = Duration::from_mins(1);
const DRY_RUN: [&str; 6] = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"];

fn model(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: altiplano.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: {name}, namespace: default}}\n\
         spec: {spec}\n"
    )
}

#[tokio::test]
async fn the_version_is_the_one_that_is_built() -> Result<()> {
    let cluster = ControlPlane::shared().await?;
    let version = cluster.kubectl(&["version"])?;
    let expected = format!("Server Version: {}", xtask::kubernetes_version());
    assert!(version.contains(&expected), "{version}");
    Ok(())
}

#[tokio::test]
async fn controllers_collect_what_lost_its_owner() -> Result<()> {
    let cluster = ControlPlane::shared().await?;
    let namespace = cluster.namespace("collect").await?;
    let kubectl = |arguments: &[&str]| cluster.kubectl(&[&["-n", &namespace], arguments].concat());
    kubectl(&["create", "configmap", "owner"])?;
    let uid = kubectl(&["get", "configmap", "owner", "-o", "jsonpath={.metadata.uid}"])?;
    let child = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: child, namespace: {namespace}, ownerReferences: \
         [{{apiVersion: v1, kind: ConfigMap, name: owner, uid: {uid}}}]}}\n"
    );
    cluster.kubectl_with(&["apply", "-f", "-"], &child)?;
    kubectl(&["delete", "configmap", "owner"])?;
    wait_for("the child's end", SOON, || async {
        match kubectl(&["get", "configmap", "child", "--ignore-not-found", "-o", "name"]) {
            Ok(left) if left.is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

#[tokio::test]
async fn writes_are_told_with_their_writers() -> Result<()> {
    let cluster = ControlPlane::shared().await?;
    let namespace = cluster.namespace("writes").await?;
    cluster.kubectl(&["-n", &namespace, "create", "configmap", "written"])?;
    cluster.kubectl(&["-n", &namespace, "get", "configmap", "written"])?;
    let writes: Vec<_> =
        cluster.writes()?.into_iter().filter(|write| write.name == "written" && write.namespace == namespace).collect();
    assert_eq!(writes.len(), 1, "{writes:?}");
    assert_eq!((writes[0].user.as_str(), writes[0].verb.as_str(), writes[0].code), ("admin", "create", 201));
    Ok(())
}

#[tokio::test]
async fn the_api_server_comes_back_where_it_was() -> Result<()> {
    let cluster = ControlPlane::start().await?;
    cluster.kubectl(&["create", "configmap", "kept"])?;

    cluster.pause_api_server()?;
    let unanswered = cluster.kubectl(&["get", "configmap", "kept", "--request-timeout=1s"]);
    assert!(unanswered.is_err(), "a paused API server answered: {unanswered:?}");
    cluster.resume_api_server()?;
    cluster.kubectl(&["get", "configmap", "kept"])?;

    cluster.kill_api_server()?;
    assert!(cluster.kubectl(&["get", "configmap", "kept"]).is_err(), "a killed API server answered");
    cluster.restart_api_server().await?;
    cluster.kubectl(&["get", "configmap", "kept"])?;
    cluster.stop().await
}

#[tokio::test]
async fn the_crds_read_like_documentation() -> Result<()> {
    let cluster = ControlPlane::shared_with_chart().await?;
    for field in ["mdep", "mdep.spec", "mdep.spec.context", "mdep.status", "modelnode.spec", "modelnode.status"] {
        let text = cluster.kubectl(&["explain", field])?;
        assert!(text.contains("DESCRIPTION:") && !text.contains("<empty>"), "{field} lacks a description:\n{text}");
    }
    let kinds = cluster.kubectl(&["api-resources", "--categories=altiplano", "-o", "name"])?;
    assert!(kinds.contains("modeldeployments.altiplano.dev"), "{kinds}");
    Ok(())
}

#[tokio::test]
async fn bad_models_are_refused_with_the_fields_name() -> Result<()> {
    let cluster = ControlPlane::shared_with_chart().await?;
    let source = r#"model: {source: {uri: "https://example.com/a.gguf"}}"#;
    cluster.kubectl_with(&DRY_RUN, &model("good", &format!("{{{source}}}")))?;
    let with = |more: &str| model("m", &format!("{{{source}, {more}}}"));
    let cases = [
        ("no source", model("m", "{}"), "spec.model"),
        ("unknown field", with("replicass: 2"), "replicass"),
        ("wrong enum", with("unload: {policy: Sometimes}"), "spec.unload.policy"),
        ("negative", with("replicas: -1"), "spec.replicas"),
        ("bad URI", model("m", r#"{model: {source: {uri: "gopher://x"}}}"#), "uri"),
        ("minimum over maximum", with("context: {minTokens: 8192, maxTokens: 4096}"), "minTokens"),
        ("a name with dots", model("llama-3.1", &format!("{{{source}}}")), "name"),
        ("a leading digit", model("7b-chat", &format!("{{{source}}}")), "name"),
        ("53 characters", model(&"m".repeat(53), &format!("{{{source}}}")), "name"),
    ];
    for (what, yaml, field) in cases {
        let answer = cluster.kubectl_with(&DRY_RUN, &yaml);
        let message = answer.map(|_| ()).expect_err(what).to_string();
        assert!(message.contains(field), "{what}: the message does not name {field}: {message}");
    }
    Ok(())
}

/// What each program may do, asked of the API server's own authorizer.
#[tokio::test]
async fn rights_are_what_the_roles_say_and_no_more() -> Result<()> {
    let cluster = ControlPlane::shared_with_chart().await?;
    let (operator, agent, here, elsewhere) = ("altiplano-operator", "altiplano-agent", NAMESPACE, "default");
    let (leases, nodes) = ("leases.coordination.k8s.io", "modelnodes.altiplano.dev");
    let models = "modeldeployments.altiplano.dev";
    for (account, namespace, verb, resource, subresource, allowed) in [
        (operator, elsewhere, "watch", "nodes", "", true),
        (operator, elsewhere, "update", "nodes", "", false),
        (operator, elsewhere, "patch", models, "status", true),
        (operator, elsewhere, "create", models, "", false),
        (operator, elsewhere, "create", nodes, "", true),
        (operator, elsewhere, "patch", nodes, "status", false),
        (operator, elsewhere, "patch", "services", "", true),
        (operator, elsewhere, "create", "endpointslices.discovery.k8s.io", "", true),
        (operator, elsewhere, "create", "events.events.k8s.io", "", true),
        (operator, here, "update", leases, "", true),
        (operator, elsewhere, "update", leases, "", false),
        (operator, here, "get", "secrets", "", false),
        (operator, here, "create", "pods", "", false),
        (agent, elsewhere, "watch", nodes, "", true),
        (agent, elsewhere, "patch", nodes, "", false),
        (agent, elsewhere, "create", nodes, "", false),
        (agent, elsewhere, "patch", nodes, "status", true),
        (agent, here, "update", leases, "", true),
        (agent, here, "list", leases, "", false),
        (agent, elsewhere, "update", leases, "", false),
        (agent, elsewhere, "get", models, "", false),
        (agent, here, "get", "secrets", "", false),
        (agent, here, "get", "nodes", "", false),
    ] {
        let user = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
        let subresource_flag = format!("--subresource={subresource}");
        let asked = ["-n", namespace, "auth", "can-i", verb, resource, &user, &subresource_flag];
        let found = match cluster.kubectl(&asked) {
            Ok(answer) => answer.trim() == "yes",
            // "no" comes with exit code 1.
            Err(error) => {
                assert!(error.to_string().contains(": no"), "{error}");
                false
            }
        };
        assert_eq!(found, allowed, "{account} in {namespace}: {verb} {resource} {subresource}");
    }
    Ok(())
}

#[tokio::test]
async fn an_agents_token_reaches_only_its_own_node() -> Result<()> {
    let cluster = ControlPlane::shared_with_chart().await?;
    for name in ["policy-a", "policy-b"] {
        cluster.create_node(name, &[], &[]).await?;
        let node = format!(
            "apiVersion: altiplano.dev/v1alpha1\nkind: ModelNode\nmetadata: {{name: {name}}}\n\
             spec: {{epoch: 1, models: []}}\n"
        );
        cluster.kubectl_with(&["apply", "--server-side", "-f", "-"], &node)?;
    }
    let identity = cluster.pod_identity(NAMESPACE, "altiplano-agent", "agent", Some("policy-a")).await?;
    let agent = cluster.client_with(&identity.token).await?;
    // A token that names no node.
    let unbound = cluster.pod_identity(NAMESPACE, "altiplano-agent", "nowhere", None).await?;
    let unbound = cluster.client_with(&unbound.token).await?;

    let status = async |who: &Client, node: &str| {
        let patch = Patch::Merge(json!({"status": {"conditions": []}}));
        Api::<ModelNode>::all(who.clone()).patch_status(node, &PatchParams::default(), &patch).await.map(drop)
    };
    let lease = async |name: &str| {
        let lease = Lease { metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() }, spec: None };
        let leases = Api::<Lease>::namespaced(agent.clone(), NAMESPACE);
        leases.create(&PostParams::default(), &lease).await.map(drop)
    };
    status(&agent, "policy-a").await?;
    lease("altiplano-agent-policy-a").await?;
    for (what, answer, named) in [
        ("another node's status", status(&agent, "policy-b").await, "policy-b"),
        ("another agent's Lease", lease("altiplano-agent-policy-b").await, "altiplano-agent-policy-b"),
        ("the leader's Lease", lease("altiplano-operator").await, "altiplano-operator"),
        ("a token without node", status(&unbound, "policy-a").await, "must be bound to a pod that runs on a node"),
    ] {
        let message = answer.expect_err(what).to_string();
        assert!(message.contains("altiplano-agent-own-node") && message.contains(named), "{what}: {message}");
    }

    // The token ends with its pod.
    cluster.delete_pod(&identity).await?;
    wait_for("the token's end", SOON, || async {
        match status(&agent, "policy-a").await {
            Err(error) if error.to_string().contains("Unauthorized") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

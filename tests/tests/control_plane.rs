//! The harness's own promises.

use std::time::Duration;

use altiplano_tests::{ControlPlane, wait_for};
use anyhow::Result;

const SOON: Duration = Duration::from_mins(1);

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

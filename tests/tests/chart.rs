//! The chart, through the real Helm and the real API server.

use altiplano_tests::{ControlPlane, NAMESPACE, RELEASE, program, render_chart, run_helm};
use anyhow::Result;
use serde_json::Value;

/// Values that reach every branch of the templates.
const EVERYTHING: [&str; 27] = [
    "imagePullSecrets={pull}",
    "listenAddress=[::]",
    "operator.replicas=3",
    "operator.image.tag=1.2.3",
    "operator.nodeSelector.zone=a",
    "operator.tolerations[0].operator=Exists",
    "operator.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey=zone",
    "operator.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].labelSelector.matchLabels.a=b",
    "operator.priorityClassName=system-cluster-critical",
    "operator.podAnnotations.note=x",
    "agent.fileRoots={/srv/models,/mnt/more}",
    "agent.denyNetworks={10.0.0.0/8,fd00::/8}",
    "agent.storageCapacityBytes=1000000000000",
    "agent.allowHttp=true",
    "agent.upgrade.maxUnavailable=2",
    "agent.upgrade.paused=true",
    "agent.updateStrategy.type=OnDelete",
    "agent.allowPrivateNetworks=true",
    "agent.nodeSelector.gpu=present",
    "agent.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey=zone",
    "agent.runtimeClassName=nvidia",
    "agent.priorityClassName=system-node-critical",
    "agent.podAnnotations.note=x",
    "agent.extraVolumes[0].name=dri",
    "agent.extraVolumes[0].hostPath.path=/dev/dri",
    "agent.extraVolumeMounts[0].name=dri",
    "agent.extraVolumeMounts[0].mountPath=/dev/dri",
];

#[test]
fn lint_finds_nothing() -> Result<()> {
    let version = format!("--kube-version={}", xtask::kubernetes_version());
    let told = run_helm(&["lint", "--strict", "charts/altiplano", &version])?;
    assert!(told.contains("0 chart(s) failed"), "{told}");
    Ok(())
}

#[test]
fn wrong_values_are_refused_by_name() {
    for (value, named) in [
        ("agent.port=80", "port"),
        ("agent.fileRoots={models}", "fileRoots"),
        ("agent.gpus=1", "gpus"),
        ("operator.replicas=0", "replicas"),
        ("agent.updateStrategy.type=Recreate", "updateStrategy"),
        ("agent.upgrade.maxUnavailable=0", "maxUnavailable"),
        ("agent.modelPorts.first=9999,agent.modelPorts.last=9000", "modelPorts"),
    ] {
        let error = render_chart(&[value]).expect_err(value).to_string();
        assert!(error.contains(named), "{value}: {error}");
    }
}

#[test]
fn crds_can_be_left_out() -> Result<()> {
    let count = |yaml: &str| yaml.matches("kind: CustomResourceDefinition").count();
    assert_eq!(count(&render_chart(&[])?), 2);
    assert_eq!(count(&render_chart(&["crds.install=false"])?), 0);
    Ok(())
}

/// A flag or variable that the chart sets and the program does not know is a pod that never starts, or a setting that
/// does nothing.
#[test]
fn the_programs_understand_what_the_chart_passes() -> Result<()> {
    let yaml = render_chart(&EVERYTHING)?;
    let workloads: Vec<Value> = yaml
        .split("\n---\n")
        .filter(|document| document.lines().any(|line| matches!(line, "kind: DaemonSet" | "kind: Deployment")))
        .map(serde_saphyr::from_str)
        .collect::<Result<_, _>>()?;
    assert_eq!(workloads.len(), 2);
    for workload in workloads {
        let name = workload["metadata"]["name"].as_str().expect("a name");
        let container = &workload["spec"]["template"]["spec"]["containers"][0];
        let strings = |list: &Value, field: &str| -> Vec<String> {
            let items = list.as_array().into_iter().flatten();
            items
                .filter_map(|item| if field.is_empty() { item } else { &item[field] }.as_str())
                .map(str::to_owned)
                .collect()
        };
        let arguments = strings(&container["args"], "");
        let output = std::process::Command::new(program(name)?).args(&arguments).arg("--help").output()?;
        let help = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        let variables = strings(&container["env"], "name");
        assert!(variables.contains(&"ALTIPLANO_NAMESPACE".to_owned()), "{name} has {variables:?}");
        for variable in variables.iter().filter(|name| name.starts_with("ALTIPLANO_")) {
            assert!(help.contains(&format!("[env: {variable}=")), "{name} knows no {variable}: {help}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_api_server_accepts_every_object() -> Result<()> {
    let cluster = ControlPlane::shared_with_chart().await?;
    for values in [&[][..], &EVERYTHING] {
        let yaml = render_chart(values)?;
        let dry_run =
            ["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-"];
        let told = cluster.kubectl_with(&dry_run, &yaml)?;
        for object in ["daemonset.apps/altiplano-agent", "deployment.apps/altiplano-operator"] {
            assert!(told.contains(object), "{told}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn helm_installs_upgrades_and_uninstalls() -> Result<()> {
    let cluster = ControlPlane::start().await?;
    let kubeconfig = cluster.kubeconfig().to_string_lossy().into_owned();
    let helm =
        |arguments: &[&str]| run_helm(&[arguments, &["--kubeconfig", &kubeconfig, "--namespace", NAMESPACE]].concat());
    let notes = helm(&["install", RELEASE, "charts/altiplano", "--create-namespace"])?;
    assert!(notes.contains("kubectl get modelnodes"), "{notes}");
    helm(&["upgrade", RELEASE, "charts/altiplano", "--set", "operator.replicas=1"])?;
    let replicas = cluster.kubectl(&[
        "-n",
        NAMESPACE,
        "get",
        "deployment/altiplano-operator",
        "-o",
        "jsonpath={.spec.replicas}",
    ])?;
    assert_eq!(replicas, "1");

    helm(&["uninstall", RELEASE])?;
    let left = cluster.kubectl(&["get", "crd,clusterrole,validatingadmissionpolicy", "-o", "name"])?;
    let ours: Vec<_> = left.lines().filter(|name| name.contains("altiplano")).collect();
    let kept = ["modeldeployments.altiplano.dev", "modelnodes.altiplano.dev"];
    let kept = kept.map(|name| format!("customresourcedefinition.apiextensions.k8s.io/{name}"));
    assert_eq!(ours, kept, "the CRDs, and the models in them, outlive the release; nothing else does");
    cluster.stop().await
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
        (operator, here, "delete", "pods", "", true),
        (operator, elsewhere, "delete", "pods", "", false),
        (operator, here, "watch", "daemonsets.apps", "", true),
        (operator, here, "watch", "controllerrevisions.apps", "", true),
        (operator, here, "patch", "daemonsets.apps", "status", true),
        (operator, here, "patch", "daemonsets.apps", "", false),
        (operator, elsewhere, "watch", "daemonsets.apps", "", false),
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

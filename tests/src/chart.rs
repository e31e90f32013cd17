//! The chart, rendered by the real Helm.

use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
};

use crate::{ControlPlane, helm, repository, wait_for};

/// The namespace that the chart is installed into.
pub const NAMESPACE: &str = "altiplano-system";
/// The name of its release.
pub const RELEASE: &str = "altiplano";
/// The CRDs' names.
pub const CRDS: [&str; 2] = ["modeldeployments.altiplano.dev", "modelnodes.altiplano.dev"];

const SOON: Duration = Duration::from_mins(1);

/// Runs helm in the repository; an exit code other than 0 is an error with its message.
pub fn run_helm(arguments: &[&str]) -> Result<String> {
    let mut helm = Command::new(helm()?);
    let output = helm
        .current_dir(repository())
        .args(arguments)
        // Neither the user's configuration nor a cluster that it may point to.
        .env("HELM_CONFIG_HOME", "/nonexistent")
        .env("HELM_CACHE_HOME", "/nonexistent")
        .env("HELM_DATA_HOME", "/nonexistent")
        .env("KUBECONFIG", "/nonexistent")
        .output()
        .context("could not start helm")?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "helm {}: {stdout}{}", arguments.join(" "), stderr.trim());
    Ok(stdout)
}

/// The chart as YAML; each value is `path=value`, as `--set` takes it.
pub fn render_chart(values: &[&str]) -> Result<String> {
    let version = format!("--kube-version={}", xtask::kubernetes_version());
    let mut arguments = vec!["template", RELEASE, "charts/altiplano", "--namespace", NAMESPACE, &version];
    for value in values {
        arguments.extend(["--set", value]);
    }
    run_helm(&arguments)
}

impl ControlPlane {
    /// Applies the committed CRDs and waits until they are served.
    pub fn install_crds(&self) -> Result<()> {
        let dir = repository().join("crds");
        self.kubectl(&["apply", "--server-side", "--filename", &dir.to_string_lossy()])?;
        self.crds_served()
    }

    /// Installs the chart as Helm renders it, except for its workloads: tests run operator and agents themselves, with
    /// the service accounts, rights and admission policy that this brings. Waits until all of them are in force.
    pub async fn install_chart(&self, values: &[&str]) -> Result<()> {
        let rendered = render_chart(values)?;
        let objects: Vec<_> = documents(&rendered).filter(|document| !is_workload(document)).collect();
        // Of another test of this run, it may be there.
        self.kubectl_with(
            &["apply", "--server-side", "-f", "-"],
            &format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n"),
        )?;
        self.kubectl_with(&["apply", "--server-side", "-f", "-"], &objects.join("\n---\n"))?;
        self.crds_served()?;
        self.policy_in_force().await
    }

    fn crds_served(&self) -> Result<()> {
        let names = CRDS.map(|name| format!("crd/{name}"));
        let mut arguments = vec!["wait", "--for=condition=Established", "--timeout=60s"];
        arguments.extend(names.iter().map(String::as_str));
        self.kubectl(&arguments).map(drop)
    }

    /// A policy is in force some time after it is written: asks, with an agent's token and without effect, for a Lease
    /// that is not the agent's, until that is refused.
    async fn policy_in_force(&self) -> Result<()> {
        let identity = self.pod_identity(NAMESPACE, "altiplano-agent", "policy-probe", Some("policy-probe")).await?;
        let leases = Api::<Lease>::namespaced(self.client_with(&identity.token).await?, NAMESPACE);
        let lease = Lease {
            metadata: ObjectMeta { name: Some("policy-probe-of-another".into()), ..ObjectMeta::default() },
            ..Lease::default()
        };
        let dry_run = PostParams { dry_run: true, ..PostParams::default() };
        wait_for("the admission policy", SOON, || async {
            match leases.create(&dry_run, &lease).await {
                Err(kube::Error::Api(status)) if status.message.contains("altiplano-agent-own-node") => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await?;
        self.delete_pod(&identity).await
    }
}

fn documents(yaml: &str) -> impl Iterator<Item = &str> {
    yaml.split("\n---\n")
        .map(|document| document.trim_start_matches("---\n"))
        .filter(|document| document.contains("kind:"))
}

fn is_workload(document: &str) -> bool {
    document.lines().any(|line| matches!(line, "kind: Deployment" | "kind: DaemonSet"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_parted_and_workloads_known() {
        let yaml = "---\n# Source: a\nkind: Service\nspec:\n  kind: Deployment\n---\n# nothing\n---\nkind: DaemonSet\n";
        let found: Vec<_> = documents(yaml).map(is_workload).collect();
        assert_eq!(found, [false, true]);
    }
}

//! The tools that are built from Go modules: the control plane and Helm.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

use super::{folder_once, step};
use crate::command::{command, find, output};

// Go 1.27 builds a kube-apiserver 1.36 that serves malformed OpenAPI.
const GO: (u32, u32) = (1, 26);
/// What an other Go is asked to run instead; a Go of 1.21 or newer fetches it by itself.
const GO_TOOLCHAIN: &str = "go1.26.8";

const PACKAGES: [(&str, &str); 4] = [
    ("etcd", "go.etcd.io/etcd/server/v3"),
    ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
];

/// etcd, kube-apiserver, kube-controller-manager and kubectl.
pub(super) fn control_plane() -> Result<()> {
    let version = xtask::kubernetes_version();
    let ready = || xtask::CONTROL_PLANE_TOOLS.iter().all(|name| xtask::control_plane_tool(name).is_some());
    folder_once(&xtask::control_plane_dir(), ready, |dir| {
        let toolchain = toolchain()?;
        step(&format!("building etcd and Kubernetes {version} (ten minutes on two cores, once)"), || {
            let (major, minor) = major_minor(version).context("no version of k8s.io/kubernetes in go.mod")?;
            let flags = format!(
                "-X k8s.io/component-base/version.gitVersion={version} \
                 -X k8s.io/component-base/version.gitMajor={major} -X k8s.io/component-base/version.gitMinor={minor}"
            );
            // What KUBEBUILDER_ASSETS has is not built; envtest's folder lacks the controller manager, say.
            let missing = PACKAGES.iter().filter(|(name, _)| !xtask::is_control_plane_asset(name));
            let packages: Vec<_> = missing.map(|(_, package)| *package).collect();
            build_tools(toolchain, "tests/cluster", &packages, &flags, dir)?;
            // Go names etcd's server after the last folder of its import path.
            for name in ["server", "v3"].map(|name| dir.join(name)).iter().filter(|path| path.is_file()) {
                fs::rename(name, dir.join("etcd"))?;
            }
            Ok(())
        })
    })
}

/// The real Helm, which the chart is rendered and installed with.
pub(super) fn helm() -> Result<()> {
    let version = xtask::go_module_version(xtask::HELM_GO_MOD, "helm.sh/helm/v3");
    folder_once(
        &xtask::helm_dir(),
        || xtask::helm().is_some(),
        |dir| {
            let toolchain = toolchain()?;
            step(&format!("building Helm {version}"), || {
                // Without these `helm template` believes in Kubernetes 1.20 and refuses the chart's kubeVersion.
                let (major, minor) = major_minor(xtask::kubernetes_version()).unwrap_or_default();
                let kubernetes = ["chartutil", "lint/rules"].map(|package| {
                    let package = format!("helm.sh/helm/v3/pkg/{package}");
                    format!("-X {package}.k8sVersionMajor={major} -X {package}.k8sVersionMinor={minor}")
                });
                let flags = format!("-X helm.sh/helm/v3/internal/version.version={version} {}", kubernetes.join(" "));
                build_tools(toolchain, "tests/cluster/helm", &["helm.sh/helm/v3/cmd/helm"], &flags, dir)
            })
        },
    )
}

fn build_tools(toolchain: &str, module: &str, packages: &[&str], link_flags: &str, into: &Path) -> Result<()> {
    let mut go = command("go");
    go.current_dir(xtask::repository().join(module))
        .env("CGO_ENABLED", "0")
        .env("GOTOOLCHAIN", toolchain)
        // A `-o` of a folder ends in a slash.
        .args(["build", "-trimpath", "-ldflags", &format!("-s -w {link_flags}"), "-o", &format!("{}/", into.display())])
        .args(packages);
    output(&mut go).map(drop)
}

/// What to set `GOTOOLCHAIN` to.
fn toolchain() -> Result<&'static str> {
    let needed = "Go 1.26 builds the control plane and Helm for the tests: install it from https://go.dev/dl/ (a control \
                  plane of your own: set KUBEBUILDER_ASSETS to a folder with etcd, kube-apiserver, \
                  kube-controller-manager and kubectl)";
    if find("go").is_none() {
        bail!("Go is missing; {needed}");
    }
    let version = output(command("go").env("GOTOOLCHAIN", "local").args(["env", "GOVERSION"]))?;
    match major_minor(version.trim().trim_start_matches("go")) {
        Some(found) if found == GO => Ok("local"),
        Some(found) if found >= (1, 21) => Ok(GO_TOOLCHAIN),
        _ => bail!("{} is too old; {needed}", version.trim()),
    }
}

/// `(1, 36)` of `v1.36.2`.
fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parted() {
        assert_eq!(major_minor("v1.36.2"), Some((1, 36)));
        assert_eq!(major_minor("1.26.8"), Some((1, 26)));
        assert_eq!(major_minor("devel"), None);
    }
}

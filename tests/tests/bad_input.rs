//! Bad input, on the real API server and the real agent: each case says which it is, with numbers, in a condition and
//! in one event; it recovers by itself when the cause goes away; other models never notice.

use std::collections::BTreeMap;
use std::path::Path;

use altiplano_crds::ModelDeployment;
use altiplano_crds::conditions::{reasons, types};
use altiplano_test_models as models;
use altiplano_tests::scenario::{SOON, Scenario, conditions_text, toy_model, toy_question};
use altiplano_tests::{ask, content, http, wait_for};
use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use kube::Api;
use kube::api::{DeleteParams, ObjectMeta, PostParams};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Waits until a condition other than True carries `reason`; checks that its message holds `words`.
async fn told(world: &Scenario, name: &str, reason: &str, words: &[&str]) -> Result<()> {
    let message = world
        .wait_until(name, reason, SOON, |model| {
            let conditions = model.status.iter().flat_map(|status| &status.conditions);
            let mut found = conditions.filter(|condition| condition.reason == reason);
            found.next().map(|condition| condition.message.clone()).ok_or_else(|| conditions_text(model))
        })
        .await?;
    for word in words {
        ensure!(message.contains(word), "{name}: `{word}` is missing in: {message}");
    }
    let model = world.get(name).await?;
    let ready = model.status.iter().flat_map(|status| &status.conditions).find(|c| c.type_ == types::READY);
    ensure!(ready.is_some_and(|ready| ready.status != "True"), "{name} is Ready: {}", conditions_text(&model));
    wait_for(format!("one event {reason} about {name}"), SOON, || async {
        let events = world.events(name).await.map_err(|error| format!("{error:#}"))?;
        let found: Vec<_> = events.iter().filter(|event| event.reason.as_deref() == Some(reason)).collect();
        match found.as_slice() {
            [_] => Ok(()),
            _ => Err(format!(
                "{} events: {:?}",
                found.len(),
                events.iter().map(|e| (&e.reason, &e.message)).collect::<Vec<_>>()
            )),
        }
    })
    .await
}

/// Files that are missing, wrong, cut or not what they claim to be; beside them a model that serves all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_files_are_named_and_recover() -> Result<()> {
    let world = Scenario::start("bad-files", 1).await?;
    let (prompt, answer) = toy_question(0)?;
    world.apply(&world.toy("good", ""))?;
    world.wait_for_ready("good", "1/1").await?;
    let good = world.wait_for_endpoints("good", 1).await?.remove(0).url;
    let restarts_before = world.model_node(0).await?.status.context("status")?.models[0].restarts;

    let files = world.files();
    let path = |name: &str| files.join(format!("{name}.gguf"));
    std::fs::write(path("not-gguf"), b"PK\x03\x04 this is a zip file, not a model, and long enough to look at twice")?;
    let small = models::Spec::default();
    models::BadFile::CorruptHeader.write(&small, &path("corrupt"))?;
    models::BadFile::NoLayers.write(&small, &path("no-layers"))?;
    models::BadFile::UnknownArchitecture.write(&small, &path("unknown-arch"))?;
    let whole = std::fs::read(toy_model())?;
    std::fs::write(path("truncated"), &whole[..whole.len() / 2])?;
    let source = |name: &str| world.manifest(name, &format!("file://{}", path(name).display()), "");
    let digest =
        world.toy("wrong-digest", "").replace("toy.gguf\"", &format!("toy.gguf\", sha256: \"{}\"", "0".repeat(64)));

    let cases: [(&str, String, &str, &[&str]); 7] = [
        ("missing", source("missing"), "FileNotFound", &["missing.gguf"]),
        ("not-gguf", source("not-gguf"), "NotGGUF", &["not a GGUF", "PK"]),
        ("corrupt", source("corrupt"), "CorruptHeader", &[]),
        ("unknown-arch", source("unknown-arch"), "UnknownArchitecture", &[]),
        ("truncated", source("truncated"), "FileTruncated", &[]),
        // llama.cpp would abort on it.
        ("no-layers", source("no-layers"), "CorruptHeader", &["block_count is 0"]),
        ("wrong-digest", digest, "ChecksumMismatch", &["0000000000000000"]),
    ];
    for (name, manifest, ..) in &cases {
        world.apply(manifest).with_context(|| (*name).to_owned())?;
    }
    let mut wrong = Vec::new();
    for (name, _, reason, words) in &cases {
        if let Err(error) = told(&world, name, reason, words).await {
            wrong.push(format!("{name}: {error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert_eq!(content(&ask(&good, "good", &prompt).await?)?, answer);
    let node = world.model_node(0).await?.status.context("status")?;
    let good_uid = world.get("good").await?.metadata.uid.context("uid")?;
    let good_state = node.models.iter().find(|model| model.uid == good_uid).context("good")?;
    assert_eq!((good_state.restarts, good_state.state.as_str()), (restarts_before, "Ready"), "the good model noticed");

    // The cause goes away: the file appears, the header is put right. Nobody touches the objects.
    std::fs::copy(toy_model(), path("missing"))?;
    std::fs::copy(toy_model(), path("not-gguf"))?;
    for name in ["missing", "not-gguf"] {
        world.wait_for_ready(name, "1/1").await?;
        let url = world.wait_for_endpoints(name, 1).await?.remove(0).url;
        assert_eq!(content(&ask(&url, name, &prompt).await?)?, answer);
    }
    for (name, ..) in &cases {
        world.delete(name).await?;
    }
    world.delete("good").await
}

/// A server that promises a whole file, sends half of what is asked for and hangs up, as often as `cuts` says, then sends
/// all of it; with `usize::MAX` it never sends more than the first half.
async fn flaky_server(file: &Path, cuts: usize) -> Result<(String, tokio::task::JoinHandle<()>)> {
    let body = std::fs::read(file)?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/model.gguf", listener.local_addr()?);
    let task = tokio::spawn(async move {
        let mut left = cuts;
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 8192];
            let Ok(read) = stream.read(&mut request).await else { continue };
            let request = String::from_utf8_lossy(&request[..read]).to_lowercase();
            let head = request.starts_with("head ");
            let from: usize = request
                .split_once("range: bytes=")
                .and_then(|(_, rest)| rest.split(['-', '\r']).next())
                .and_then(|number| number.parse().ok())
                .unwrap_or(0);
            let part = &body[from.min(body.len())..];
            let status = if from > 0 {
                format!("206 Partial Content\r\ncontent-range: bytes {from}-{}/{}", body.len() - 1, body.len())
            } else {
                "200 OK".into()
            };
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\naccept-ranges: bytes\r\netag: \"one\"\r\nconnection: close\r\n\r\n",
                part.len()
            );
            let endless = cuts == usize::MAX;
            let sent = if head || (endless && from > 0) {
                0
            } else if left > 0 {
                left -= 1;
                part.len() / 2
            } else {
                part.len()
            };
            // A client that hangs up first is as good.
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.write_all(&part[..sent]).await;
            let _ = stream.shutdown().await;
        }
    });
    Ok((url, task))
}

/// A download that breaks off is resumed and, in the end, complete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_download_is_resumed() -> Result<()> {
    let world = Scenario::start("download", 1).await?;
    let (prompt, answer) = toy_question(0)?;
    let (url, server) = flaky_server(&toy_model(), 2).await?;
    world.apply(&world.manifest("toy", &url, ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let endpoint = world.wait_for_endpoints("toy", 1).await?.remove(0).url;
    assert_eq!(content(&ask(&endpoint, "toy", &prompt).await?)?, answer);
    world.delete("toy").await?;

    // One that never ends well is told, with the bytes.
    let (url, endless) = flaky_server(&toy_model(), usize::MAX).await?;
    world.apply(&world.manifest("cut", &url.replace("model.gguf", "other.gguf"), ""))?;
    world
        .wait_until("cut", "a failed download", SOON * 2, |model| {
            let text = conditions_text(model);
            if text.contains("Download") && text.contains("bytes") { Ok(()) } else { Err(text) }
        })
        .await?;
    world.delete("cut").await?;
    server.abort();
    endless.abort();
    Ok(())
}

/// Too large for any device, and no node that matches: the reason for each node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fits_nowhere_is_told_with_the_numbers() -> Result<()> {
    let world = Scenario::start("nowhere", 1).await?;
    world.apply(&world.toy("good", ""))?;
    world.wait_for_ready("good", "1/1").await?;

    world.apply(&world.toy("elsewhere", "placement: {nodeSelector: {no-such: label}}"))?;
    told(&world, "elsewhere", reasons::NO_NODE_MATCHES, &[&world.node(0), "no-such"]).await?;
    // A context for which no machine has the memory: 16 million tokens, 128 times.
    world.apply(&world.toy(
        "giant",
        "context: {sizing: Fixed, maxTokens: 16777216, parallel: 128, rope: {scaling: Yarn, factor: 64}}",
    ))?;
    told(&world, "giant", reasons::INSUFFICIENT_MEMORY, &[&world.node(0)]).await?;
    // More positions than the model was trained with, and no word on how to stretch them.
    world.apply(&world.toy("stretched", "context: {maxTokens: 100000}"))?;
    told(&world, "stretched", reasons::UNSUPPORTED_SPEC, &["100000", "context.rope"]).await?;
    // A GPU that is not there.
    world.apply(&world.toy("gpu", "engine: {gpu: Required}"))?;
    world
        .wait_until("gpu", "that no GPU is there", SOON, |model| {
            let text = conditions_text(model);
            let told = [reasons::GPU_REQUIRED, reasons::NO_DEVICE].iter().any(|reason| text.contains(reason));
            if told { Ok(()) } else { Err(text) }
        })
        .await?;
    // The label comes: so does the model.
    world.cluster.kubectl(&["label", "node", &world.node(0), "no-such=label"])?;
    world.wait_for_ready("elsewhere", "1/1").await?;
    world.wait_for_ready("good", "1/1").await?;
    for name in ["elsewhere", "giant", "stretched", "gpu", "good"] {
        world.delete(name).await?;
    }
    Ok(())
}

/// Rule 14: a Service of that name that is not ours is never touched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strangers_service_is_never_touched() -> Result<()> {
    let world = Scenario::start("taken", 1).await?;
    let services = Api::<Service>::namespaced(world.client.clone(), &world.namespace);
    let stranger = Service {
        metadata: ObjectMeta {
            name: Some("toy".into()),
            labels: Some(BTreeMap::from([("owner".to_owned(), "somebody-else".to_owned())])),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            selector: Some(BTreeMap::from([("app".to_owned(), "theirs".to_owned())])),
            ports: Some(vec![ServicePort { port: 8080, ..ServicePort::default() }]),
            ..ServiceSpec::default()
        }),
        status: None,
    };
    let before = services.create(&PostParams::default(), &stranger).await?;
    world.apply(&world.toy("toy", ""))?;
    told(&world, "toy", reasons::SERVICE_NAME_TAKEN, &["toy"]).await?;
    let after = services.get("toy").await?;
    assert_eq!(after.metadata.resource_version, before.metadata.resource_version, "the stranger's Service was written");
    services.delete("toy", &DeleteParams::default()).await?;
    world.wait_for_ready("toy", "1/1").await?;
    let ours = services.get("toy").await?;
    let owner = ours.metadata.owner_references.unwrap_or_default();
    assert_eq!(owner.first().map(|owner| owner.kind.as_str()), Some("ModelDeployment"));
    world.delete("toy").await
}

/// An object that the operator cannot parse never blocks the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_cannot_be_parsed_blocks_no_other() -> Result<()> {
    let mut world = Scenario::start("unparsable", 1).await?;
    // A newer version's field value, stored while the CRD allowed it.
    let crd: Value = serde_json::from_str(&world.cluster.kubectl(&[
        "get",
        "crd",
        "modeldeployments.altiplano.dev",
        "-o",
        "json",
    ])?)?;
    let path = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/unload/properties/policy/enum";
    let old = crd.pointer(path).context("the enum of unload.policy")?.clone();
    let allow = |values: &Value| json!([{"op": "replace", "path": path, "value": values}]).to_string();
    let mut wider = old.clone();
    wider.as_array_mut().context("an enum")?.push("Hibernate".into());
    let crd_name = "crd/modeldeployments.altiplano.dev";
    world.cluster.kubectl(&["patch", crd_name, "--type=json", "-p", &allow(&wider)])?;
    let manifest = world.toy("future", "unload: {policy: Hibernate}");
    wait_for("the wider schema", SOON, || {
        std::future::ready(world.apply(&manifest).map_err(|error| format!("{error:#}")))
    })
    .await?;
    world.cluster.kubectl(&["patch", crd_name, "--type=json", "-p", &allow(&old)])?;

    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    world.operator.proc.assert_running()?;
    // An operator that starts beside it is not stopped by it either.
    world.operator.proc.kill()?;
    world.operator = altiplano_tests::Operator::start(world.cluster, &[]).await?;
    world.operator.ready().await?;
    world.cluster.kubectl(&["-n", &world.namespace, "scale", "mdep/toy", "--replicas=0"])?;
    world.wait_for_condition("toy", types::READY, "False", reasons::SCALED_TO_ZERO).await?;
    let metrics = world.operator.metrics().await?;
    ensure!(metrics.contains("reason=\"Unreadable\""), "no metric tells of it:\n{metrics}");
    let models = Api::<ModelDeployment>::namespaced(world.client.clone(), &world.namespace);
    models.delete("toy", &DeleteParams::default()).await?;
    world.cluster.kubectl(&["-n", &world.namespace, "delete", "mdep/future", "--wait=false"])?;
    Ok(())
}

/// 4xx in OpenAI's form for everything that a client can get wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_answered_in_openais_form() -> Result<()> {
    let world = Scenario::start("bad-requests", 1).await?;
    let (prompt, answer) = toy_question(0)?;
    world.apply(&world.toy("toy", ""))?;
    world.wait_for_ready("toy", "1/1").await?;
    let url = world.wait_for_endpoints("toy", 1).await?.remove(0).url;
    let client = http()?;
    let messages = json!([{"role": "user", "content": "hi"}]);
    let text = |value: Value| value.to_string();
    let cases: [(&str, &str, String, u16, &str); 11] = [
        ("malformed JSON", "application/json", "{\"model\": \"toy\", ".into(), 400, ""),
        ("not an object", "application/json", "[]".into(), 400, ""),
        ("unknown model", "application/json", text(json!({"model": "gpt-9", "messages": messages})), 404, "gpt-9"),
        (
            "wrong content type",
            "text/plain",
            text(json!({"model": "toy", "messages": messages})),
            415,
            "application/json",
        ),
        ("no messages", "application/json", text(json!({"model": "toy"})), 400, "messages"),
        ("empty messages", "application/json", text(json!({"model": "toy", "messages": []})), 400, "messages"),
        (
            "temperature",
            "application/json",
            text(json!({"model": "toy", "messages": messages, "temperature": 9})),
            400,
            "temperature",
        ),
        (
            "max_tokens",
            "application/json",
            text(json!({"model": "toy", "messages": messages, "max_tokens": -7})),
            400,
            "max_tokens",
        ),
        ("n", "application/json", text(json!({"model": "toy", "messages": messages, "n": 1000})), 400, "n"),
        (
            "tools",
            "application/json",
            text(
                json!({"model": "toy", "messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}),
            ),
            400,
            "tools",
        ),
        (
            "role",
            "application/json",
            text(json!({"model": "toy", "messages": [{"role": "wizard", "content": "x"}]})),
            400,
            "role",
        ),
    ];
    let mut wrong = Vec::new();
    for (case, content_type, body, status, word) in cases {
        let response = client
            .post(format!("{url}/v1/chat/completions"))
            .header("content-type", content_type)
            .header("x-request-id", case.replace(' ', "-"))
            .body(body)
            .send()
            .await?;
        let got = response.status().as_u16();
        let id = response.headers().get("x-request-id").map(|id| id.to_str().unwrap_or_default().to_owned());
        let answer: Value = response.json().await.unwrap_or_default();
        let error = &answer["error"];
        let formed = error["message"].is_string() && error["type"].is_string() && error.get("code").is_some();
        let named = error.to_string().contains(word);
        if got != status || !formed || !named || id.as_deref() != Some(&case.replace(' ', "-")) {
            wrong.push(format!("{case}: expected {status} naming `{word}`, got {got} id {id:?}: {answer}"));
        }
    }
    // curl asks before it sends so much (Expect: 100-continue), and so can read the answer.
    let huge = world.files().join("huge.json");
    std::fs::write(
        &huge,
        json!({"model": "toy", "messages": [{"role": "user", "content": "x".repeat(64 << 20)}]}).to_string(),
    )?;
    let output = tokio::process::Command::new("curl")
        .args(["--silent", "--max-time", "60", "--noproxy", "*", "-H", "content-type: application/json"])
        .args(["--write-out", "%{http_code}", "--data-binary", &format!("@{}", huge.display())])
        .arg(format!("{url}/v1/chat/completions"))
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !said.ends_with("413") || !said.contains("\"error\"") {
        wrong.push(format!("a body of 64 MiB: {said}"));
    }
    for (method, path, status) in [("GET", "/v1/chat/completions", 405), ("POST", "/v1/nothing", 404)] {
        let response = client.request(method.parse()?, format!("{url}{path}")).send().await?;
        let got = response.status().as_u16();
        let answer: Value = response.json().await.unwrap_or_default();
        if got != status || !answer["error"]["message"].is_string() {
            wrong.push(format!("{method} {path}: expected {status}, got {got}: {answer}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(content(&ask(&url, "toy", &prompt).await?)?, answer);
    world.delete("toy").await
}

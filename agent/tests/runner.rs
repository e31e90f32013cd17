//! The worker process: what the agent starts, reads, and ends. On a GPU: Mesa's software driver, or an NVIDIA GPU with
//! `--features cuda`.
#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

#[path = "support/device.rs"]
mod device;
#[path = "runner/estimates.rs"]
mod estimates;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use altiplano_agent::runner::protocol::{
    EstimateReport, MemoryUse, ProbeReport, ProbedDevice, RunnerConfig, RunnerEvent, RunnerReport,
};
use altiplano_crds::model_deployment::{ContextSpec, EngineSpec, FlashAttention};
use altiplano_test_models::{BadFile, Projector, ProjectorKind, Spec, toy};
use device::{BACKEND, DEVICE, ENV};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longest wait for anything: a software driver compiles its shaders, on a busy machine in a minute.
const PATIENCE: Duration = Duration::from_mins(3);

fn config(folder: &Path, model_path: PathBuf) -> RunnerConfig {
    RunnerConfig {
        name: "test".to_owned(),
        served_name: "test".to_owned(),
        model_path,
        socket: folder.join("worker.sock"),
        context: ContextSpec { min_tokens: Some(512), max_tokens: Some(1024), parallel: 2, ..ContextSpec::default() },
        threads: 2,
        ..RunnerConfig::default()
    }
}

/// A worker process; killed when the test ends without having ended it.
struct Worker {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    log: PathBuf,
}

impl Worker {
    fn start(folder: &Path, arguments: &[&str], environment: &[(&str, &str)], input: &str) -> Self {
        let log = folder.join("worker.log");
        let mut child = Command::new(env!("CARGO_BIN_EXE_altiplano-agent"))
            .arg("runner")
            .args(arguments)
            .env_remove("GGML_VK_VISIBLE_DEVICES")
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).expect("a log file"))
            .spawn()
            .expect("the worker starts");
        let mut stdin = child.stdin.take().expect("standard input");
        // A worker that has failed already reads nothing.
        let _ = writeln!(stdin, "{input}");
        let stdout = BufReader::new(child.stdout.take().expect("standard output"));
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, stdin: Some(stdin), lines, log }
    }

    fn serve(folder: &Path, config: &RunnerConfig, environment: &[(&str, &str)]) -> Self {
        Self::start(folder, &[], environment, &serde_json::to_string(config).expect("JSON"))
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_else(|error| error.to_string())
    }

    /// The next line of standard output; `None` at its end.
    fn line(&self) -> Option<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the worker says nothing for minutes; its log:\n{}", self.log()),
        }
    }

    /// The next event that is no heartbeat.
    fn event(&self) -> Option<RunnerEvent> {
        loop {
            let line = self.line()?;
            match serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")) {
                RunnerEvent::Heartbeat { .. } => {}
                event => return Some(event),
            }
        }
    }

    /// How many requests run and wait, when that has changed.
    fn activity(&self) -> u32 {
        loop {
            match self.event() {
                Some(RunnerEvent::Activity { running, waiting }) => return running + waiting,
                // Nobody answers whether it may grow, which counts as a no.
                Some(RunnerEvent::Changed(_) | RunnerEvent::Growth { .. }) => {}
                other => panic!("{other:?}; the log:\n{}", self.log()),
            }
        }
    }

    fn ready(&self) -> RunnerReport {
        let mut last = 0;
        loop {
            match self.event() {
                Some(RunnerEvent::Loading { percent }) => {
                    assert!(percent >= last, "{percent} after {last}");
                    last = percent;
                }
                Some(RunnerEvent::Ready(report)) => return report,
                other => panic!("{other:?} instead of Ready; the log:\n{}", self.log()),
            }
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
        rustix::process::kill_process(id, signal).expect("the signal is sent");
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the child's status") {
                return status;
            }
            assert!(Instant::now() < deadline, "the worker does not end; its log:\n{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks a worker over its socket.
async fn post(socket: &Path, path: &str, body: &Value) -> (u16, Value) {
    let exchange = async {
        let stream = tokio::net::UnixStream::connect(socket).await.expect("the socket accepts");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(connection);
        let request = hyper::Request::post(path)
            .header("host", "worker")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .expect("a request");
        let response = sender.send_request(request).await.expect("a response");
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.expect("a body").to_bytes();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    };
    tokio::time::timeout(PATIENCE, exchange).await.expect("an answer within minutes")
}

fn chat(question: &str) -> Value {
    json!({"model": "test", "temperature": 0, "messages": [{"role": "user", "content": question}]})
}

/// Asks a question whose answer is known.
async fn check_answer(socket: &Path) {
    let question = toy::questions().into_iter().find(|question| question.messages.len() == 1).expect("a question");
    let (status, body) = post(socket, "/v1/chat/completions", &chat(&question.messages[0].content)).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["choices"][0]["message"]["content"], question.answer, "{body}");
    assert_eq!(body["choices"][0]["finish_reason"], "stop", "{body}");
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_worker_serves_until_it_is_told_to_end() {
    let folder = folder();
    let config = config(folder.path(), toy::path());
    let mut worker = Worker::serve(folder.path(), &config, &[]);
    let report = worker.ready();
    assert_eq!((report.context_tokens, report.max_tokens, report.parallel), (512, 1024, 2));
    assert_eq!((report.layers_offloaded, report.layers_total), (0, 5));
    let mode = fs::metadata(&config.socket).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "only this user may connect");
    check_answer(&config.socket).await;

    // From nobody to somebody and back is told at once.
    let mut seen = Vec::new();
    while seen.last() != Some(&0) {
        seen.push(worker.activity());
    }
    assert_eq!(seen.first(), Some(&1), "{seen:?}");

    // A request that runs when the signal comes still gets its whole answer.
    let socket = config.socket.clone();
    let long = tokio::spawn(async move { post(&socket, "/v1/chat/completions", &chat(toy::LONG_QUESTION)).await });
    assert_eq!(worker.activity(), 1);
    worker.signal(rustix::process::Signal::TERM);
    let (status, body) = long.await.expect("an answer");
    assert_eq!((status, &body["choices"][0]["finish_reason"]), (200, &json!("stop")), "{body}");
    let status = worker.wait();
    assert_eq!(status.code(), Some(0), "{status}: {}", worker.log());
    assert!(!config.socket.exists(), "the socket is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_worker_ends_with_its_agent() {
    let folder = folder();
    let config = config(folder.path(), toy::path());
    let mut worker = Worker::serve(folder.path(), &config, &[]);
    worker.ready();
    let socket = config.socket.clone();
    let endless =
        tokio::spawn(async move { post(&socket, "/v1/chat/completions", &chat(toy::ENDLESS_QUESTION)).await });
    assert_eq!(worker.activity(), 1);
    drop(worker.stdin.take());
    let status = worker.wait();
    assert!(status.success(), "{status}: {}", worker.log());
    // Whatever it got, it got an end.
    drop(endless.await);
}

#[test]
fn a_worker_that_cannot_start_says_why() {
    let folder = folder();
    let path = folder.path().join("bad.gguf");
    for (bad, reason, words) in [
        (BadFile::NotGguf, "LoadFailed", "magic"),
        (BadFile::Truncated, "LoadFailed", "not within the file bounds"),
        (BadFile::UnknownArchitecture, "UnknownArchitecture", "guana"),
    ] {
        bad.write(&Spec::default(), &path).expect("a bad file");
        let config = config(folder.path(), path.clone());
        for arguments in [&[][..], &["--estimate"][..]] {
            let input = serde_json::to_string(&config).expect("JSON");
            let mut worker = Worker::start(folder.path(), arguments, &[], &input);
            let failure = std::iter::from_fn(|| worker.event()).last();
            let Some(RunnerEvent::Failed(failure)) = failure else { panic!("{bad:?} {arguments:?}: {failure:?}") };
            assert_eq!(failure.reason, reason, "{bad:?}: {failure:?}");
            assert!(failure.message.contains(words), "{bad:?}: {failure:?}");
            assert_eq!(worker.wait().code(), Some(1));
        }
    }

    let mut worker = Worker::start(folder.path(), &[], &[], "{\"uid\": 7}");
    let Some(RunnerEvent::Failed(failure)) = worker.event() else { panic!("no failure: {}", worker.log()) };
    assert_eq!(failure.reason, "InvalidConfig", "{failure:?}");
    assert_eq!(worker.wait().code(), Some(1));
}

/// llama.cpp aborts on some files. That ends the worker and nobody else, and its log says why.
#[test]
fn a_file_that_aborts_llama_cpp_ends_only_its_worker() {
    let folder = folder();
    let path = folder.path().join("bad.gguf");
    BadFile::NoLayers.write(&Spec::default(), &path).expect("a bad file");
    let mut worker = Worker::serve(folder.path(), &config(folder.path(), path), &[]);
    while let Some(event) = worker.event() {
        assert!(matches!(event, RunnerEvent::Loading { .. } | RunnerEvent::Failed(_)), "{event:?}");
    }
    let status = worker.wait();
    assert!(!status.success(), "{status}");
    if let Some(signal) = status.signal() {
        assert_eq!(signal, rustix::process::Signal::ABORT.as_raw(), "{status}");
        assert!(worker.log().contains("llama.cpp aborts"), "{}", worker.log());
    }
}

fn probe(environment: &[(&str, &str)]) -> ProbeReport {
    let folder = folder();
    let mut worker = Worker::start(folder.path(), &["--probe"], environment, "");
    let line = worker.line().unwrap_or_else(|| panic!("no report: {}", worker.log()));
    assert!(worker.wait().success(), "{}", worker.log());
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

#[test]
fn the_probe_lists_devices() {
    let report = probe(&[]);
    assert_eq!(report.devices.last().map(|device| device.id.as_str()), Some("CPU"), "{report:?}");
    let report = probe(&ENV);
    let [gpu, cpu] = report.devices.as_slice() else {
        panic!("a GPU is needed, of which Mesa's driver (mesa-vulkan-drivers) is one: llama.cpp sees {report:?}");
    };
    assert_eq!((gpu.id.as_str(), gpu.backend.as_str(), gpu.kind.as_str()), (DEVICE, BACKEND, "GPU"), "{gpu:?}");
    assert!(gpu.memory_total_bytes > 1 << 28 && gpu.memory_free_bytes > 0, "{gpu:?}");
    assert!(!gpu.driver.is_empty(), "{gpu:?}");
    assert_eq!((cpu.id.as_str(), report.backends.as_slice()), ("CPU", &[BACKEND.to_owned(), "CPU".to_owned()][..]));

    // A second look says the same of everything but what is free.
    let folder = folder();
    let known = serde_json::to_string(&report).expect("JSON");
    let mut worker = Worker::start(folder.path(), &["--look"], &ENV, &known);
    let line = worker.line().unwrap_or_else(|| panic!("no report: {}", worker.log()));
    assert!(worker.wait().success(), "{}", worker.log());
    let again: ProbeReport = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let but_free = |report: &ProbeReport| {
        let devices = report.devices.iter().map(|device| ProbedDevice { memory_free_bytes: 0, ..device.clone() });
        devices.collect::<Vec<_>>()
    };
    assert_eq!(but_free(&again), but_free(&report));
    assert!(again.devices[0].memory_free_bytes > 0, "{again:?}");
}

/// A device that has gone is no longer on the list, and what cannot be read is refused.
#[test]
fn a_look_at_what_is_not_there() {
    let folder = folder();
    let gone =
        ProbedDevice { id: "CUDA9".to_owned(), kind: "GPU".to_owned(), unopened: true, ..ProbedDevice::default() };
    let known = ProbeReport { backends: vec!["CUDA".to_owned()], devices: vec![gone] };
    let mut worker = Worker::start(folder.path(), &["--look"], &[], &serde_json::to_string(&known).expect("JSON"));
    let line = worker.line().unwrap_or_else(|| panic!("no report: {}", worker.log()));
    assert!(worker.wait().success(), "{}", worker.log());
    let report: ProbeReport = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert!(report.devices.iter().all(|device| device.id != "CUDA9"), "{report:?}");
    assert_eq!(report.devices.last().map(|device| device.id.as_str()), Some("CPU"), "{report:?}");

    let mut worker = Worker::start(folder.path(), &["--look"], &[], "[1]");
    let line = worker.line().unwrap_or_else(|| panic!("no failure: {}", worker.log()));
    assert!(line.contains("InvalidConfig"), "{line}");
    assert!(!worker.wait().success());
}

/// A projector goes where its model goes, is counted there before and after, and says the same there.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_projector_goes_to_a_gpu() {
    let folder = folder();
    let path = folder.path().join("mmproj.gguf");
    let bytes = Projector::of_toy(ProjectorKind::Gemma3).write(&path).expect("a projector");
    let mut said = Vec::new();
    for (device, environment) in [("CPU", &[] as &[_]), (DEVICE, &ENV)] {
        let config = RunnerConfig {
            devices: vec![device.to_owned()],
            projector: Some(path.clone()),
            engine: EngineSpec {
                batch_tokens: Some(16),
                micro_batch_tokens: Some(16),
                flash_attention: FlashAttention::Off,
                ..EngineSpec::default()
            },
            ..config(folder.path(), toy::path())
        };
        let input = serde_json::to_string(&config).expect("JSON");
        let estimator = Worker::start(folder.path(), &["--estimate"], environment, &input);
        let line = estimator.line().unwrap_or_else(|| panic!("no estimate: {}", estimator.log()));
        let estimate: EstimateReport = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        drop(estimator);
        let input = serde_json::to_string(&RunnerConfig { projector: None, ..config.clone() }).expect("JSON");
        let estimator = Worker::start(folder.path(), &["--estimate"], environment, &input);
        let line = estimator.line().unwrap_or_else(|| panic!("no estimate: {}", estimator.log()));
        let without: EstimateReport = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        drop(estimator);
        let mut worker = Worker::serve(folder.path(), &config, environment);
        let report = worker.ready();
        let weights = |memory: &[MemoryUse]| {
            memory.iter().find(|memory| memory.device == device).map_or(0, |memory| memory.weights_bytes)
        };
        assert_eq!(weights(&estimate.memory), weights(&report.memory), "{estimate:?} {report:?}");
        let projector = weights(&estimate.memory) - weights(&without.memory);
        assert!(projector > bytes / 2, "{device}: {projector} of {bytes}: {estimate:?} {without:?}");

        let image =
            "data:image/bmp;base64,Qk06AAAAAAAAADYAAAAoAAAAAQAAAAEAAAABABgAAAAAAAQAAAAAAAAAAAAAAAAAAAAAAAAA/wAAAA==";
        let part = json!({"type": "image_url", "image_url": {"url": image}});
        let messages = json!([{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]);
        let body = json!({
            "model": "test", "temperature": 0, "max_tokens": 1, "logprobs": true, "top_logprobs": 5, "messages": messages,
        });
        let (status, answer) = post(&config.socket, "/v1/chat/completions", &body).await;
        assert_eq!(status, 200, "{answer}; {}", worker.log());
        let top = answer["choices"][0]["logprobs"]["content"][0]["logprob"].as_f64();
        said.push(top.unwrap_or_else(|| panic!("{answer}")));
        check_answer(&config.socket).await;
        worker.signal(rustix::process::Signal::TERM);
        assert_eq!(worker.wait().code(), Some(0), "{}", worker.log());
    }
    assert!((said[0] - said[1]).abs() < 0.2, "the CPU and the GPU say the same: {said:?}");
}

/// Of a file of which only the header is there, the dry run says the same.
#[test]
fn an_estimate_needs_the_header_alone() {
    let folder = folder();
    let whole = folder.path().join("whole.gguf");
    let size = Spec { layers: 4, embd: 512, heads: 8, ff: 2048, ..Spec::default() }.write(&whole).expect("a model");
    let header = folder.path().join("header.gguf");
    let bytes = std::fs::read(&whole).expect("the file");
    std::fs::write(&header, &bytes[..1 << 18]).expect("a file");
    let file = std::fs::OpenOptions::new().write(true).open(&header).expect("the file");
    file.set_len(size).expect("a hole");
    assert!(size > 1 << 23, "{size}");
    for (device, environment) in [("CPU", &[] as &[_]), (DEVICE, &ENV)] {
        let estimate = |path: &Path| -> Vec<MemoryUse> {
            let config = RunnerConfig { devices: vec![device.to_owned()], ..config(folder.path(), path.to_path_buf()) };
            let input = serde_json::to_string(&config).expect("JSON");
            let estimator = Worker::start(folder.path(), &["--estimate"], environment, &input);
            let line = estimator.line().unwrap_or_else(|| panic!("no estimate: {}", estimator.log()));
            let report: EstimateReport = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
            // The process itself takes a little more or less each time.
            report.memory.into_iter().map(|part| MemoryUse { other_bytes: 0, ..part }).collect()
        };
        let (by_header, by_file) = (estimate(&header), estimate(&whole));
        assert_eq!(by_header, by_file);
        assert!(by_file.iter().any(|part| part.device == device && part.weights_bytes > 1 << 22), "{by_file:?}");
    }
}

/// All layers, and some of them, on a GPU: what was estimated is what is measured, and the answer is right.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn layers_go_to_a_gpu() {
    for (gpu_layers, offloaded) in [(None, 5), (Some(2), 2), (Some(0), 0)] {
        let folder = folder();
        let config = RunnerConfig {
            devices: vec![DEVICE.to_owned()],
            gpu_layers,
            // Small batches and no flash attention need few shaders, and compiling those is what takes the time here.
            engine: EngineSpec {
                batch_tokens: Some(8),
                micro_batch_tokens: Some(8),
                flash_attention: FlashAttention::Off,
                ..EngineSpec::default()
            },
            ..config(folder.path(), toy::path())
        };
        let input = serde_json::to_string(&config).expect("JSON");
        let estimator = Worker::start(folder.path(), &["--estimate"], &ENV, &input);
        let line = estimator.line().unwrap_or_else(|| panic!("no estimate: {}", estimator.log()));
        let estimate: EstimateReport = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        drop(estimator);

        let mut worker = Worker::serve(folder.path(), &config, &ENV);
        let report = worker.ready();
        assert_eq!((report.layers_offloaded, report.layers_total), (offloaded, 5), "{report:?}");
        assert_eq!((estimate.layers_offloaded, estimate.layers_total), (offloaded, 5));
        assert_eq!(estimate.memory.len(), report.memory.len(), "{estimate:?} {report:?}");
        for (predicted, measured) in estimate.memory.iter().zip(&report.memory) {
            // The dry run cannot know how the driver aligns a compute buffer.
            let difference = predicted.compute_bytes.abs_diff(measured.compute_bytes);
            assert!(difference <= 4096, "{predicted:?} {measured:?}");
            // And what the process itself takes of host memory differs a little from one to the next.
            let difference = predicted.other_bytes.abs_diff(measured.other_bytes);
            assert!(difference < 16 << 20, "{predicted:?} {measured:?}");
            let predicted = MemoryUse {
                compute_bytes: measured.compute_bytes,
                other_bytes: measured.other_bytes,
                mapped_bytes: measured.mapped_bytes,
                ..predicted.clone()
            };
            assert_eq!(&predicted, measured, "{gpu_layers:?}");
        }
        let gpu = report.memory.iter().find(|memory| memory.device == DEVICE);
        let (weights, context) = gpu.map(|gpu| (gpu.weights_bytes, gpu.context_bytes)).unwrap_or_default();
        // All but the token embeddings, which stay on the host; the output layer is tied to them.
        match offloaded {
            0 => assert_eq!((weights, context), (0, 0), "{report:?}"),
            2 => assert!((200_000..1_500_000).contains(&weights) && context > 0, "{report:?}"),
            _ => assert!(weights > 1_500_000 && context > 0, "{report:?}"),
        }
        check_answer(&config.socket).await;
        worker.signal(rustix::process::Signal::TERM);
        assert_eq!(worker.wait().code(), Some(0), "{}", worker.log());
    }
}

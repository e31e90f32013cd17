//! What goes wrong on a node, done to real workers: the one it happens to says so and comes back, the others serve on.
#![expect(clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use altiplano_test_models::{Spec, toy};
use futures::StreamExt as _;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use support::{Agent, PATIENCE, chat, command, deployment, free_address, gone, is_alive, kill, source, workers};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// An agent with `toy`, whose file is the test's own, and `other`; and the worker of `toy`.
async fn agent() -> (Agent, Pid, PathBuf, TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("toy.gguf");
    std::fs::copy(toy::path(), &file).expect("a copy");
    let stays = ", unload: {policy: Never}";
    let models = [("toy", file.as_path(), stays), ("other", &toy::path(), stays)];
    let agent = Agent::start(&[], &["serve"], &models, &["--hang-seconds", "10"], &[]).await;
    agent.ready("toy", 1).await;
    agent.ready("other", 1).await;
    let worker = worker(&agent, &file);
    (agent, worker, file, folder)
}

/// The process that has this file mapped.
fn worker(agent: &Agent, file: &Path) -> Pid {
    let maps = |pid: &Pid| std::fs::read_to_string(format!("/proc/{}/maps", pid.as_raw_nonzero())).unwrap_or_default();
    let found: Vec<_> =
        workers(agent.pid()).into_iter().filter(|pid| maps(pid).contains(&file.display().to_string())).collect();
    match found[..] {
        [pid] => pid,
        _ => panic!("{found:?} for {}; {}", file.display(), agent.story()),
    }
}

fn endless(model: &str) -> Value {
    let mut body = chat(model, toy::ENDLESS_QUESTION);
    body["stream"] = json!(true);
    body
}

/// A process that is stopped has no end that anybody sees: its silence tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_stopped_is_found_out_and_replaced() {
    let (agent, stopped, _file, _folder) = agent().await;
    let mut stream = agent.post(&endless("toy")).await.expect("an answer").bytes_stream();
    stream.next().await.expect("a first part").expect("bytes");
    kill(stopped, Signal::STOP);
    let mut text = String::new();
    while let Some(part) = stream.next().await {
        text.push_str(&String::from_utf8_lossy(&part.expect("the stream is not cut")));
    }
    assert!(text.contains("worker_exited"), "no error event: …{}", &text[text.len().saturating_sub(300)..]);
    gone(stopped).await;
    agent.says("(WorkerHung)").await;
    agent.check("other").await;
    agent.ready("toy", 2).await;
    agent.check("toy").await;
}

/// What llama.cpp does when an assertion of its own fails: the worker ends by SIGABRT in the middle of a stream. That stream ends
/// with an error event, one of another model goes on as if nothing had been, and the model is back, with the reason told.
#[tokio::test(flavor = "multi_thread")]
async fn an_abort_in_the_middle_of_a_stream_ends_that_stream_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("toy.gguf");
    std::fs::copy(toy::path(), &file).expect("a copy");
    // llama.cpp warns that this is more than the model was trained with: the last that it says.
    let large = ", unload: {policy: Never}, \
                 context: {minTokens: 8192, maxTokens: 8192, parallel: 1, rope: {scaling: Linear, factor: 4}}";
    let models = [("toy", file.as_path(), large), ("other", &toy::path(), ", unload: {policy: Never}")];
    let agent = Agent::start(&[], &["serve"], &models, &[], &[]).await;
    agent.ready("toy", 1).await;
    agent.ready("other", 1).await;
    let aborts = worker(&agent, &file);
    let mut other = agent.post(&endless("other")).await.expect("an answer").bytes_stream();
    other.next().await.expect("a first part").expect("bytes");
    let mut body = endless("toy");
    body["ignore_eos"] = json!(true);
    let mut stream = agent.post(&body).await.expect("an answer").bytes_stream();
    stream.next().await.expect("a first part").expect("bytes");
    kill(aborts, Signal::ABORT);
    let mut text = String::new();
    while let Some(part) = stream.next().await {
        text.push_str(&String::from_utf8_lossy(&part.expect("the stream is not cut")));
    }
    let end = &text[text.len().saturating_sub(400)..];
    assert!(end.contains("event: error") || end.contains("\"error\""), "no error event: …{end}");
    assert!(end.contains("worker_exited"), "no reason: …{end}");
    gone(aborts).await;
    agent.says("(WorkerExited)").await;
    let said = agent.said();
    let line = said.lines().find(|line| line.contains("(WorkerExited)")).expect("it was there");
    assert!(line.starts_with("default/toy: ") && line.contains("was killed by SIGABRT: "), "{line}");
    assert!(line.contains("n_ctx_train"), "llama.cpp's last lines are told: {line}");
    // The other's stream lives, in the same worker.
    other.next().await.expect("another part").expect("bytes");
    drop(other);
    agent.check("other").await;
    agent.ready("toy", 2).await;
    assert_eq!(agent.ask("toy", "Hello!").await.0, 200);
    assert_ne!(worker(&agent, &file), aborts);
}

/// Whoever asks for the same again does not take a third worker along, and everybody else's answers with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_ended_two_workers_is_refused() {
    let (agent, mut worker_of_toy, file, _folder) = agent().await;
    for nth in 2..=3 {
        let mut stream = agent.post(&endless("toy")).await.expect("an answer").bytes_stream();
        stream.next().await.expect("a first part").expect("bytes");
        kill(worker_of_toy, Signal::KILL);
        while let Some(Ok(_)) = stream.next().await {}
        agent.ready("toy", nth).await;
        worker_of_toy = worker(&agent, &file);
    }
    let refused = agent.post(&endless("toy")).await.expect("an answer");
    let (status, error) = (refused.status().as_u16(), refused.json::<Value>().await.expect("JSON"));
    assert_eq!(status, 422, "{error}");
    assert!(error["error"]["message"].as_str().is_some_and(|message| message.contains("worker")), "{error}");
    // Others go on, and the worker with them.
    agent.check("toy").await;
    assert_eq!(worker(&agent, &file), worker_of_toy);
}

/// Weights are mapped: a file cut short under a worker ends it, and what it is now is said until it is whole again.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_spoilt_under_a_worker_is_said_and_its_return_found() {
    let (agent, ends, file, _folder) = agent().await;
    agent.check("toy").await;
    let whole = std::fs::read(&file).expect("the file");
    let handle = std::fs::OpenOptions::new().write(true).open(&file).expect("the file");
    handle.set_len(4096).expect("it is cut");
    // The next page that it reads is not there.
    let _ = agent.post(&chat("toy", "Hello!")).await;
    gone(ends).await;
    agent.line("default/toy: Failed (", 1).await;
    agent.check("other").await;
    std::fs::write(&file, whole).expect("the file is whole again");
    agent.ready("toy", 2).await;
    agent.check("toy").await;
}

/// A file replaced in whole leaves the worker its own; the next load reads the new one, and says what is wrong with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_file_swapped_in_fails_the_next_load_alone() {
    let (agent, lives, file, folder) = agent().await;
    let corrupt = folder.path().join("corrupt.gguf");
    let mut bytes = std::fs::read(&file).expect("the file");
    // The header's counts of tensors and of keys.
    bytes[8..24].fill(0xff);
    std::fs::write(&corrupt, &bytes).expect("a file");
    std::fs::rename(&corrupt, &file).expect("it takes the other's place");
    agent.check("toy").await;
    kill(lives, Signal::KILL);
    let line = agent.line("default/toy: Failed (", 1).await;
    assert!(line.len() > "default/toy: Failed (".len() + 20, "it says nothing: {line}");
    agent.check("other").await;
    std::fs::copy(toy::path(), &corrupt).expect("a copy");
    std::fs::rename(&corrupt, &file).expect("the good one is back");
    agent.ready("toy", 2).await;
    agent.check("toy").await;
}

/// Serves the file: half of it, then the rest when `go` is true.
async fn halting_server(file: &Path, go: watch::Receiver<bool>) -> String {
    let body: Arc<[u8]> = std::fs::read(file).expect("the file").into();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/toy.gguf", listener.local_addr().expect("an address"));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (body, mut go) = (Arc::clone(&body), go.clone());
            tokio::spawn(async move {
                let mut request = [0; 8192];
                let _ = stream.read(&mut request).await;
                let (half, rest) = body.split_at(body.len() / 2);
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
                // A client that hangs up is as good.
                let _ = stream.write_all(head.as_bytes()).await;
                let _ = stream.write_all(half).await;
                let _ = go.wait_for(|go| *go).await;
                let _ = stream.write_all(rest).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    url
}

/// A disk that others fill while a file arrives: that is said with the numbers, what has arrived gives its room back, the
/// other model serves on, and the file comes when there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_fails_the_download_until_there_is_room() {
    let (release, go) = watch::channel(false);
    let url = halting_server(&toy::path(), go).await;
    let folder = tempfile::tempdir().expect("a folder");
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).expect("a folder");
    // A file system of its own, seen by the agent alone. The store leaves 64 MiB free for others.
    let mount = format!("mount -t tmpfs -o size=72m tmpfs {} && exec \"$@\"", disk.display());
    let prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", &mount, "sh"];
    let file = folder.path().join("models.yaml");
    let models = [
        deployment("toy", &format!("{{source: {{uri: '{url}'}}}}")),
        deployment("other", &format!("{{source: {}}}", source(&toy::path()))),
    ];
    std::fs::write(&file, models.join("---\n")).expect("the file is written");
    let shared = free_address();
    let mut command = command();
    let agent = {
        let program = command.get_program().to_owned();
        command = std::process::Command::new(prefix[0]);
        command.args(&prefix[1..]).arg(program).arg("serve").arg(&file).args(["--listen", &shared.to_string()]);
        command.arg("--state-dir").arg(&disk).args(["--allow-http", "--allow-private-networks"]);
        Agent::spawn(&mut command, shared, folder)
    };
    agent.answers().await;
    agent.ready("other", 1).await;

    let seen = PathBuf::from(format!("/proc/{}/root{}", agent.pid().as_raw_nonzero(), disk.display()));
    let store = seen.join("models");
    let names = || -> Vec<String> {
        let all = std::fs::read_dir(&store).expect("the store");
        all.flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name != "lock")
            .collect()
    };
    let half = std::fs::metadata(toy::path()).expect("the file").len() / 2;
    let arrived = || {
        let partial = names().into_iter().find(|name| Path::new(name).extension().is_some_and(|e| e == "partial"));
        partial.and_then(|name| std::fs::metadata(store.join(name)).ok()).map_or(0, |metadata| metadata.len())
    };
    agent.until("half of the file", || async { arrived() >= half }).await;
    fill(&seen.join("filler"));
    release.send_replace(true);
    let line = agent.line("default/toy: Failed (InsufficientStorage): ", 1).await;
    assert!(line.contains("bytes are needed and ") && line.contains("(the file system)"), "{line}");
    agent.until("nothing half is left", || async { names().is_empty() }).await;
    agent.check("other").await;

    std::fs::remove_file(seen.join("filler")).expect("room");
    agent.ready("toy", 1).await;
    agent.check("toy").await;
}

/// Writes until nothing more fits.
fn fill(path: &Path) {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path).expect("a file");
    let mut size = 1 << 20;
    while size > 0 {
        // Smaller and smaller pieces: the last one is a byte.
        if file.write_all(&vec![0; size]).is_err() {
            size /= 2;
        }
    }
}

/// A control group of this test's own for an agent's memory, of version 2 or 1. Needs root, as in a container that may
/// make groups.
struct Group {
    dir: PathBuf,
    limit: &'static str,
}

impl Group {
    fn new() -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let v2 = root.join("cgroup.controllers").is_file();
        let (parent, limit) =
            if v2 { (root.to_path_buf(), "memory.max") } else { (root.join("memory"), "memory.limit_in_bytes") };
        let dir = parent.join(format!("altiplano-test-{}", std::process::id()));
        if v2 {
            let _ = std::fs::write(root.join("cgroup.subtree_control"), "+memory");
        }
        std::fs::create_dir(&dir).unwrap_or_else(|error| {
            panic!("this test makes a control group, which takes root and a writable {}: {error}", parent.display())
        });
        Self { dir, limit }
    }

    fn set_limit(&self, bytes: u64) {
        std::fs::write(self.dir.join(self.limit), bytes.to_string()).expect("the limit is set");
    }

    /// Bytes of anonymous memory of all processes in it.
    fn used(&self) -> u64 {
        let stat = std::fs::read_to_string(self.dir.join("memory.stat")).expect("memory.stat");
        let value = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value("anon ").or_else(|| value("total_rss ")).expect("what is used")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while std::fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The kernel would end all of a container; the agent ends the worst worker before that, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn the_worst_worker_is_ended_below_the_memory_limit() {
    let folder = tempfile::tempdir().expect("a folder");
    // 4 KiB a token: 512 MiB of KV.
    let large = Spec { layers: 8, embd: 256, heads: 4, kv_heads: 2, context: 131_072, ..Spec::default() };
    let file = folder.path().join("large.gguf");
    large.write(&file).expect("a model file");
    let more = ", unload: {policy: Never}, engine: {gpu: Never}, context: {sizing: Fixed, parallel: 1}";
    let group = Group::new();
    group.set_limit(4 << 30);
    let join = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", group.dir.display());
    let models = [("large", file.as_path(), more), ("toy", &toy::path(), ", unload: {policy: Never}")];
    let agent = Agent::start(&["sh", "-c", &join, "sh"], &["serve"], &models, &[], &[]).await;
    agent.ready("large", 1).await;
    agent.ready("toy", 1).await;
    let (ends, stays) = (worker(&agent, &file), worker(&agent, &toy::path()));
    assert!(group.used() > 500 << 20, "{}", group.used());

    // Files need some as well; what is left is below an eighth and below 64 MiB.
    group.set_limit(group.used() + (60 << 20));
    gone(ends).await;
    agent.says("(OutOfMemory)").await;
    let said = agent.said();
    let line = said.lines().find(|line| line.contains("(OutOfMemory)")).expect("it was there");
    // As of its last sign of life, which may be of before it had taken all of it.
    let held = line.split("this worker held ").nth(1).and_then(|rest| rest.split("Mi").next()?.parse().ok());
    assert!(line.starts_with("default/large: ") && held > Some(64), "{line}");
    assert!(is_alive(stays), "the other one stays");
    agent.check("toy").await;

    group.set_limit(4 << 30);
    agent.ready("large", 2).await;
    drop(agent);
}

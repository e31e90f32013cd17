//! The official SDKs against one `altiplano-agent serve` with the toy model, whose greedy answers are known: each
//! endpoint, streaming and not, tools, thinking, structured output, errors by their classes. The scripts are in
//! `tests/clients`; each ends with `ok` or with what it saw instead.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use altiplano_test_models::{Projector, ProjectorKind, toy};
use altiplano_tests::{Proc, node, node_modules, program, python, repository, sandbox, wait_for};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

/// Longest wait for the agent and for a script; what is usual is a tenth of it.
const PATIENCE: Duration = Duration::from_mins(2);

/// The toy model, the same with a template that has tools, with one that has it think, and with random projectors.
const TOY: &str = "toy";
const TOOLS: &str = "tools";
const THINKS: &str = "thinks";
const EYES: &str = "eyes";
const EARS: &str = "ears";

const QUESTION: &str = "What can you do?";
const ANSWER: &str =
    "I can answer a few questions about llamas, the altiplano, Kubernetes and GPUs, add small numbers and count.";

/// A served model.
struct Served {
    /// Kept for its log; it ends with this process.
    proc: Proc,
    url: String,
}

/// The agent that all tests of this file ask.
async fn served() -> Result<&'static Served> {
    static SERVED: OnceCell<Served> = OnceCell::const_new();
    SERVED.get_or_try_init(serve).await
}

async fn serve() -> Result<Served> {
    let folder = sandbox::subdir("clients")?;
    let models = folder.join("models.yaml");
    let template = |name: &str| {
        let text = std::fs::read_to_string(repository().join("agent/tests/templates").join(name))?;
        anyhow::Ok(json!({"chatTemplate": text}))
    };
    let deployment = |name: &str, mut model: Value| {
        model["source"] = json!({"uri": format!("file://{}", toy::path().display())});
        json!({
            "apiVersion": "altiplano.dev/v1alpha1",
            "kind": "ModelDeployment",
            "metadata": {"name": name},
            "spec": {"model": model, "unload": {"policy": "Never"}},
        })
    };
    // The toy model's own template has no place for tools.
    let projector = |name: &str, kind| {
        let path = folder.join(name);
        Projector::of_toy(kind).write(&path)?;
        anyhow::Ok(json!({"projector": {"uri": format!("file://{}", path.display())}}))
    };
    let all = [
        deployment(TOY, json!({})),
        deployment(TOOLS, template("hermes.jinja")?),
        deployment(THINKS, template("deepseek-r1.jinja")?),
        deployment(EYES, projector("eyes.gguf", ProjectorKind::Gemma3)?),
        deployment(EARS, projector("ears.gguf", ProjectorKind::Ultravox)?),
    ];
    // JSON is YAML.
    std::fs::write(&models, all.map(|one| one.to_string()).join("\n---\n"))?;
    let mut command = Command::new(program("altiplano-agent")?);
    command.arg("serve").arg(&models).args(["--listen", "127.0.0.1:0", "--state-dir"]).arg(folder.join("state"));
    let proc = Proc::start("clients-agent", command)?;
    let url = wait_for("all models are ready", PATIENCE, || async {
        let log = proc.log();
        let ready = |name| log.contains(&format!("default/{name}: Ready as"));
        ensure!([TOY, TOOLS, THINKS, EYES, EARS].into_iter().all(ready), "{log}");
        let line = log.lines().find_map(|line| line.strip_prefix("listening on ")).context("no address")?;
        Ok(line.trim_end_matches("/v1").to_owned())
    })
    .await?;
    Ok(Served { proc, url })
}

/// Runs a script of `tests/clients` with the interpreter that its name asks for.
async fn runs(script: &str, arguments: &[&str]) -> Result<()> {
    let Served { proc, url } = served().await?;
    let (program, script) = interpreter(&repository().join("tests/clients").join(script))?;
    let output = tokio::process::Command::new(&program)
        .arg(&script)
        .arg(url)
        .args(arguments)
        // The SDKs look for proxies and endpoints in the environment.
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PATIENCE, output).await.with_context(|| format!("{} hangs", script.display()))?;
    let output = output.with_context(|| format!("could not start {}", program.display()))?;
    let (said, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(
        output.status.success() && said.trim_end().ends_with("ok"),
        "{}: {said}{log}\n{}",
        script.display(),
        proc.log_tail()
    );
    Ok(())
}

/// What runs a script, and where: Node.js looks for packages beside the script.
fn interpreter(script: &Path) -> Result<(PathBuf, PathBuf)> {
    if script.extension().is_some_and(|extension| extension == "py") {
        return Ok((python()?, script.to_path_buf()));
    }
    let folder = sandbox::subdir("js")?;
    let copy = folder.join(script.file_name().context("a script without name")?);
    std::fs::copy(script, &copy)?;
    std::os::unix::fs::symlink(node_modules()?, folder.join("node_modules"))?;
    Ok((node()?, copy))
}

const CHAT: [&str; 3] = [TOY, QUESTION, ANSWER];

#[tokio::test]
async fn openai_for_python() -> Result<()> {
    runs("openai_chat.py", &CHAT).await?;
    runs("openai_responses.py", &CHAT).await?;
    runs("openai_tools.py", &[TOOLS]).await
}

#[tokio::test]
async fn anthropic_for_python() -> Result<()> {
    runs("anthropic_messages.py", &CHAT).await?;
    runs("anthropic_tools.py", &[TOOLS]).await?;
    runs("anthropic_thinking.py", &[THINKS]).await
}

#[tokio::test]
async fn ollama_for_python() -> Result<()> {
    runs("ollama_chat.py", &CHAT).await?;
    runs("ollama_tools.py", &[TOOLS, THINKS]).await
}

#[tokio::test]
async fn images_for_python() -> Result<()> {
    for script in ["openai_images.py", "anthropic_images.py", "ollama_images.py"] {
        runs(script, &[EYES, TOY]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn audio_for_python() -> Result<()> {
    for script in ["openai_audio.py", "ollama_audio.py"] {
        runs(script, &[EARS, TOY]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn openai_for_javascript() -> Result<()> {
    runs("js/openai.mjs", &CHAT).await
}

#[tokio::test]
async fn anthropic_for_javascript() -> Result<()> {
    runs("js/anthropic.mjs", &CHAT).await
}

#[tokio::test]
async fn tools_for_javascript() -> Result<()> {
    runs("js/tools.mjs", &[TOOLS]).await
}

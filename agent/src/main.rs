//! The agent's binary: parse, log, run, exit code. Everything else is in the library.

use std::process::ExitCode;

use altiplano_agent::client::{self, ChatArgs};
use altiplano_agent::node::role::{self, NodeArgs};
use altiplano_agent::runner::adopt;
use altiplano_agent::runner::child::{self, Mode};
use altiplano_agent::runner::init::{self, InitArgs};
use altiplano_agent::serve::{self, ServeArgs};
use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Threads of the runtime: the agent moves bytes, the workers work.
const THREADS: usize = 2;

/// Loads llama.cpp models onto this machine's devices and serves them over an OpenAI-compatible API.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// What to run as.
    #[command(subcommand)]
    role: Role,

    /// Form of the log on standard error.
    #[arg(long, env = "ALTIPLANO_LOG_FORMAT", default_value = "text", global = true)]
    log_format: LogFormat,

    /// Filter of the log, such as `info` or `info,altiplano_agent=debug`.
    // kube's client logs every failed call as an error, and so does who made the call.
    #[arg(long, env = "ALTIPLANO_LOG", default_value = "info,kube_client::client::builder=off", global = true)]
    log: String,
}

#[derive(Subcommand)]
enum Role {
    /// The agent of a node of a Kubernetes cluster.
    Node(NodeArgs),
    /// Serve models from ModelDeployment files on this machine, without Kubernetes.
    Serve(ServeArgs),
    /// Talk to a model that is served somewhere.
    Chat(ChatArgs),
    /// Run the agent as a child, and again when it dies; its workers live on and are taken over. For the first process
    /// of a container.
    Init(InitArgs),
    /// One model in one process; started by the agent.
    #[command(hide = true)]
    Runner(RunnerArgs),
}

#[derive(Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
struct RunnerArgs {
    /// Print the devices and end.
    #[arg(long, conflicts_with = "estimate")]
    probe: bool,

    /// With --probe: keep the devices open until standard input ends.
    #[arg(long, requires = "probe")]
    stay: bool,

    /// Print what is free of the devices on standard input and end.
    #[arg(long, conflicts_with_all = ["estimate", "probe"])]
    look: bool,

    /// Print what the model would take and end.
    #[arg(long)]
    estimate: bool,
    /// Print what changes of the context's size cost, for benchmarks
    #[arg(long, conflicts_with_all = ["estimate", "probe"])]
    measure_resizes: bool,
    /// Print how fast llama.cpp's bare calls are, for benchmarks
    #[arg(long, conflicts_with_all = ["estimate", "probe", "measure_resizes"])]
    measure_batches: bool,
}

impl RunnerArgs {
    fn mode(&self) -> Mode {
        match self {
            Self { probe: true, stay, .. } => Mode::Probe { stay: *stay },
            Self { look: true, .. } => Mode::Look,
            Self { estimate: true, .. } => Mode::Estimate,
            Self { measure_resizes: true, .. } => Mode::MeasureResizes,
            Self { measure_batches: true, .. } => Mode::MeasureBatches,
            Self { .. } => Mode::Serve,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let filter = EnvFilter::try_new(&cli.log).map_err(|error| anyhow::anyhow!("--log {:?}: {error}", cli.log))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    // A worker's log goes to its agent. Between the death of one and the next it goes nowhere, which is no error.
    let log = log.log_internal_errors(false);
    match cli.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    if let Role::Runner(args) = &cli.role {
        child::run(args.mode())?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Role::Init(args) = cli.role {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        return Ok(runtime.block_on(init::run(args))?);
    }
    // One provider for the API server's client and for downloads; nobody can have installed another yet.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    if let Role::Chat(args) = cli.role {
        // Ctrl-C ends it at once: no model depends on it.
        let result = runtime.block_on(client::run(args));
        runtime.shutdown_background();
        result?;
        return Ok(ExitCode::SUCCESS);
    }
    let result = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        stop_on_signal(shutdown.clone())?;
        tokio::spawn(async {
            adopt::init_died().await;
            tracing::error!("init has died; ending at once");
            std::process::exit(1);
        });
        match cli.role {
            Role::Node(args) => role::run(args, shutdown).await?,
            Role::Serve(args) => serve::run(args, shutdown).await?,
            Role::Chat(_) | Role::Runner(_) | Role::Init(_) => {}
        }
        anyhow::Ok(())
    });
    // A blocking task (such as hashing a file) must not hold up the end.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

/// The first SIGTERM or SIGINT asks for a graceful end, the second ends at once: the workers end with their agent.
fn stop_on_signal(shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        for is_first in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if is_first {
                tracing::info!("draining; a second signal ends at once");
                shutdown.cancel();
            } else {
                tracing::warn!("ending at once");
                std::process::exit(1);
            }
        }
    });
    Ok(())
}

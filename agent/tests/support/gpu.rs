//! An agent whose models go to a GPU.

use altiplano_test_models::toy;
use altiplano_test_vulkan_accounts::Accounts;

use super::{Agent, Model};

pub use super::device::*;

/// Small batches and no flash attention need few shaders, and compiling those is what takes the time here.
pub fn engine(gpu: &str) -> String {
    format!("engine: {{gpu: {gpu}, batchTokens: 32, microBatchTokens: 32, flashAttention: 'Off'}}")
}

/// The account of a device for one test alone: processes share it as they would share a GPU. With CUDA there is a GPU.
pub fn accounts() -> Option<Accounts> {
    (!cfg!(feature = "cuda")).then(|| Accounts::new().expect("the device's account"))
}

/// What a process needs to use that device.
pub fn environment(accounts: Option<&Accounts>) -> Vec<(&str, &str)> {
    ENV.into_iter().chain(accounts.into_iter().flat_map(Accounts::environment)).collect()
}

/// `altiplano-agent serve` with these models, and a device for it alone.
pub async fn agent(models: &[Model<'_>], options: &[&str]) -> Agent {
    let accounts = accounts();
    let mut agent = Agent::start(&[], &["serve"], models, options, &environment(accounts.as_ref())).await;
    agent.accounts = accounts;
    agent
}

/// The same, on a device that others use, too.
pub async fn sharing(accounts: &Accounts, models: &[Model<'_>], options: &[&str]) -> Agent {
    Agent::start(&[], &["serve"], models, options, &environment(Some(accounts))).await
}

/// Bytes of a device.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// That the model takes, as the status says.
    pub model: u64,
    /// That a process takes by opening the device: some hundred MiB with CUDA. The ledger counts them for each worker.
    pub process: u64,
}

impl Taken {
    /// For so many quarters of the model in one worker.
    pub fn quarters(self, quarters: u64) -> u64 {
        self.process + self.model * quarters / 4
    }

    /// Room for so many workers and a half.
    pub fn workers_and_a_half(self, workers: u64) -> u64 {
        let Self { model, process } = self;
        (model + process) * (2 * workers + 1) / 2
    }
}

/// What a loaded model and its worker take of the device.
pub async fn taken(agent: &Agent, model: &str) -> Taken {
    let labels = format!("altiplano_model_memory_measured_bytes{{device=\"{DEVICE}\"");
    let of_model = bytes(agent.metric(&labels, &format!("\"{model}\"")).await);
    let reserved = bytes(agent.metric("altiplano_device_memory_reserved_bytes", DEVICE).await);
    Taken { model: of_model, process: reserved.saturating_sub(of_model) }
}

/// What the toy model takes of the device.
pub async fn need() -> Taken {
    let more = format!(", {}", engine("Required"));
    let agent = agent(&[("toy", &toy::path(), &more)], &[]).await;
    agent.ready("toy", 1).await;
    taken(&agent, "toy").await
}

/// A metric that is not 0.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes in a metric")]
pub fn bytes(metric: f64) -> u64 {
    assert!(metric > 0.0, "nothing was measured");
    metric as u64
}

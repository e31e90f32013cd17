//! An agent whose models go to a GPU.

use altiplano_test_models::toy;

use super::{Agent, Model};

/// llama.cpp's name of the device.
#[cfg(feature = "cuda")]
pub const DEVICE: &str = "CUDA0";
/// Makes llama.cpp see it.
#[cfg(feature = "cuda")]
pub const ENV: [(&str, &str); 1] = [("CUDA_VISIBLE_DEVICES", "0")];

/// llama.cpp's name of the device.
#[cfg(not(feature = "cuda"))]
pub const DEVICE: &str = "Vulkan0";
/// Makes llama.cpp see it.
#[cfg(not(feature = "cuda"))]
pub const ENV: [(&str, &str); 1] = [("GGML_VK_VISIBLE_DEVICES", "0")];

/// Small batches and no flash attention need few shaders, and compiling those is what takes the time here.
pub fn engine(gpu: &str) -> String {
    format!("engine: {{gpu: {gpu}, batchTokens: 32, microBatchTokens: 32, flashAttention: 'Off'}}")
}

/// `altiplano-agent serve` with these models.
pub async fn agent(models: &[Model<'_>], options: &[&str]) -> Agent {
    Agent::start(&[], &["serve"], models, options, &ENV).await
}

/// Bytes that the toy model takes on the device.
pub async fn need() -> u64 {
    let more = format!(", {}", engine("Required"));
    let agent = agent(&[("toy", &toy::path(), &more)], &[]).await;
    agent.ready("toy", 1).await;
    bytes(agent.metric("altiplano_model_memory_measured_bytes", DEVICE).await)
}

/// A metric that is not 0.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes in a metric")]
pub fn bytes(metric: f64) -> u64 {
    assert!(metric > 0.0, "nothing was measured");
    metric as u64
}

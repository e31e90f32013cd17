//! The GPU that tests use: Mesa's software driver, or an NVIDIA GPU with `--features cuda`.
#![allow(dead_code, reason = "each suite uses a part")]
#![allow(unreachable_pub, reason = "suites are crates that nobody uses")]

#[cfg(feature = "cuda")]
mod names {
    /// llama.cpp's backend.
    pub const BACKEND: &str = "CUDA";
    /// llama.cpp's name of the device.
    pub const DEVICE: &str = "CUDA0";
    /// Makes llama.cpp see it, and no other.
    pub const ENV: [(&str, &str); 1] = [("CUDA_VISIBLE_DEVICES", "0")];
    /// The devices when it is there twice.
    pub const BOTH: [&str; 2] = ["CUDA0", "CUDA1"];
    /// Makes llama.cpp see it as two.
    pub const TWICE: [(&str, &str); 2] = [("CUDA_VISIBLE_DEVICES", "0"), ("GGML_CUDA_DEVICES", "2")];
}

#[cfg(not(feature = "cuda"))]
mod names {
    /// llama.cpp's backend.
    pub const BACKEND: &str = "Vulkan";
    /// llama.cpp's name of the device.
    pub const DEVICE: &str = "Vulkan0";
    /// Makes llama.cpp see it; it passes over software drivers otherwise.
    pub const ENV: [(&str, &str); 1] = [("GGML_VK_VISIBLE_DEVICES", "0")];
    /// The devices when it is there twice.
    pub const BOTH: [&str; 2] = ["Vulkan0", "Vulkan1"];
    /// Makes llama.cpp see it as two.
    pub const TWICE: [(&str, &str); 1] = [("GGML_VK_VISIBLE_DEVICES", "0,0")];
}

pub use names::*;

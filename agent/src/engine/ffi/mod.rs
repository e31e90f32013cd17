//! llama.cpp: the only module that names it, and the only one with `unsafe`.
//!
//! Backends, devices, model parameters, model load and vocabulary come from `llama-cpp-2`. From the context on its
//! handles hide what the engine needs (whole-state moves, memory breakdown, bounded outputs, exceptions), so context,
//! batch and sampler are own types over the same version's `llama-cpp-sys-2` and `shim.cpp`. What is public here is
//! safe to call with any argument: what llama.cpp would answer with an abort is checked before.
#![warn(clippy::undocumented_unsafe_blocks)]

mod adapter;
mod backend;
mod batch;
mod chat;
mod context;
mod depth;
mod driver;
mod embedding;
mod head;
mod log;
mod media;
mod memory;
mod model;
mod params;
mod sampler;
mod shim;
mod state;

pub(super) use adapter::Adapter;
pub(super) use backend::{Device, DeviceMemory, available_bytes, devices, version, without_gpus};
pub(super) use batch::Batch;
pub(super) use chat::{ChatReader, ChatTemplates};
pub(super) use context::{Context, DecodeError, LogprobRow, MediaBatch};
pub(super) use driver::{has_cuda, vulkan_drivers};
pub(super) use embedding::{EmbeddingContext, Pooling};
#[cfg(test)]
pub(super) use media::read_by_helper;
pub(super) use media::{Encoder, Piece, Pieces, Projector, ProjectorNeeds, ProjectorParams};
pub(super) use memory::cells_metadata;
pub(super) use model::{Model, ModelParams};
pub(super) use params::{ContextParams, Part};
pub(super) use sampler::Sampler;

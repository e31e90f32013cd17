//! What a context takes of each device, and what llama.cpp's own breakdown leaves out of that.

use std::ptr::NonNull;

use llama_cpp_sys_2::{llama_context, llama_context_params};

use super::{Model, available_bytes, log, shim};
use crate::runner::protocol::MemoryUse;

/// Host bytes that llama.cpp takes for each cell beside keys and values, as measured.
const CELL_METADATA_BYTES: u64 = 52;

/// Host bytes that so many cells take beside keys and values.
pub(in crate::engine) fn cells_metadata(cells: u32) -> u64 {
    u64::from(cells) * CELL_METADATA_BYTES
}

/// How a context attends, by which backends take memory beside llama.cpp's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attention {
    /// Computed as products of whole matrices.
    pub(super) plain: bool,
    /// Keys and values are both quantised.
    pub(super) quantised: bool,
    /// Of all sequences.
    pub(super) cells: u32,
    /// That a token may attend to.
    pub(super) sequence_cells: u32,
    /// Tokens computed at once.
    pub(super) tokens: u32,
}

/// What they take so, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Copies {
    /// Each backend's copy of the scores in half precision: of each cell, for each token of a micro-batch, in each head. The CPU
    /// has it in its work buffer, drivers of GPUs in memory that they take when it is first computed.
    pub(super) scores: u64,
    /// Vulkan's copy of one layer's cells in half precision (ggml-vulkan.cpp, `prealloc_size_x`): keys or values where they are
    /// factors of a product, both where flash attention reads quantised ones for many tokens.
    cells: u64,
}

impl Copies {
    pub(super) fn new(model: &Model, attention: Attention) -> Self {
        let Attention { plain, quantised, cells, sequence_cells, tokens } = attention;
        let product = |counts: [u32; 3]| counts.iter().fold(2, |bytes: u64, &count| bytes.saturating_mul(count.into()));
        Self {
            scores: if plain { product([sequence_cells, tokens, model.n_head()]) } else { 0 },
            cells: match (plain, quantised) {
                (true, _) => product([cells, model.kv_width(), 1]),
                (false, true) => product([cells, model.kv_width(), 2]),
                (false, false) => 0,
            },
        }
    }

    pub(super) fn on(&self, device: &str) -> u64 {
        self.scores.saturating_add(if device.starts_with("Vulkan") { self.cells } else { 0 })
    }
}

/// Bytes per device, host memory ("CPU") first.
///
/// # Safety
/// The context is alive.
pub(super) unsafe fn breakdown(context: NonNull<llama_context>) -> Vec<MemoryUse> {
    let mut kinds = [NOTHING; KINDS];
    // SAFETY: as the caller says; the array has as many entries as is said.
    let count = unsafe { shim::altiplano_memory_breakdown(context.as_ptr(), kinds.as_mut_ptr(), KINDS) };
    by_device(kinds.iter().take(count))
}

/// The same but for what all contexts of the model share.
pub(super) fn without_weights(mut uses: Vec<MemoryUse>) -> Vec<MemoryUse> {
    for device in &mut uses {
        device.weights_bytes = 0;
        device.mapped_bytes = 0;
    }
    uses
}

/// A context that would be.
pub(super) struct Size {
    /// Bytes per device, host memory ("CPU") first; weights left out.
    pub(super) uses: Vec<MemoryUse>,
    pub(super) cells: u32,
    pub(super) micro_batch: u32,
    pub(super) plain_attention: bool,
}

/// What a context with these parameters would be like and take: llama.cpp makes its plans and takes no memory for them, but
/// for the books of its cells. The error is its own words.
pub(super) fn size(model: &Model, raw_params: &llama_context_params) -> Result<Size, String> {
    let books = cells_metadata(raw_params.n_ctx);
    if let Some(available) = available_bytes("CPU").filter(|available| books > available / 10 * 9) {
        return Err(format!("{} cells need {books} bytes on CPU, where {available} are free", raw_params.n_ctx));
    }
    let (mut error, mut size, mut kinds) = (shim::Error::new(), shim::Size::default(), [NOTHING; KINDS]);
    let (count, errors) = log::with_errors(|| {
        // SAFETY: the model is alive, the array has as many entries as is said, and no other context of the model computes in
        // this thread meanwhile.
        unsafe {
            shim::altiplano_context_size(
                model.raw(),
                raw_params,
                &raw mut size,
                kinds.as_mut_ptr(),
                KINDS,
                &raw mut error,
            )
        }
    });
    if count == 0 {
        return Err(error.text_or(errors));
    }
    let shim::Size { cells, micro_batch, flash_attention } = size;
    Ok(Size { uses: by_device(kinds.iter().take(count)), cells, micro_batch, plain_attention: !flash_attention })
}

/// Kinds of buffers at most.
const KINDS: usize = 64;

const NOTHING: shim::Memory = shim::Memory { device: std::ptr::null(), model: 0, context: 0, compute: 0, mapped: 0 };

fn by_device<'k>(kinds: impl Iterator<Item = &'k shim::Memory>) -> Vec<MemoryUse> {
    let mut uses = vec![MemoryUse { device: "CPU".to_owned(), ..MemoryUse::default() }];
    for kind in kinds {
        // SAFETY: a name that is not null belongs to a device, which lives as long as the process.
        let name = unsafe { shim::device_name(kind) };
        let index = uses.iter().position(|found| found.device == name).unwrap_or_else(|| {
            uses.push(MemoryUse { device: name, ..MemoryUse::default() });
            uses.len() - 1
        });
        uses[index].weights_bytes += kind.model;
        uses[index].context_bytes += kind.context;
        uses[index].compute_bytes += kind.compute;
        uses[index].mapped_bytes += kind.mapped;
    }
    uses
}

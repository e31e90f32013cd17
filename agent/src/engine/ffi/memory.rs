//! What a context takes of each device, and what llama.cpp's own breakdown leaves out of that.

use std::ptr::NonNull;

use llama_cpp_sys_2::llama_context;

use super::shim;
use crate::runner::protocol::MemoryUse;

/// Host bytes that llama.cpp takes for each cell beside keys and values, as measured.
const CELL_METADATA_BYTES: u64 = 52;

/// Host bytes that so many cells take beside keys and values.
pub(in crate::engine) fn cells_metadata(cells: u32) -> u64 {
    u64::from(cells) * CELL_METADATA_BYTES
}

/// Bytes that a backend takes while attention is computed as products of whole matrices, beside the scores themselves: its
/// copy of them in half precision, of each cell, for each token of a micro-batch, in each head. The CPU has it in its work
/// buffer, drivers of GPUs in memory that they take when it is first computed.
pub(super) fn scores_copy(cells: u32, tokens: u32, heads: u32) -> u64 {
    [cells, tokens, heads].iter().fold(2, |bytes: u64, &count| bytes.saturating_mul(count.into()))
}

/// Bytes per device, host memory ("CPU") first.
///
/// # Safety
/// The context is alive.
pub(super) unsafe fn breakdown(context: NonNull<llama_context>) -> Vec<MemoryUse> {
    let empty = shim::Memory { device: std::ptr::null(), model: 0, context: 0, compute: 0, mapped: 0 };
    let mut entries = [empty; 64];
    // SAFETY: as the caller says; the array has as many entries as is said.
    let count = unsafe { shim::altiplano_memory_breakdown(context.as_ptr(), entries.as_mut_ptr(), entries.len()) };
    let mut uses = vec![MemoryUse { device: "CPU".to_owned(), ..MemoryUse::default() }];
    for entry in entries.iter().take(count) {
        // SAFETY: a name that is not null belongs to a device, which lives as long as the process.
        let name = unsafe { shim::device_name(entry) };
        let index = uses.iter().position(|found| found.device == name).unwrap_or_else(|| {
            uses.push(MemoryUse { device: name, ..MemoryUse::default() });
            uses.len() - 1
        });
        uses[index].weights_bytes += entry.model;
        uses[index].context_bytes += entry.context;
        uses[index].compute_bytes += entry.compute;
        uses[index].mapped_bytes += entry.mapped;
    }
    uses
}

// How full a context's cache is, and what follows from it: what llama.cpp has of that only in C++.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "shim.h"

#ifdef __cplusplus
extern "C" {
#endif

// Takes `count` free cells for position 0 of a sequence, whose keys and values stay as they are. False where the cache is
// not a plain one of keys and values, or has fewer cells: then nothing has changed.
bool altiplano_fill(struct llama_context * context, llama_seq_id sequence, uint32_t count);

// Cells up to the last one that is taken, where `sequence` has its cells; 0 where the cache is not a plain one.
uint32_t altiplano_depth(const struct llama_context * context, llama_seq_id sequence);

// Whether attention is computed without its matrix being written down.
bool altiplano_flash_attention(const struct llama_context * context);

#ifdef __cplusplus
}
#endif

// Contexts made, freed and only reckoned with.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "shim.h"

#ifdef __cplusplus
extern "C" {
#endif

// What a context would be like.
struct altiplano_size {
    uint32_t cells;
    uint32_t micro_batch;
    bool flash_attention;
};

// Null when llama.cpp refuses it; the reason is then in `error` or in the log.
struct llama_context * altiplano_context_new(struct llama_model * model, const struct llama_context_params * params, struct altiplano_error * error);

void altiplano_context_free(struct llama_context * context);

// Bytes that a context with these parameters would take in the buffers of each kind, weights left out, of which none are
// taken. Returns how many kinds there are, 0 when llama.cpp refuses such a context. No other context of the model is used
// meanwhile by the thread that calls this; others may be made and freed.
size_t altiplano_context_size(struct llama_model * model, const struct llama_context_params * params, struct altiplano_size * out, struct altiplano_memory * kinds, size_t size, struct altiplano_error * error);

#ifdef __cplusplus
}
#endif

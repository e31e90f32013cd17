// A model's own head that guesses tokens (MTP): what llama.cpp has of it only in C++ and may throw.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "shim.h"

#ifdef __cplusplus
extern "C" {
#endif

// Has a context give hidden states: of all tokens of a batch, or of those with an output.
void altiplano_hidden(struct llama_context * context, bool outputs_only);

// The hidden state after a token of the last batch; null: there is none.
const float * altiplano_hidden_row(struct llama_context * context, int32_t row);

// As altiplano_decode, with a hidden state of `width` numbers for each token.
int32_t altiplano_decode_head(struct llama_context * context, const struct llama_batch * batch, const float * states, size_t width, struct altiplano_error * error);

#ifdef __cplusplus
}
#endif

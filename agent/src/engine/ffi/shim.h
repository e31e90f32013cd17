// What the engine needs of llama.cpp beyond its C API, and the calls of the C API that may throw. A C++ exception that
// reaches Rust ends the process; here each is caught and becomes an error code with its text.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Returned by the functions below when an exception was caught; its text is then in `error`.
#define ALTIPLANO_EXCEPTION (-1000)

// Returned by altiplano_pick.
#define ALTIPLANO_NO_TOKEN (-1001)

struct altiplano_error {
    char text[512];
};

// Bytes in the buffers of one kind. `device` lives as long as the process; it is empty for host memory.
struct altiplano_memory {
    const char * device;
    uint64_t model;
    uint64_t context;
    uint64_t compute;
    // Of `model`: pages of the file.
    uint64_t mapped;
};

struct altiplano_logprob {
    llama_token token;
    float logprob;
};

// Whether the model's file has this tensor, in whichever of its parts.
bool altiplano_has_tensor(const struct llama_model * model, const char * name);

// As llama_decode, then waits for the devices.
int32_t altiplano_decode(struct llama_context * context, const struct llama_batch * batch, struct altiplano_error * error);

// The next token of an output row: what the chain selects (null: the most probable one, the lowest id wins a draw) among
// the tokens whose bits are set in `allowed` (null: all). Nothing is remembered: that is altiplano_accept.
// ALTIPLANO_NO_TOKEN: none may come.
int32_t altiplano_pick(struct llama_sampler * chain, struct llama_context * context, int32_t row, const uint32_t * allowed, struct altiplano_error * error);

int32_t altiplano_accept(struct llama_sampler * sampler, llama_token token, struct altiplano_error * error);

// Null when an exception was caught.
struct llama_sampler * altiplano_dry_new(const struct llama_vocab * vocab, float multiplier, float base, int32_t allowed_length, int32_t last_n, const char ** breakers, size_t count, struct altiplano_error * error);

// Log-probabilities of `token` (out[0]) and of the `top` most probable tokens (out[1..], best first); returns their
// number, out[0] counted.
int32_t altiplano_logprobs(struct llama_context * context, int32_t row, llama_token token, int32_t top, struct altiplano_logprob * out, struct altiplano_error * error);

// Bytes written, or minus the bytes needed.
int32_t altiplano_token_to_piece(const struct llama_vocab * vocab, llama_token token, char * buffer, int32_t size, bool special, struct altiplano_error * error);

// Tokens written, or minus the tokens needed; INT32_MIN: an exception, or too many.
int32_t altiplano_tokenize(const struct llama_vocab * vocab, const char * text, int32_t length, llama_token * tokens, int32_t size, bool add_special, bool parse_special, struct altiplano_error * error);

// 0 on failure.
size_t altiplano_state_size(struct llama_context * context);
size_t altiplano_state_get(struct llama_context * context, uint8_t * buffer, size_t size);
size_t altiplano_state_set(struct llama_context * context, const uint8_t * buffer, size_t size);

// The same for one sequence.
size_t altiplano_sequence_state_size(struct llama_context * context, llama_seq_id sequence);
size_t altiplano_sequence_state_get(struct llama_context * context, uint8_t * buffer, size_t size, llama_seq_id sequence);
size_t altiplano_sequence_state_set(struct llama_context * context, const uint8_t * buffer, size_t size, llama_seq_id sequence);

// Entries there are; at most `size` of them are written.
size_t altiplano_memory_breakdown(const struct llama_context * context, struct altiplano_memory * out, size_t size);

#ifdef __cplusplus
}
#endif

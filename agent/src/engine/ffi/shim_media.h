// llama.cpp's mtmd behind a wall against exceptions, with an encoder that can be interrupted.
#pragma once

#include "shim.h"
#include "mtmd.h"

#ifdef __cplusplus
extern "C" {
#endif

// Called between two parts of an encoder's graph; false: stop.
typedef bool (*altiplano_pause)(void * data);

struct altiplano_projector;

struct altiplano_projector_params {
    const char * path;
    // Null: the CPU.
    const char * device;
    const char * marker;
    int32_t threads;
    enum llama_flash_attn_type flash_attention;
};

struct altiplano_projector_facts {
    bool vision;
    bool audio;
    bool mrope;
    // Samples in a second of audio.
    int32_t sample_rate;
};

// What a file would take, without its weights being read.
struct altiplano_projector_needs {
    // The most tokens that one picture can become, as far as is known.
    int32_t most_tokens;
    // A picture must be computed at once.
    bool non_causal;
};

// A picture as RGB, three bytes for each pixel; or, where `samples` is not null, sound in the projector's own rate.
struct altiplano_medium {
    uint32_t width;
    uint32_t height;
    const uint8_t * pixels;
    const float * samples;
    size_t count;
};

struct altiplano_piece {
    enum mtmd_input_chunk_type kind;
    // Number of the picture or sound that it is of.
    size_t medium;
    size_t tokens;
    int32_t positions;
    bool non_causal;
    // Of text.
    const llama_token * text;
};

// Null when the file cannot be used.
struct altiplano_projector * altiplano_projector_new(const struct llama_model * model, const struct altiplano_projector_params * params, struct altiplano_error * error);
void altiplano_projector_free(struct altiplano_projector * projector);
struct altiplano_projector_facts altiplano_projector_facts_of(const struct altiplano_projector * projector);

// mtmd's own handle, for tests.
mtmd_context * altiplano_projector_context(struct altiplano_projector * projector);

// Bytes for each device as in altiplano_memory, all of them in `model`; returns the entries there are, at most `size` of
// them written; SIZE_MAX: the file cannot be used.
size_t altiplano_projector_memory(const struct altiplano_projector_params * params, struct altiplano_memory * out, size_t size, struct altiplano_projector_needs * needs, struct altiplano_error * error);

// Text with a marker for each picture and each sound as pieces. Null on failure. May be called by several threads.
mtmd_input_chunks * altiplano_media_split(const struct altiplano_projector * projector, const char * text, size_t length, bool add_special, const struct altiplano_medium * media, size_t count, struct altiplano_error * error);
size_t altiplano_media_count(const mtmd_input_chunks * pieces);
bool altiplano_media_piece(const struct altiplano_projector * projector, const mtmd_input_chunks * pieces, size_t index, struct altiplano_piece * out);

// Computes the embeddings of one piece into `out`, which has `size` numbers. `pause` is called about every few
// milliseconds of work. 0: done; 1: stopped by `pause`; else an error.
int32_t altiplano_media_encode(struct altiplano_projector * projector, const mtmd_input_chunks * pieces, size_t index, float * out, size_t size, altiplano_pause pause, void * data, struct altiplano_error * error);

// Positions of one piece that begins at `first`: one number for each token, or four with M-RoPE, section by section.
bool altiplano_media_positions(const struct altiplano_projector * projector, const mtmd_input_chunks * pieces, size_t index, llama_pos first, llama_pos * out, size_t size);

// As altiplano_decode, each token seeing all others of the batch where `causal` is false.
int32_t altiplano_decode_media(struct llama_context * context, const struct llama_batch * batch, bool causal, struct altiplano_error * error);

#ifdef __cplusplus
}
#endif

// Chat templates, tool calls and reasoning: llama.cpp's common/chat.h, which is C++ with exceptions, as C functions. What
// goes in and comes out is JSON, except for text. Every call has an allowance (allowance.h), and needs the stack that
// ALTIPLANO_CHAT_STACK says.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "shim.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of stack that the calls below may use at most.
#define ALTIPLANO_CHAT_STACK (192u << 20)

// Longer than altiplano_error's, because a template's own words stand in it.
struct altiplano_chat_error {
    char text[4096];
};

// Made by the shim, freed by altiplano_text_free; not ended by a zero.
struct altiplano_text {
    char * data;
    size_t size;
};

// The compiled templates of a model; may be used by several threads at once.
struct altiplano_chat;

// Reads the output of one request; may be used by one thread at a time.
struct altiplano_chat_reader;

void altiplano_text_free(struct altiplano_text text);

// `source`, or without one the templates of `model`. Without a model, `bos` and `eos` are the texts of its tokens.
struct altiplano_chat * altiplano_chat_new(const struct llama_model * model, const char * source, const char * bos, const char * eos, struct altiplano_chat_error * error);
void altiplano_chat_free(struct altiplano_chat * chat);

// What the templates can do, as a JSON object of booleans. `analysed`: how an answer is to be read follows from the
// request's settings and the generation prompt alone, so that it can be kept; `prompt_only` then gives the rest. 0 on
// success.
int32_t altiplano_chat_capabilities(const struct altiplano_chat * chat, struct altiplano_text * out, struct altiplano_chat_error * error);

// Renders a conversation. 0 on success.
int32_t altiplano_chat_apply(const struct altiplano_chat * chat, const char * request, size_t size, struct altiplano_text * out, struct altiplano_chat_error * error);

// `format`, `parser` and `generation_prompt` are what altiplano_chat_apply said.
struct altiplano_chat_reader * altiplano_chat_reader_new(int32_t format, const char * parser, size_t parser_size, const char * generation_prompt, size_t prompt_size, struct altiplano_chat_error * error);
void altiplano_chat_reader_free(struct altiplano_chat_reader * reader);

// The message that `text` is so far, as JSON. 0 on success.
int32_t altiplano_chat_read(const struct altiplano_chat_reader * reader, const char * text, size_t size, bool partial, struct altiplano_text * out, struct altiplano_chat_error * error);

#ifdef __cplusplus
}
#endif

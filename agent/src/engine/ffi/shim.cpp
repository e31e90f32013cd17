#include "guard.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ggml-backend.h"
#include "llama-ext.h"

// In src/llama-model.h, which would bring all of llama.cpp's inner types along.
const std::vector<std::pair<std::string, ggml_tensor *>> & llama_internal_get_tensor_map(const llama_model * model);

using altiplano::guarded;
using altiplano::say;

namespace {

const float * row_logits(llama_context * context, int32_t row, altiplano_error * error) {
    const float * logits = llama_get_logits_ith(context, row);
    if (logits == nullptr) {
        say(error, "no logits in this row");
    }
    return logits;
}

int32_t vocabulary(const llama_context * context) {
    return llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context)));
}

// Bytes of the tensors in each buffer type of host memory. A mapped file counts from its first to its last tensor there,
// also what lies between and went to a device or was repacked: address space, not memory.
std::map<ggml_backend_buffer_type_t, size_t> host_weights(const llama_model * model) {
    std::map<ggml_backend_buffer_type_t, size_t> sums;
    for (const auto & entry : llama_internal_get_tensor_map(model)) {
        const ggml_tensor * tensor = entry.second;
        if (tensor->buffer == nullptr || !ggml_backend_buffer_is_host(tensor->buffer)) {
            continue;
        }
        ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(tensor->buffer);
        sums[type] += GGML_PAD(ggml_backend_buft_get_alloc_size(type, tensor), ggml_backend_buft_get_alignment(type));
    }
    return sums;
}

} // namespace

extern "C" {

bool altiplano_has_tensor(const llama_model * model, const char * name) {
    return guarded(nullptr, false, [&] {
        for (const auto & tensor : llama_internal_get_tensor_map(model)) {
            if (tensor.first == name) {
                return true;
            }
        }
        return false;
    });
}

int32_t altiplano_decode(llama_context * context, const llama_batch * batch, altiplano_error * error) {
    return guarded(error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&] {
        const int32_t result = llama_decode(context, *batch);
        if (result == 0) {
            llama_synchronize(context);
        }
        return result;
    });
}

int32_t altiplano_logprobs(llama_context * context, int32_t row, llama_token token, int32_t top, altiplano_logprob * out, altiplano_error * error) {
    return guarded(error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&] {
        const float * logits = row_logits(context, row, error);
        const int32_t size = vocabulary(context);
        if (logits == nullptr || token < 0 || token >= size) {
            return static_cast<int32_t>(ALTIPLANO_EXCEPTION);
        }
        const float highest = *std::max_element(logits, logits + size);
        double sum = 0.0;
        for (int32_t i = 0; i < size; ++i) {
            sum += std::exp(static_cast<double>(logits[i] - highest));
        }
        const float norm = highest + static_cast<float>(std::log(sum));
        out[0] = { token, logits[token] - norm };

        // The best ones in a small sorted list: `top` is at most 20, the vocabulary has 10^5 entries.
        int32_t count = 0;
        altiplano_logprob * best = out + 1;
        for (int32_t i = 0; i < size && top > 0; ++i) {
            if (count == top && logits[i] <= best[count - 1].logprob) {
                continue;
            }
            int32_t place = count < top ? count++ : top - 1;
            for (; place > 0 && best[place - 1].logprob < logits[i]; --place) {
                best[place] = best[place - 1];
            }
            best[place] = { i, logits[i] };
        }
        for (int32_t i = 0; i < count; ++i) {
            best[i].logprob -= norm;
        }
        return count + 1;
    });
}

int32_t altiplano_token_to_piece(const llama_vocab * vocab, llama_token token, char * buffer, int32_t size, bool special, altiplano_error * error) {
    return guarded(error, static_cast<int32_t>(INT32_MIN), [&] { return llama_token_to_piece(vocab, token, buffer, size, 0, special); });
}

int32_t altiplano_tokenize(const llama_vocab * vocab, const char * text, int32_t length, llama_token * tokens, int32_t size, bool add_special, bool parse_special, altiplano_error * error) {
    return guarded(error, static_cast<int32_t>(INT32_MIN), [&] { return llama_tokenize(vocab, text, length, tokens, size, add_special, parse_special); });
}

size_t altiplano_state_size(llama_context * context) {
    return guarded(nullptr, static_cast<size_t>(0), [&] { return llama_state_get_size(context); });
}

size_t altiplano_state_get(llama_context * context, uint8_t * buffer, size_t size) {
    return guarded(nullptr, static_cast<size_t>(0), [&] { return llama_state_get_data(context, buffer, size); });
}

size_t altiplano_state_set(llama_context * context, const uint8_t * buffer, size_t size) {
    return guarded(nullptr, static_cast<size_t>(0), [&] { return llama_state_set_data(context, buffer, size); });
}

size_t altiplano_sequence_state_size(llama_context * context, llama_seq_id sequence) {
    return guarded(nullptr, static_cast<size_t>(0), [&] { return llama_state_seq_get_size(context, sequence); });
}

size_t altiplano_sequence_state_get(llama_context * context, uint8_t * buffer, size_t size, llama_seq_id sequence) {
    return guarded(nullptr, static_cast<size_t>(0), [&] { return llama_state_seq_get_data(context, buffer, size, sequence); });
}

size_t altiplano_sequence_state_set(llama_context * context, const uint8_t * buffer, size_t size, llama_seq_id sequence) {
    return guarded(nullptr, static_cast<size_t>(0), [&] { return llama_state_seq_set_data(context, buffer, size, sequence); });
}

size_t altiplano_memory_breakdown(const llama_context * context, altiplano_memory * out, size_t size) {
    return guarded(nullptr, static_cast<size_t>(0), [&] {
        size_t count = 0;
        const auto host = host_weights(llama_get_model(context));
        for (const auto & [type, bytes] : llama_get_memory_breakdown(context)) {
            if (count < size) {
                const auto tensors = host.find(type);
                const size_t model = tensors == host.end() ? bytes.model : std::min(bytes.model, tensors->second);
                ggml_backend_dev_t device = ggml_backend_buft_is_host(type) ? nullptr : ggml_backend_buft_get_device(type);
                const char * name = device == nullptr ? "" : ggml_backend_dev_name(device);
                const bool mapped = std::strcmp(ggml_backend_buft_name(type), "CPU_Mapped") == 0;
                out[count] = { name, model, bytes.context, bytes.compute, mapped ? model : 0 };
            }
            ++count;
        }
        return count;
    });
}

} // extern "C"

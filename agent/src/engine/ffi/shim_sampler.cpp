#include <algorithm>
#include <cmath>
#include <vector>

#include "guard.h"

using altiplano::guarded;
using altiplano::say;

namespace {

// The tokens that may come, with their logits.
void fill(std::vector<llama_token_data> & candidates, const float * logits, int32_t size, const uint32_t * allowed) {
    candidates.clear();
    candidates.reserve(size);
    for (llama_token token = 0; token < size; ++token) {
        if (allowed == nullptr || ((allowed[token / 32] >> (token % 32)) & 1) != 0) {
            candidates.push_back({ token, logits[token], 0.0f });
        }
    }
}

// The first of the largest. Lanes that do not depend on each other, so that the compiler makes one instruction of them: a
// tenth of a millisecond for a large vocabulary otherwise, while all cores wait.
llama_token most_probable(const float * logits, int32_t size) {
    constexpr int32_t width = 32;
    float best[width];
    std::fill_n(best, width, -INFINITY);
    const int32_t whole = size - size % width;
    for (int32_t start = 0; start < whole; start += width) {
        for (int32_t lane = 0; lane < width; ++lane) {
            const float logit = logits[start + lane];
            best[lane] = logit > best[lane] ? logit : best[lane];
        }
    }
    float largest = *std::max_element(best, best + width);
    for (int32_t token = whole; token < size; ++token) {
        largest = logits[token] > largest ? logits[token] : largest;
    }
    const float * found = std::find(logits, logits + size, largest);
    return static_cast<llama_token>(found == logits + size ? 0 : found - logits);
}

} // namespace

extern "C" {

int32_t altiplano_pick(llama_sampler * chain, llama_context * context, int32_t row, const uint32_t * allowed, altiplano_error * error) {
    return guarded(error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&] {
        const float * logits = llama_get_logits_ith(context, row);
        if (logits == nullptr) {
            say(error, "no logits in this row");
            return static_cast<int32_t>(ALTIPLANO_EXCEPTION);
        }
        const int32_t size = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context)));
        if (chain == nullptr && allowed == nullptr) {
            return most_probable(logits, size);
        }
        // One for the thread, not for the sequence: 12 bytes for each token of the vocabulary.
        static thread_local std::vector<llama_token_data> candidates;
        fill(candidates, logits, size, allowed);
        if (candidates.empty()) {
            return static_cast<int32_t>(ALTIPLANO_NO_TOKEN);
        }
        if (chain == nullptr) {
            const auto best = std::max_element(candidates.begin(), candidates.end(), [](const auto & left, const auto & right) {
                return left.logit < right.logit;
            });
            return static_cast<int32_t>(best->id);
        }
        llama_token_data_array array = { candidates.data(), candidates.size(), -1, false };
        llama_sampler_apply(chain, &array);
        if (array.selected < 0 || static_cast<size_t>(array.selected) >= array.size) {
            return static_cast<int32_t>(ALTIPLANO_NO_TOKEN);
        }
        const llama_token_data & chosen = array.data[array.selected];
        return static_cast<int32_t>(chosen.logit == -INFINITY ? ALTIPLANO_NO_TOKEN : chosen.id);
    });
}

int32_t altiplano_accept(llama_sampler * sampler, llama_token token, altiplano_error * error) {
    return guarded(error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&] {
        llama_sampler_accept(sampler, token);
        return static_cast<int32_t>(0);
    });
}

llama_sampler * altiplano_dry_new(const llama_vocab * vocab, float multiplier, float base, int32_t allowed_length, int32_t last_n, const char ** breakers, size_t count, altiplano_error * error) {
    return guarded(error, static_cast<llama_sampler *>(nullptr), [&] {
        return llama_sampler_init_dry(vocab, multiplier, base, allowed_length, last_n, breakers, count);
    });
}

} // extern "C"

// Pictures and sound: see shim_media.h.
#include "shim_media.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "gguf.h"
#include "guard.h"
#include "mtmd-helper.h"

using altiplano::guarded;
using altiplano::say;

// The encoder asks its caller between two parts of its graph whether to go on, so that others can compute meanwhile.
struct altiplano_projector {
    mtmd_context * context = nullptr;
    altiplano_pause pause = nullptr;
    void * data = nullptr;
    int nodes = 0;
    bool stopped = false;

    ~altiplano_projector() {
        if (context != nullptr) {
            mtmd_free(context);
        }
    }
};

namespace {

// Nodes of a graph between two pauses, unless one of them is large.
constexpr int NODES = 64;

// Multiplications of a node from which on it is large: some milliseconds on a CPU.
constexpr double LARGE = 5e7;

double multiplications(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_MUL_MAT:
            return static_cast<double>(ggml_nelements(node)) * static_cast<double>(node->src[0]->ne[0]);
        case GGML_OP_FLASH_ATTN_EXT:
            return 2.0 * static_cast<double>(ggml_nelements(node)) * static_cast<double>(node->src[1]->ne[1]);
        default:
            return 0.0;
    }
}

// ggml asks before it computes which nodes somebody wants to look at, and comes back after those.
bool on_node(ggml_tensor * node, bool asks, void * user_data) {
    auto * projector = static_cast<altiplano_projector *>(user_data);
    if (projector->pause == nullptr) {
        return !asks;
    }
    if (asks) {
        if (projector->stopped || ++projector->nodes >= NODES || multiplications(node) >= LARGE) {
            projector->nodes = 0;
            return true;
        }
        return false;
    }
    projector->stopped = projector->stopped || !projector->pause(projector->data);
    return !projector->stopped;
}

// False when there is no such device.
bool fill(const altiplano_projector_params & params, mtmd_context_params & out, altiplano_error * error) {
    out = mtmd_context_params_default();
    out.use_gpu = params.device != nullptr;
    if (params.device != nullptr) {
        out.device = ggml_backend_dev_by_name(params.device);
        if (out.device == nullptr) {
            say(error, "there is no such device");
            return false;
        }
    }
    out.print_timings = false;
    out.n_threads = params.threads;
    out.media_marker = params.marker;
    out.flash_attn_type = params.flash_attention;
    return true;
}

// Tokens of an image of a projector that takes one size only, of which mtmd says none. The keys are known to be good: the
// file was read before.
int32_t tokens_of_one_size(const char * path) {
    gguf_init_params params = { true, nullptr };
    gguf_context * file = gguf_init_from_file(path, params);
    if (file == nullptr) {
        return 0;
    }
    const auto number = [&](const char * key, uint32_t otherwise) {
        const int64_t id = gguf_find_key(file, key);
        return id >= 0 && gguf_get_kv_type(file, id) == GGUF_TYPE_UINT32 ? gguf_get_val_u32(file, id) : otherwise;
    };
    const uint64_t side = number("clip.vision.image_size", 0) / std::max(number("clip.vision.patch_size", 1), 1u);
    // Gemma 3's own, and the only ones of this kind.
    const uint64_t merged = std::max(number("clip.vision.projector.scale_factor", 4), 1u);
    gguf_free(file);
    return static_cast<int32_t>(std::min<uint64_t>((side / merged) * (side / merged), INT32_MAX));
}

const mtmd_input_chunk * piece_at(const mtmd_input_chunks * pieces, size_t index) {
    return index < mtmd_input_chunks_size(pieces) ? mtmd_input_chunks_get(pieces, index) : nullptr;
}

} // namespace

extern "C" {

altiplano_projector * altiplano_projector_new(const llama_model * model, const altiplano_projector_params * params, altiplano_error * error) {
    return guarded(error, static_cast<altiplano_projector *>(nullptr), [&]() -> altiplano_projector * {
        mtmd_context_params raw;
        if (!fill(*params, raw, error)) {
            return nullptr;
        }
        auto projector = std::make_unique<altiplano_projector>();
        raw.cb_eval = on_node;
        raw.cb_eval_user_data = projector.get();
        projector->context = mtmd_init_from_file(params->path, model, raw);
        return projector->context == nullptr ? nullptr : projector.release();
    });
}

void altiplano_projector_free(altiplano_projector * projector) {
    delete projector;
}

altiplano_projector_facts altiplano_projector_facts_of(const altiplano_projector * projector) {
    const mtmd_context * context = projector->context;
    return { mtmd_support_vision(context), mtmd_support_audio(context), mtmd_decode_use_mrope(context), mtmd_get_audio_sample_rate(context) };
}

mtmd_context * altiplano_projector_context(altiplano_projector * projector) {
    return projector->context;
}

size_t altiplano_projector_memory(const altiplano_projector_params * params, altiplano_memory * out, size_t size, altiplano_projector_needs * needs, altiplano_error * error) {
    return guarded(error, SIZE_MAX, [&] {
        mtmd_context_params raw;
        if (!fill(*params, raw, error)) {
            return SIZE_MAX;
        }
        const mtmd_memory_usage usage = mtmd_get_memory_usage(params->path, raw);
        // What cannot be read is told by nothing else.
        if (usage.backend_mem_usage.empty()) {
            return SIZE_MAX;
        }
        const bool one_size = usage.use_non_causal && usage.image_max_tokens <= 0;
        *needs = { one_size ? tokens_of_one_size(params->path) : usage.image_max_tokens, usage.use_non_causal };
        size_t count = 0;
        for (const auto & [device, bytes] : usage.backend_mem_usage) {
            const bool host = device == nullptr || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
            if (count < size) {
                out[count] = { host ? "" : ggml_backend_dev_name(device), bytes, 0, 0 };
            }
            ++count;
        }
        return count;
    });
}

mtmd_input_chunks * altiplano_media_split(const altiplano_projector * projector, const char * text, size_t length, bool add_special, const altiplano_medium * media, size_t count, altiplano_error * error) {
    return guarded(error, static_cast<mtmd_input_chunks *>(nullptr), [&]() -> mtmd_input_chunks * {
        mtmd::bitmaps bitmaps;
        for (size_t i = 0; i < count; ++i) {
            if (media[i].samples != nullptr) {
                bitmaps.entries.emplace_back(mtmd_bitmap_init_from_audio(media[i].count, media[i].samples));
            } else {
                bitmaps.entries.emplace_back(media[i].width, media[i].height, media[i].pixels);
            }
            // mtmd tells by it which pieces are of one picture or sound.
            bitmaps.entries.back().set_id(std::to_string(i).c_str());
        }
        const auto pointers = bitmaps.c_ptr();
        mtmd::input_chunks pieces(mtmd_input_chunks_init());
        const mtmd_input_text input = { text, length, add_special, true };
        const int32_t result = mtmd_tokenize(projector->context, pieces.ptr.get(), &input, const_cast<const mtmd_bitmap **>(pointers.data()), pointers.size());
        if (result != 0) {
            say(error, result == 1 ? "the text has not as many places as there are images and sounds" : "an image or a sound cannot be prepared");
            return nullptr;
        }
        return pieces.ptr.release();
    });
}

size_t altiplano_media_count(const mtmd_input_chunks * pieces) {
    return mtmd_input_chunks_size(pieces);
}

bool altiplano_media_piece(const altiplano_projector * projector, const mtmd_input_chunks * pieces, size_t index, altiplano_piece * out) {
    return guarded(nullptr, false, [&] {
        const mtmd_input_chunk * piece = piece_at(pieces, index);
        if (piece == nullptr) {
            return false;
        }
        size_t tokens = mtmd_input_chunk_get_n_tokens(piece);
        const auto kind = mtmd_input_chunk_get_type(piece);
        const bool text = kind == MTMD_INPUT_CHUNK_TYPE_TEXT;
        const llama_token * list = text ? mtmd_input_chunk_get_tokens_text(piece, &tokens) : nullptr;
        const char * id = text ? nullptr : mtmd_input_chunk_get_id(piece);
        const size_t medium = id == nullptr ? 0 : std::stoul(id);
        *out = { kind, medium, tokens, mtmd_input_chunk_get_n_pos(piece), !text && mtmd_decode_use_non_causal(projector->context, piece), list };
        return true;
    });
}

int32_t altiplano_media_encode(altiplano_projector * projector, const mtmd_input_chunks * pieces, size_t index, float * out, size_t size, altiplano_pause pause, void * data, altiplano_error * error) {
    return guarded(error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&]() -> int32_t {
        const mtmd_input_chunk * piece = piece_at(pieces, index);
        if (piece == nullptr) {
            say(error, "no such piece");
            return ALTIPLANO_EXCEPTION;
        }
        projector->pause = pause;
        projector->data = data;
        projector->nodes = 0;
        projector->stopped = false;
        const int32_t result = mtmd_encode_chunk(projector->context, piece);
        projector->pause = nullptr;
        projector->data = nullptr;
        if (projector->stopped) {
            return 1;
        }
        if (result != 0) {
            say(error, "the projector failed");
            return ALTIPLANO_EXCEPTION;
        }
        std::memcpy(out, mtmd_get_output_embd(projector->context), size * sizeof(float));
        return 0;
    });
}

bool altiplano_media_positions(const altiplano_projector * projector, const mtmd_input_chunks * pieces, size_t index, llama_pos first, llama_pos * out, size_t size) {
    return guarded(nullptr, false, [&] {
        const mtmd_input_chunk * piece = piece_at(pieces, index);
        if (piece == nullptr) {
            return false;
        }
        const size_t tokens = mtmd_input_chunk_get_n_tokens(piece);
        const size_t sections = mtmd_decode_use_mrope(projector->context) ? 4 : 1;
        if (size != tokens * sections) {
            return false;
        }
        const mtmd_image_tokens * image = mtmd_input_chunk_get_type(piece) == MTMD_INPUT_CHUNK_TYPE_IMAGE ? mtmd_input_chunk_get_tokens_image(piece) : nullptr;
        for (size_t i = 0; i < tokens; ++i) {
            if (sections == 4 && image != nullptr) {
                const mtmd_decoder_pos position = mtmd_image_tokens_get_decoder_pos(image, first, i);
                out[i] = static_cast<llama_pos>(position.t);
                out[tokens + i] = static_cast<llama_pos>(position.y);
                out[2 * tokens + i] = static_cast<llama_pos>(position.x);
                out[3 * tokens + i] = static_cast<llama_pos>(position.z);
                continue;
            }
            for (size_t section = 0; section < sections; ++section) {
                out[section * tokens + i] = first + static_cast<llama_pos>(i);
            }
        }
        return true;
    });
}

int32_t altiplano_decode_media(llama_context * context, const llama_batch * batch, bool causal, altiplano_error * error) {
    const int32_t result = guarded(error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&] {
        if (!causal) {
            llama_set_causal_attn(context, false);
        }
        const int32_t result = llama_decode(context, *batch);
        if (result == 0) {
            llama_synchronize(context);
        }
        return result;
    });
    if (!causal) {
        guarded(error, 0, [&] {
            llama_set_causal_attn(context, true);
            return 0;
        });
    }
    return result;
}

} // extern "C"

#include "shim_sizing.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "ggml-backend.h"
#include "guard.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-memory.h"
#include "llama-model.h"

using namespace altiplano;

namespace {

// A context with a stretched rope writes to the model when it is made, and one that takes no memory is made by a flag of the
// model, which making and freeing read.
std::mutex making;

// llama.cpp's own way for dry runs (`llama_model_params.no_alloc`), for one context of a model that is there.
class without_memory {
  public:
    explicit without_memory(llama_model * model) : flag(model->hparams.no_alloc), before(flag) { flag = true; }
    ~without_memory() { flag = before; }
    without_memory(const without_memory &) = delete;
    without_memory & operator=(const without_memory &) = delete;

  private:
    bool & flag;
    const bool before;
};

struct freed {
    void operator()(llama_context * context) const { llama_free(context); }
};

altiplano_memory of_kind(ggml_backend_buffer_type_t type, uint64_t context, uint64_t compute) {
    ggml_backend_dev_t device = ggml_backend_buft_is_host(type) ? nullptr : ggml_backend_buft_get_device(type);
    return { device == nullptr ? "" : ggml_backend_dev_name(device), 0, context, compute, 0 };
}

} // namespace

extern "C" {

llama_context * altiplano_context_new(llama_model * model, const llama_context_params * params, altiplano_error * error) {
    return guarded(error, static_cast<llama_context *>(nullptr), [&] {
        const std::lock_guard<std::mutex> one_at_a_time(making);
        return llama_init_from_model(model, *params);
    });
}

void altiplano_context_free(llama_context * context) {
    guarded(nullptr, 0, [&] {
        const std::lock_guard<std::mutex> one_at_a_time(making);
        llama_free(context);
        return 0;
    });
}

size_t altiplano_context_size(llama_model * model, const llama_context_params * params, altiplano_size * out, altiplano_memory * kinds, size_t size, altiplano_error * error) {
    return guarded(error, static_cast<size_t>(0), [&]() -> size_t {
        const std::lock_guard<std::mutex> one_at_a_time(making);
        const without_memory dry(model);
        const std::unique_ptr<llama_context, freed> context(llama_init_from_model(model, *params));
        if (context == nullptr) {
            return 0;
        }
        const llama_cparams & plan = context->get_cparams();
        *out = { plan.n_ctx, plan.n_ubatch, plan.flash_attn };

        // llama.cpp's own sum would count the weights as if they were not there. So its largest graph is planned once more.
        ggml_backend_sched_t scheduler = context->get_sched();
        std::vector<size_t> computed(ggml_backend_sched_get_n_backends(scheduler), 0);
        llama_memory_t memory = context->get_memory();
        const llama_memory_context_ptr full = memory == nullptr ? nullptr : memory->init_full();
        const uint32_t tokens = std::min(plan.n_ctx, plan.n_ubatch);
        const uint32_t outputs = std::min(tokens, plan.n_outputs_max);
        if (context->graph_reserve(tokens, plan.n_seq_max, outputs, full.get(), true, computed.data()) == nullptr) {
            return 0;
        }

        size_t count = 0;
        const auto add = [&](const altiplano_memory & kind) {
            if (count < size) {
                kinds[count] = kind;
                ++count;
            }
        };
        if (memory != nullptr) {
            for (const auto & [type, bytes] : memory->memory_breakdown()) {
                add(of_kind(type, bytes, 0));
            }
        }
        for (size_t place = 0; place < computed.size(); ++place) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(scheduler, static_cast<int>(place));
            add(of_kind(ggml_backend_sched_get_buffer_type(scheduler, backend), 0, computed[place]));
        }
        return count;
    });
}

} // extern "C"

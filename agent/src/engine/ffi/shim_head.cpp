#include "shim_head.h"

#include <memory>
#include <stdexcept>

#include "guard.h"
#include "llama-ext.h"

using namespace altiplano;

extern "C" {

void altiplano_hidden(llama_context * context, bool outputs_only) {
    guarded(nullptr, 0, [&] {
        llama_set_embeddings_nextn(context, true, outputs_only);
        return 0;
    });
}

const float * altiplano_hidden_row(llama_context * context, int32_t row) {
    return guarded(nullptr, static_cast<const float *>(nullptr), [&]() -> const float * {
        return llama_get_embeddings_nextn_ith(context, row);
    });
}

int32_t altiplano_decode_head(llama_context * context, const llama_batch * batch, const float * states, size_t width, altiplano_error * error) {
    return guarded(error, static_cast<int32_t>(ALTIPLANO_EXCEPTION), [&] {
        const std::unique_ptr<llama_batch_ext, decltype(&llama_batch_ext_free)> both(llama_batch_ext_init(context), llama_batch_ext_free);
        for (int32_t i = 0; i < batch->n_tokens; ++i) {
            const int32_t at = llama_batch_ext_add_token(both.get(), batch->seq_id[i][0], batch->token[i]);
            const llama_embd state = { states + static_cast<size_t>(i) * width, 1, width };
            const bool added = at == i && llama_batch_ext_set_embd_token(both.get(), at, state)
                && llama_batch_ext_set_pos(both.get(), at, &batch->pos[i])
                && llama_batch_ext_set_output_logits(both.get(), at, batch->logits[i] != 0);
            if (!added) {
                throw std::invalid_argument("a token or its state does not go into the batch");
            }
        }
        const int32_t result = llama_process(context, LLAMA_PROCESS_TYPE_DECODE, both.get());
        if (result == 0) {
            llama_synchronize(context);
        }
        return result;
    });
}

} // extern "C"

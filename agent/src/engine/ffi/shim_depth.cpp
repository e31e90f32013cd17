#include "shim_depth.h"

#include "guard.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-kv-cache.h"

using namespace altiplano;

namespace {

// Null where the memory is another one: recurrent, of windows, or several caches together.
llama_kv_cache * plain_cache(const llama_context * context) {
    return dynamic_cast<llama_kv_cache *>(llama_get_memory(context));
}

} // namespace

extern "C" {

bool altiplano_fill(llama_context * context, llama_seq_id sequence, uint32_t count) {
    return guarded(nullptr, false, [&] {
        llama_kv_cache * cache = plain_cache(context);
        if (cache == nullptr || count == 0) {
            return false;
        }
        const uint32_t used = cache->get_cells(sequence).get_used();
        llama_batch_allocr allocr(1);
        llama_ubatch tokens = allocr.ubatch_reserve(count, 1);
        tokens.seq_id_unq[0] = sequence;
        for (uint32_t i = 0; i < count; ++i) {
            tokens.pos[i] = 0;
            tokens.n_seq_id[i] = 1;
            tokens.seq_id[i] = &sequence;
        }
        const llama_kv_cache::slot_info cells = cache->find_slot(tokens, false);
        if (cells.empty()) {
            return false;
        }
        cache->apply_ubatch(cells, tokens);
        // A cache that shares another one's cells takes none.
        return cache->get_cells(sequence).get_used() == used + count;
    });
}

uint32_t altiplano_depth(const llama_context * context, llama_seq_id sequence) {
    return guarded(nullptr, 0U, [&] {
        const llama_kv_cache * cache = plain_cache(context);
        return cache == nullptr ? 0U : cache->get_cells(sequence).used_max_p1();
    });
}

bool altiplano_flash_attention(const llama_context * context) {
    return guarded(nullptr, true, [&] { return context->get_cparams().flash_attn; });
}

} // extern "C"

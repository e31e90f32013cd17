#include "allowance.h"

#include <cstdlib>
#include <exception>

namespace {

// An allocation costs at least this: what is done with it takes longer than to write 64 bytes.
constexpr uint64_t LEAST = 64;

struct state {
    uint64_t left = 0;
    const char * lowest = nullptr;
    // For what must not throw, beyond `left`.
    uint64_t grace = 0;
    bool on = false;
};

thread_local state current;

void charge(size_t size) {
    // While an exception travels, destructors that allocate must not throw another one.
    if (std::uncaught_exceptions() > 0) {
        return;
    }
    const char here = 0;
    if (&here < current.lowest) {
        throw altiplano::exhausted("it nests too deeply");
    }
    const uint64_t cost = size < LEAST ? LEAST : size;
    if (cost <= current.left) {
        current.left -= cost;
        return;
    }
    // The JSON library's destructors, which must not throw, allocate arrays of 16-byte values: an allocation of another
    // size is soon to come.
    if (size % 16 == 0 && cost <= current.grace) {
        current.grace -= cost;
        return;
    }
    // Whoever catches this gets a little more, to say what happened.
    current.left = 1 << 20;
    throw altiplano::exhausted("it takes more than is allowed");
}

} // namespace

namespace altiplano {

allowance::allowance(uint64_t cost, size_t stack) noexcept {
    const char here = 0;
    current = { cost, &here - stack, cost / 4, true };
}

allowance::~allowance() {
    current.on = false;
}

} // namespace altiplano

// Replaces the standard library's, as C++ allows a program to: the same, but counted. Memory is malloc's, so that the
// standard `operator delete` frees it.
void * operator new(std::size_t size) {
    if (current.on) {
        charge(size);
    }
    for (;;) {
        if (void * memory = std::malloc(size == 0 ? 1 : size)) {
            return memory;
        }
        const std::new_handler handler = std::get_new_handler();
        if (handler == nullptr) {
            throw std::bad_alloc();
        }
        handler();
    }
}

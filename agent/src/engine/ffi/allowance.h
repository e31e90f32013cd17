// An end to what a computation may cost. llama.cpp's template engine, its parsers and its grammar builders know no limit
// of their own, and what they work on comes from a model file or from a client.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace altiplano {

// Thrown by `operator new` when the allowance of this thread is used up, or its stack is.
struct exhausted : std::bad_alloc {
    explicit exhausted(const char * what) : text(what) {}
    const char * what() const noexcept override { return text; }

  private:
    const char * text;
};

// While it lives, what this thread allocates is counted, whether it is freed or not: a loop that does not end allocates
// in each turn, so that this bounds time as well as memory. Not to be nested.
class allowance {
  public:
    // `cost`: bytes, at least 64 for each allocation. `stack`: bytes that calls may nest to from here on.
    allowance(uint64_t cost, size_t stack) noexcept;
    ~allowance();

    allowance(const allowance &) = delete;
    allowance & operator=(const allowance &) = delete;
};

} // namespace altiplano

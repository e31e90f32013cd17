// The account of one device's memory over all processes that use it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

namespace accounts {

// VK_MAX_MEMORY_HEAPS.
constexpr size_t HEAPS = 16;

using Bytes = std::array<uint64_t, HEAPS>;

// Bytes of each heap that are taken.
struct Taken {
    Bytes own = {};
    // By this and all other living processes.
    Bytes all = {};
};

// A process has a file of its own in the folder, with its bytes per heap, and holds a lock (flock) on it for as long as it
// lives: the kernel lets go of that lock however the process ends, so what it had counts no longer, at once.
class Account {
  public:
    // `device`: a name that is good for a file.
    Account(std::string folder, std::string device);

    // Takes so much of a heap unless all together would have more than `size` then.
    bool take(size_t heap, uint64_t bytes, uint64_t size);

    void give(size_t heap, uint64_t bytes);

    Taken look();

  private:
    class Turn;

    // Within a turn.
    Bytes others() const;
    bool write();

    std::mutex mutex;
    std::string folder;
    std::string device;
    // Of this process, once it has taken anything.
    std::string path;
    int file = -1;
    Bytes own = {};
};

} // namespace accounts

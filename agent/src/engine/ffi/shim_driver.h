// The drivers behind devices, which ggml does not name.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct altiplano_driver {
    char device[256];
    char name[256];
    char version[256];
};

// Of Vulkan's devices, where a Vulkan loader is in this process already; returns how many of at most `size` were
// written.
size_t altiplano_vulkan_drivers(struct altiplano_driver * out, size_t size);

#ifdef __cplusplus
}
#endif

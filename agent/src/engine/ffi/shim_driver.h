// The drivers behind devices, which ggml does not name.
#pragma once

#include <stdbool.h>
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

// Whether NVIDIA's driver is here, by its library. Only in a build with CUDA.
bool altiplano_cuda_driver(void);

#ifdef __cplusplus
}
#endif

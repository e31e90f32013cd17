// The functions of NVIDIA's driver that ggml-cuda calls itself. Defined here, the program does not need the driver's library in
// order to start: it is looked for at the first call, and where there is none, as on a node without a GPU, CUDA has no devices.
#include "shim_driver.h"

#include <cstddef>

#include <dlfcn.h>

namespace {

// CUDA_ERROR_STUB_LIBRARY: what the driver's library says that is there to be linked against only.
constexpr int NO_DRIVER = 34;

void * driver() {
    // It stays, as CUDA's runtime holds it too.
    static void * const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return library;
}

template <typename... Arguments>
int call(const char * name, Arguments... arguments) {
    using Function = int (*)(Arguments...);
    const auto function = driver() == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(driver(), name));
    return function == nullptr ? NO_DRIVER : function(arguments...);
}

} // namespace

// Hidden: the driver's library calls its own. As cuda.h declares them, whose CUresult, CUdevice and enums are ints and whose CUdeviceptr and allocation handle are 64 bits
// wide; without that header, of which nothing else is needed.
#pragma GCC visibility push(hidden)
extern "C" {

int cuGetErrorString(int error, const char ** text) {
    const int result = call("cuGetErrorString", error, text);
    if (result == NO_DRIVER) {
        *text = "there is no NVIDIA driver";
    }
    return result;
}

int cuDeviceGet(int * device, int ordinal) {
    return call("cuDeviceGet", device, ordinal);
}

int cuDeviceGetAttribute(int * value, int attribute, int device) {
    return call("cuDeviceGetAttribute", value, attribute, device);
}

int cuMemAddressReserve(unsigned long long * pointer, size_t size, size_t alignment, unsigned long long address,
                        unsigned long long flags) {
    return call("cuMemAddressReserve", pointer, size, alignment, address, flags);
}

int cuMemAddressFree(unsigned long long pointer, size_t size) {
    return call("cuMemAddressFree", pointer, size);
}

int cuMemCreate(unsigned long long * handle, size_t size, const void * properties, unsigned long long flags) {
    return call("cuMemCreate", handle, size, properties, flags);
}

int cuMemRelease(unsigned long long handle) {
    return call("cuMemRelease", handle);
}

int cuMemMap(unsigned long long pointer, size_t size, size_t offset, unsigned long long handle, unsigned long long flags) {
    return call("cuMemMap", pointer, size, offset, handle, flags);
}

int cuMemUnmap(unsigned long long pointer, size_t size) {
    return call("cuMemUnmap", pointer, size);
}

int cuMemSetAccess(unsigned long long pointer, size_t size, const void * access, size_t count) {
    return call("cuMemSetAccess", pointer, size, access, count);
}

int cuMemGetAllocationGranularity(size_t * granularity, const void * properties, int option) {
    return call("cuMemGetAllocationGranularity", granularity, properties, option);
}

bool altiplano_cuda_driver(void) {
    return driver() != nullptr;
}

} // extern "C"
#pragma GCC visibility pop

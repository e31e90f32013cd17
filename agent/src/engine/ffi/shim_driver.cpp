#include "shim_driver.h"

#include <cstdint>
#include <cstdio>
#include <vector>

#include <dlfcn.h>

#include "guard.h"

#if __has_include(<vulkan/vulkan.h>)
#define VK_NO_PROTOTYPES
#include <vulkan/vulkan.h>

namespace {

// More devices than any machine has.
constexpr uint32_t MAX_DEVICES = 64;

size_t drivers(PFN_vkGetInstanceProcAddr load, altiplano_driver * out, size_t size) {
    const auto create = reinterpret_cast<PFN_vkCreateInstance>(load(VK_NULL_HANDLE, "vkCreateInstance"));
    if (create == nullptr) {
        return 0;
    }
    VkApplicationInfo application = {};
    application.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO;
    application.apiVersion = VK_API_VERSION_1_2;
    VkInstanceCreateInfo info = {};
    info.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO;
    info.pApplicationInfo = &application;
    VkInstance instance = VK_NULL_HANDLE;
    if (create(&info, nullptr, &instance) != VK_SUCCESS) {
        return 0;
    }
    const auto destroy = reinterpret_cast<PFN_vkDestroyInstance>(load(instance, "vkDestroyInstance"));
    const auto enumerate = reinterpret_cast<PFN_vkEnumeratePhysicalDevices>(load(instance, "vkEnumeratePhysicalDevices"));
    const auto describe =
        reinterpret_cast<PFN_vkGetPhysicalDeviceProperties2>(load(instance, "vkGetPhysicalDeviceProperties2"));
    size_t written = 0;
    uint32_t count = MAX_DEVICES;
    std::vector<VkPhysicalDevice> devices(count);
    if (enumerate != nullptr && describe != nullptr && enumerate(instance, &count, devices.data()) >= VK_SUCCESS) {
        for (uint32_t i = 0; i < count && written < size; ++i) {
            VkPhysicalDeviceDriverProperties driver = {};
            driver.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRIVER_PROPERTIES;
            VkPhysicalDeviceProperties2 properties = {};
            properties.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2;
            properties.pNext = &driver;
            describe(devices[i], &properties);
            altiplano_driver & found = out[written++];
            std::snprintf(found.device, sizeof(found.device), "%s", properties.properties.deviceName);
            std::snprintf(found.name, sizeof(found.name), "%s", driver.driverName);
            std::snprintf(found.version, sizeof(found.version), "%s", driver.driverInfo);
        }
    }
    if (destroy != nullptr) {
        destroy(instance, nullptr);
    }
    return written;
}

} // namespace
#endif

extern "C" size_t altiplano_vulkan_drivers(altiplano_driver * out, size_t size) {
    return altiplano::guarded(nullptr, static_cast<size_t>(0), [&]() -> size_t {
#if __has_include(<vulkan/vulkan.h>)
        // What ggml has loaded; the library stays, as ggml holds it too.
        void * library = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_NOLOAD);
        if (library == nullptr) {
            return 0;
        }
        const auto load = reinterpret_cast<PFN_vkGetInstanceProcAddr>(dlsym(library, "vkGetInstanceProcAddr"));
        const size_t written = load == nullptr ? 0 : drivers(load, out, size);
        dlclose(library);
        return written;
#else
        (void) out;
        (void) size;
        return 0;
#endif
    });
}

// A Vulkan layer that keeps one account of a device's memory over all processes, as the driver of a GPU does and Mesa's
// software driver does not: that one calls all of its memory free at any time, and gives each process as much as the heap
// is large.
//
// Nothing is faked but this bookkeeping. Every allocation goes to the driver below and is its memory; what this layer adds:
// * vkAllocateMemory fails with VK_ERROR_OUT_OF_DEVICE_MEMORY where all living processes together would have more of a
//   device's heap than it is large; vkFreeMemory, and the end of a process however it comes, give back.
// * VK_EXT_memory_budget: heapUsage is what this process has taken, heapBudget what it may have in all, which is the heap
//   less what others have taken.
// * A driver whose only heap is the device's (the software driver's is) gets a second one, of host memory, as a discrete GPU
//   has it: what a program wants to have cached for the host, such as buffers for copies, is not the device's there. For the
//   driver below it is the same memory.
//
// The folder of the account is named by ALTIPLANO_VULKAN_ACCOUNTS. Without it nothing is changed.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <unistd.h>

#include <vulkan/vk_layer.h>
#include <vulkan/vulkan.h>

#include "account.h"

namespace {

constexpr const char * NAME = "VK_LAYER_ALTIPLANO_accounts";

// What a device's memory looks like from above.
struct Layout {
    VkPhysicalDeviceMemoryProperties memory = {};
    // The driver's type for each type.
    uint32_t driver_type[VK_MAX_MEMORY_TYPES] = {};
    // The types of host memory that stand beside a type of the driver, as bits.
    uint32_t added[VK_MAX_MEMORY_TYPES] = {};

    bool is_device(uint32_t heap) const {
        return (memory.memoryHeaps[heap].flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) != 0;
    }

    uint32_t with_added(uint32_t bits) const {
        uint32_t all = bits;
        for (uint32_t type = 0; type < VK_MAX_MEMORY_TYPES; ++type) {
            all |= (bits >> type & 1) != 0 ? added[type] : 0;
        }
        return all;
    }
};

struct Physical {
    Layout layout;
    std::shared_ptr<accounts::Account> account;
};

struct Instance {
    VkInstance handle = VK_NULL_HANDLE;
    PFN_vkGetInstanceProcAddr load = nullptr;
    // Those of the next layer, or of the driver: asked for later, the loader would name the first layer's.
    PFN_vkDestroyInstance destroy = nullptr;
    PFN_vkEnumerateDeviceExtensionProperties extensions = nullptr;
    PFN_vkGetPhysicalDeviceMemoryProperties memory = nullptr;
    PFN_vkGetPhysicalDeviceMemoryProperties2 memory_2 = nullptr;
    PFN_vkGetPhysicalDeviceProperties2 properties_2 = nullptr;
    std::map<VkPhysicalDevice, std::shared_ptr<Physical>> physical;

    Instance(VkInstance handle, PFN_vkGetInstanceProcAddr load) : handle(handle), load(load) {
        find(destroy, "vkDestroyInstance");
        find(extensions, "vkEnumerateDeviceExtensionProperties");
        find(memory, "vkGetPhysicalDeviceMemoryProperties");
        find(memory_2, "vkGetPhysicalDeviceMemoryProperties2");
        find(properties_2, "vkGetPhysicalDeviceProperties2");
    }

    template <typename Function> void find(Function & function, const char * name) const {
        function = reinterpret_cast<Function>(load(handle, name));
    }
};

struct Allocation {
    uint32_t heap;
    uint64_t bytes;
};

struct Device {
    VkDevice handle = VK_NULL_HANDLE;
    PFN_vkGetDeviceProcAddr load = nullptr;
    std::shared_ptr<Physical> physical;
    std::unordered_map<VkDeviceMemory, Allocation> allocations;

    template <typename Function> Function next(const char * name) const {
        return reinterpret_cast<Function>(load(handle, name));
    }
};

// Guards everything below, but is not held while the driver works.
std::mutex mutex;
std::unordered_map<void *, std::shared_ptr<Instance>> instances;
std::unordered_map<void *, std::shared_ptr<Device>> devices;
// One for each device in a process, however many instances it makes.
std::map<std::string, std::shared_ptr<accounts::Account>> known_accounts;

// Handles begin with the loader's table: the one of an instance is its physical devices', too.
template <typename Handle> void * key(Handle handle) {
    return *reinterpret_cast<void **>(handle);
}

template <typename Handle> std::shared_ptr<Instance> instance_of(Handle handle) {
    const std::lock_guard<std::mutex> lock(mutex);
    return instances.at(key(handle));
}

std::shared_ptr<Device> device_of(VkDevice handle) {
    const std::lock_guard<std::mutex> lock(mutex);
    return devices.at(key(handle));
}

Layout layout_of(const VkPhysicalDeviceMemoryProperties & driver) {
    Layout layout;
    layout.memory = driver;
    bool only_device = true;
    for (uint32_t heap = 0; heap < driver.memoryHeapCount; ++heap) {
        only_device = only_device && layout.is_device(heap);
    }
    for (uint32_t type = 0; type < driver.memoryTypeCount; ++type) {
        layout.driver_type[type] = type;
    }
    if (!only_device || driver.memoryHeapCount == VK_MAX_MEMORY_HEAPS) {
        return layout;
    }
    const uint32_t host = layout.memory.memoryHeapCount++;
    const auto pages = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES));
    layout.memory.memoryHeaps[host] = {pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE)), 0};
    for (uint32_t type = 0; type < driver.memoryTypeCount; ++type) {
        VkMemoryType & known = layout.memory.memoryTypes[type];
        const bool is_visible = (known.propertyFlags & VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT) != 0;
        if (is_visible && layout.memory.memoryTypeCount < VK_MAX_MEMORY_TYPES) {
            const uint32_t added = layout.memory.memoryTypeCount++;
            layout.memory.memoryTypes[added] = {known.propertyFlags & ~VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT, host};
            layout.driver_type[added] = type;
            layout.added[type] |= 1U << added;
            // A GPU's own memory is written through its window, not cached.
            known.propertyFlags &= ~VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
        }
    }
    return layout;
}

std::shared_ptr<accounts::Account> account_of(const Instance & instance, VkPhysicalDevice device) {
    const char * folder = std::getenv("ALTIPLANO_VULKAN_ACCOUNTS");
    if (folder == nullptr || instance.properties_2 == nullptr || instance.memory_2 == nullptr) {
        return nullptr;
    }
    VkPhysicalDeviceIDProperties id = {};
    id.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES;
    VkPhysicalDeviceProperties2 properties = {};
    properties.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2;
    properties.pNext = &id;
    instance.properties_2(device, &properties);
    std::string name;
    for (const uint8_t byte : id.deviceUUID) {
        char digits[3];
        std::snprintf(digits, sizeof(digits), "%02x", byte);
        name += digits;
    }
    auto & account = known_accounts[name];
    if (account == nullptr) {
        account = std::make_shared<accounts::Account>(folder, name);
    }
    return account;
}

// Null where nothing is to be accounted.
std::shared_ptr<Physical> physical_of(VkPhysicalDevice device) {
    const std::lock_guard<std::mutex> lock(mutex);
    Instance & instance = *instances.at(key(device));
    const auto known = instance.physical.find(device);
    if (known != instance.physical.end()) {
        return known->second;
    }
    std::shared_ptr<Physical> found;
    const auto account = account_of(instance, device);
    if (account != nullptr) {
        VkPhysicalDeviceMemoryProperties memory = {};
        instance.memory(device, &memory);
        found = std::make_shared<Physical>(Physical{layout_of(memory), account});
    }
    instance.physical.emplace(device, found);
    return found;
}

template <typename Info> Info * chain_info(const void * next, VkStructureType type) {
    auto * info = static_cast<Info *>(const_cast<void *>(next));
    while (info != nullptr && (info->sType != type || info->function != VK_LAYER_LINK_INFO)) {
        info = static_cast<Info *>(const_cast<void *>(info->pNext));
    }
    return info;
}

const VkBaseInStructure * find(const void * next, VkStructureType type) {
    const auto * found = static_cast<const VkBaseInStructure *>(next);
    while (found != nullptr && found->sType != type) {
        found = found->pNext;
    }
    return found;
}

VKAPI_ATTR VkResult VKAPI_CALL create_instance(
    const VkInstanceCreateInfo * info, const VkAllocationCallbacks * allocator, VkInstance * out) {
    auto * link = chain_info<VkLayerInstanceCreateInfo>(info->pNext, VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO);
    if (link == nullptr) {
        return VK_ERROR_INITIALIZATION_FAILED;
    }
    const auto load = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    const auto create = reinterpret_cast<PFN_vkCreateInstance>(load(VK_NULL_HANDLE, "vkCreateInstance"));
    const VkResult result = create(info, allocator, out);
    if (result == VK_SUCCESS) {
        auto instance = std::make_shared<Instance>(*out, load);
        const std::lock_guard<std::mutex> lock(mutex);
        instances[key(*out)] = std::move(instance);
    }
    return result;
}

VKAPI_ATTR void VKAPI_CALL destroy_instance(VkInstance handle, const VkAllocationCallbacks * allocator) {
    if (handle == VK_NULL_HANDLE) {
        return;
    }
    const auto instance = instance_of(handle);
    {
        const std::lock_guard<std::mutex> lock(mutex);
        instances.erase(key(handle));
    }
    instance->destroy(handle, allocator);
}

VKAPI_ATTR void VKAPI_CALL memory_properties(VkPhysicalDevice device, VkPhysicalDeviceMemoryProperties * out) {
    instance_of(device)->memory(device, out);
    if (const auto physical = physical_of(device)) {
        *out = physical->layout.memory;
    }
}

VKAPI_ATTR void VKAPI_CALL memory_properties_2(VkPhysicalDevice device, VkPhysicalDeviceMemoryProperties2 * out) {
    instance_of(device)->memory_2(device, out);
    const auto physical = physical_of(device);
    if (physical == nullptr) {
        return;
    }
    const Layout & layout = physical->layout;
    out->memoryProperties = layout.memory;
    const auto * budget = find(out->pNext, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT);
    if (budget == nullptr) {
        return;
    }
    auto & said = *reinterpret_cast<VkPhysicalDeviceMemoryBudgetPropertiesEXT *>(const_cast<VkBaseInStructure *>(budget));
    const accounts::Taken taken = physical->account->look();
    for (uint32_t heap = 0; heap < VK_MAX_MEMORY_HEAPS; ++heap) {
        // For heaps that there are not, both are zero.
        const bool is_there = heap < layout.memory.memoryHeapCount;
        const uint64_t size = is_there ? layout.memory.memoryHeaps[heap].size : 0;
        const uint64_t others = is_there && layout.is_device(heap) ? taken.all[heap] - taken.own[heap] : 0;
        said.heapUsage[heap] = is_there ? taken.own[heap] : 0;
        said.heapBudget[heap] = size - std::min(size, others);
    }
}

bool is_budget(const char * name) {
    return std::strcmp(name, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME) == 0;
}

VkResult driver_extensions(VkPhysicalDevice device, std::vector<VkExtensionProperties> & all) {
    const auto enumerate = instance_of(device)->extensions;
    uint32_t count = 0;
    VkResult result = enumerate(device, nullptr, &count, nullptr);
    if (result == VK_SUCCESS) {
        all.resize(count);
        result = enumerate(device, nullptr, &count, all.data());
        all.resize(count);
    }
    return result;
}

VKAPI_ATTR VkResult VKAPI_CALL device_extensions(
    VkPhysicalDevice device, const char * layer, uint32_t * count, VkExtensionProperties * out) {
    std::vector<VkExtensionProperties> all;
    const bool is_ours = layer != nullptr && std::strcmp(layer, NAME) == 0;
    if (!is_ours && layer != nullptr) {
        return instance_of(device)->extensions(device, layer, count, out);
    }
    if (!is_ours) {
        const VkResult result = driver_extensions(device, all);
        if (result < VK_SUCCESS) {
            return result;
        }
    }
    const bool is_known =
        std::any_of(all.begin(), all.end(), [](const auto & known) { return is_budget(known.extensionName); });
    if (!is_known && (is_ours || physical_of(device) != nullptr)) {
        VkExtensionProperties budget = {};
        std::strcpy(budget.extensionName, VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
        budget.specVersion = VK_EXT_MEMORY_BUDGET_SPEC_VERSION;
        all.push_back(budget);
    }
    if (out == nullptr) {
        *count = static_cast<uint32_t>(all.size());
        return VK_SUCCESS;
    }
    *count = std::min(*count, static_cast<uint32_t>(all.size()));
    std::copy_n(all.begin(), *count, out);
    return *count < all.size() ? VK_INCOMPLETE : VK_SUCCESS;
}

VKAPI_ATTR VkResult VKAPI_CALL create_device(
    VkPhysicalDevice physical, const VkDeviceCreateInfo * info, const VkAllocationCallbacks * allocator, VkDevice * out) {
    auto * link = chain_info<VkLayerDeviceCreateInfo>(info->pNext, VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO);
    if (link == nullptr) {
        return VK_ERROR_INITIALIZATION_FAILED;
    }
    const auto load_instance = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    const auto load = link->u.pLayerInfo->pfnNextGetDeviceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    std::vector<VkExtensionProperties> all;
    VkResult result = driver_extensions(physical, all);
    if (result < VK_SUCCESS) {
        return result;
    }
    // What is announced here is not the driver's to enable.
    std::vector<const char *> enabled(
        info->ppEnabledExtensionNames, info->ppEnabledExtensionNames + info->enabledExtensionCount);
    if (std::none_of(all.begin(), all.end(), [](const auto & known) { return is_budget(known.extensionName); })) {
        enabled.erase(std::remove_if(enabled.begin(), enabled.end(), is_budget), enabled.end());
    }
    VkDeviceCreateInfo changed = *info;
    changed.enabledExtensionCount = static_cast<uint32_t>(enabled.size());
    changed.ppEnabledExtensionNames = enabled.data();
    const VkInstance instance = instance_of(physical)->handle;
    const auto create = reinterpret_cast<PFN_vkCreateDevice>(load_instance(instance, "vkCreateDevice"));
    result = create(physical, &changed, allocator, out);
    if (result == VK_SUCCESS) {
        auto device = std::make_shared<Device>();
        device->handle = *out;
        device->load = load;
        device->physical = physical_of(physical);
        const std::lock_guard<std::mutex> lock(mutex);
        devices[key(*out)] = std::move(device);
    }
    return result;
}

VKAPI_ATTR void VKAPI_CALL destroy_device(VkDevice handle, const VkAllocationCallbacks * allocator) {
    if (handle == VK_NULL_HANDLE) {
        return;
    }
    const auto device = device_of(handle);
    {
        const std::lock_guard<std::mutex> lock(mutex);
        devices.erase(key(handle));
    }
    device->next<PFN_vkDestroyDevice>("vkDestroyDevice")(handle, allocator);
    for (const auto & [memory, allocation] : device->allocations) {
        device->physical->account->give(allocation.heap, allocation.bytes);
    }
}

// Memory that is somebody's already.
bool is_import(const void * next) {
    return find(next, VK_STRUCTURE_TYPE_IMPORT_MEMORY_HOST_POINTER_INFO_EXT) != nullptr ||
           find(next, VK_STRUCTURE_TYPE_IMPORT_MEMORY_FD_INFO_KHR) != nullptr;
}

VKAPI_ATTR VkResult VKAPI_CALL allocate_memory(
    VkDevice handle, const VkMemoryAllocateInfo * info, const VkAllocationCallbacks * allocator, VkDeviceMemory * out) {
    const auto device = device_of(handle);
    const auto allocate = device->next<PFN_vkAllocateMemory>("vkAllocateMemory");
    if (device->physical == nullptr) {
        return allocate(handle, info, allocator, out);
    }
    const Layout & layout = device->physical->layout;
    accounts::Account & account = *device->physical->account;
    VkMemoryAllocateInfo changed = *info;
    changed.memoryTypeIndex = layout.driver_type[info->memoryTypeIndex];
    if (is_import(info->pNext)) {
        return allocate(handle, &changed, allocator, out);
    }
    const uint32_t heap = layout.memory.memoryTypes[info->memoryTypeIndex].heapIndex;
    const uint64_t size = layout.is_device(heap) ? layout.memory.memoryHeaps[heap].size : UINT64_MAX;
    if (!account.take(heap, info->allocationSize, size)) {
        return VK_ERROR_OUT_OF_DEVICE_MEMORY;
    }
    const VkResult result = allocate(handle, &changed, allocator, out);
    if (result != VK_SUCCESS) {
        account.give(heap, info->allocationSize);
        return result;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    device->allocations[*out] = {heap, info->allocationSize};
    return result;
}

VKAPI_ATTR void VKAPI_CALL free_memory(VkDevice handle, VkDeviceMemory memory, const VkAllocationCallbacks * allocator) {
    const auto device = device_of(handle);
    Allocation freed = {0, 0};
    {
        // Before the driver may give the handle to somebody else.
        const std::lock_guard<std::mutex> lock(mutex);
        const auto known = device->allocations.find(memory);
        if (known != device->allocations.end()) {
            freed = known->second;
            device->allocations.erase(known);
        }
    }
    device->next<PFN_vkFreeMemory>("vkFreeMemory")(handle, memory, allocator);
    if (freed.bytes > 0) {
        device->physical->account->give(freed.heap, freed.bytes);
    }
}

// What may lie in a type of the driver may lie in the host memory beside it.
void add_types(const Device & device, VkMemoryRequirements & requirements) {
    if (device.physical != nullptr) {
        requirements.memoryTypeBits = device.physical->layout.with_added(requirements.memoryTypeBits);
    }
}

VKAPI_ATTR void VKAPI_CALL buffer_requirements(VkDevice handle, VkBuffer buffer, VkMemoryRequirements * out) {
    const auto device = device_of(handle);
    device->next<PFN_vkGetBufferMemoryRequirements>("vkGetBufferMemoryRequirements")(handle, buffer, out);
    add_types(*device, *out);
}

VKAPI_ATTR void VKAPI_CALL buffer_requirements_2(
    VkDevice handle, const VkBufferMemoryRequirementsInfo2 * info, VkMemoryRequirements2 * out) {
    const auto device = device_of(handle);
    device->next<PFN_vkGetBufferMemoryRequirements2>("vkGetBufferMemoryRequirements2")(handle, info, out);
    add_types(*device, out->memoryRequirements);
}

VKAPI_ATTR void VKAPI_CALL future_buffer_requirements(
    VkDevice handle, const VkDeviceBufferMemoryRequirements * info, VkMemoryRequirements2 * out) {
    const auto device = device_of(handle);
    device->next<PFN_vkGetDeviceBufferMemoryRequirements>("vkGetDeviceBufferMemoryRequirements")(handle, info, out);
    add_types(*device, out->memoryRequirements);
}

VKAPI_ATTR VkResult VKAPI_CALL host_pointer_properties(
    VkDevice handle, VkExternalMemoryHandleTypeFlagBits type, const void * pointer, VkMemoryHostPointerPropertiesEXT * out) {
    const auto device = device_of(handle);
    const auto next = device->next<PFN_vkGetMemoryHostPointerPropertiesEXT>("vkGetMemoryHostPointerPropertiesEXT");
    const VkResult result = next(handle, type, pointer, out);
    if (result == VK_SUCCESS && device->physical != nullptr) {
        out->memoryTypeBits = device->physical->layout.with_added(out->memoryTypeBits);
    }
    return result;
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL load_instance_function(VkInstance handle, const char * name);
VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL load_device_function(VkDevice handle, const char * name);

struct Known {
    const char * name;
    PFN_vkVoidFunction function;
};

#define KNOWN(name, function) {name, reinterpret_cast<PFN_vkVoidFunction>(function)}

const Known OF_INSTANCES[] = {
    KNOWN("vkGetInstanceProcAddr", load_instance_function),
    KNOWN("vkCreateInstance", create_instance),
    KNOWN("vkDestroyInstance", destroy_instance),
    KNOWN("vkCreateDevice", create_device),
    KNOWN("vkEnumerateDeviceExtensionProperties", device_extensions),
    KNOWN("vkGetPhysicalDeviceMemoryProperties", memory_properties),
    KNOWN("vkGetPhysicalDeviceMemoryProperties2", memory_properties_2),
    KNOWN("vkGetPhysicalDeviceMemoryProperties2KHR", memory_properties_2),
};

const Known OF_DEVICES[] = {
    KNOWN("vkGetDeviceProcAddr", load_device_function),
    KNOWN("vkDestroyDevice", destroy_device),
    KNOWN("vkAllocateMemory", allocate_memory),
    KNOWN("vkFreeMemory", free_memory),
    KNOWN("vkGetBufferMemoryRequirements", buffer_requirements),
    KNOWN("vkGetBufferMemoryRequirements2", buffer_requirements_2),
    KNOWN("vkGetBufferMemoryRequirements2KHR", buffer_requirements_2),
    KNOWN("vkGetDeviceBufferMemoryRequirements", future_buffer_requirements),
    KNOWN("vkGetDeviceBufferMemoryRequirementsKHR", future_buffer_requirements),
    KNOWN("vkGetMemoryHostPointerPropertiesEXT", host_pointer_properties),
};

template <size_t SIZE> PFN_vkVoidFunction ours(const Known (&all)[SIZE], const char * name) {
    const auto * found =
        std::find_if(std::begin(all), std::end(all), [&](const Known & known) { return std::strcmp(known.name, name) == 0; });
    return found == std::end(all) ? nullptr : found->function;
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL load_instance_function(VkInstance handle, const char * name) {
    for (const auto function : {ours(OF_INSTANCES, name), ours(OF_DEVICES, name)}) {
        if (function != nullptr) {
            return function;
        }
    }
    return handle == VK_NULL_HANDLE ? nullptr : instance_of(handle)->load(handle, name);
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL load_device_function(VkDevice handle, const char * name) {
    const auto next = device_of(handle)->load(handle, name);
    const auto function = ours(OF_DEVICES, name);
    // What the driver does not have is not here either.
    return next != nullptr && function != nullptr ? function : next;
}

} // namespace

// Newer headers do not say any more how a symbol is made visible.
extern "C" __attribute__((visibility("default"))) VKAPI_ATTR VkResult VKAPI_CALL
vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface * negotiated) {
    if (negotiated == nullptr || negotiated->sType != LAYER_NEGOTIATE_INTERFACE_STRUCT ||
        negotiated->loaderLayerInterfaceVersion < 2) {
        return VK_ERROR_INITIALIZATION_FAILED;
    }
    negotiated->loaderLayerInterfaceVersion = 2;
    negotiated->pfnGetInstanceProcAddr = load_instance_function;
    negotiated->pfnGetDeviceProcAddr = load_device_function;
    negotiated->pfnGetPhysicalDeviceProcAddr = nullptr;
    return VK_SUCCESS;
}

// Holds memory of the first Vulkan device, as any other program on a machine may. Reads from standard input how many bytes
// it is to hold in all, a number a line, and answers with the bytes that it holds then and those that the driver calls free.
// It ends with its standard input.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <dlfcn.h>

#define VK_NO_PROTOTYPES
#include <vulkan/vulkan.h>

namespace {

// Drivers allocate no more at once than some limit; this is below all of them.
constexpr uint64_t PIECE = 64U << 20;

struct Holder {
    VkInstance instance = VK_NULL_HANDLE;
    VkPhysicalDevice physical = VK_NULL_HANDLE;
    VkDevice device = VK_NULL_HANDLE;
    PFN_vkGetPhysicalDeviceMemoryProperties2 properties = nullptr;
    PFN_vkAllocateMemory allocate = nullptr;
    PFN_vkFreeMemory free = nullptr;
    uint32_t type = 0;
    uint32_t heap = 0;
    uint64_t held = 0;
    struct Piece {
        VkDeviceMemory memory;
        uint64_t bytes;
    };
    std::vector<Piece> pieces;

    bool open();
    void hold(uint64_t bytes);
    uint64_t available() const;
};

bool Holder::open() {
    void * library = dlopen("libvulkan.so.1", RTLD_NOW);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return false;
    }
    const auto load = reinterpret_cast<PFN_vkGetInstanceProcAddr>(dlsym(library, "vkGetInstanceProcAddr"));
    const auto create = reinterpret_cast<PFN_vkCreateInstance>(load(VK_NULL_HANDLE, "vkCreateInstance"));
    VkApplicationInfo application = {};
    application.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO;
    application.apiVersion = VK_API_VERSION_1_2;
    VkInstanceCreateInfo info = {};
    info.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO;
    info.pApplicationInfo = &application;
    if (create(&info, nullptr, &instance) != VK_SUCCESS) {
        return false;
    }
    const auto enumerate = reinterpret_cast<PFN_vkEnumeratePhysicalDevices>(load(instance, "vkEnumeratePhysicalDevices"));
    uint32_t count = 1;
    if (enumerate(instance, &count, &physical) < VK_SUCCESS || count == 0) {
        return false;
    }
    properties = reinterpret_cast<PFN_vkGetPhysicalDeviceMemoryProperties2>(
        load(instance, "vkGetPhysicalDeviceMemoryProperties2"));
    VkPhysicalDeviceMemoryProperties2 memory = {};
    memory.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2;
    properties(physical, &memory);
    const auto & all = memory.memoryProperties;
    const auto * found = std::find_if(all.memoryTypes, all.memoryTypes + all.memoryTypeCount, [](const auto & type) {
        return (type.propertyFlags & VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT) != 0;
    });
    type = static_cast<uint32_t>(found - all.memoryTypes);
    heap = found->heapIndex;

    const float priority = 1;
    VkDeviceQueueCreateInfo queue = {};
    queue.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO;
    queue.queueCount = 1;
    queue.pQueuePriorities = &priority;
    const char * budget = VK_EXT_MEMORY_BUDGET_EXTENSION_NAME;
    VkDeviceCreateInfo wanted = {};
    wanted.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO;
    wanted.queueCreateInfoCount = 1;
    wanted.pQueueCreateInfos = &queue;
    wanted.enabledExtensionCount = 1;
    wanted.ppEnabledExtensionNames = &budget;
    const auto create_device = reinterpret_cast<PFN_vkCreateDevice>(load(instance, "vkCreateDevice"));
    if (create_device(physical, &wanted, nullptr, &device) != VK_SUCCESS) {
        return false;
    }
    allocate = reinterpret_cast<PFN_vkAllocateMemory>(load(instance, "vkAllocateMemory"));
    free = reinterpret_cast<PFN_vkFreeMemory>(load(instance, "vkFreeMemory"));
    return true;
}

void Holder::hold(uint64_t bytes) {
    while (held > bytes) {
        free(device, pieces.back().memory, nullptr);
        held -= pieces.back().bytes;
        pieces.pop_back();
    }
    while (held < bytes) {
        VkMemoryAllocateInfo info = {};
        info.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO;
        info.allocationSize = std::min(PIECE, bytes - held);
        info.memoryTypeIndex = type;
        VkDeviceMemory memory = VK_NULL_HANDLE;
        if (allocate(device, &info, nullptr, &memory) != VK_SUCCESS) {
            return;
        }
        pieces.push_back({memory, info.allocationSize});
        held += info.allocationSize;
    }
}

uint64_t Holder::available() const {
    VkPhysicalDeviceMemoryBudgetPropertiesEXT budget = {};
    budget.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT;
    VkPhysicalDeviceMemoryProperties2 memory = {};
    memory.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2;
    memory.pNext = &budget;
    properties(physical, &memory);
    return budget.heapBudget[heap] - budget.heapUsage[heap];
}

} // namespace

int main() {
    Holder holder;
    if (!holder.open()) {
        std::fprintf(stderr, "no Vulkan device that says what is free\n");
        return 1;
    }
    unsigned long long bytes = 0;
    while (std::scanf("%llu", &bytes) == 1) {
        holder.hold(bytes);
        std::printf("%llu %llu\n", static_cast<unsigned long long>(holder.held),
                    static_cast<unsigned long long>(holder.available()));
        std::fflush(stdout);
    }
    return 0;
}

#include "account.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

namespace accounts {

// One process at a time looks and changes.
class Account::Turn {
  public:
    explicit Turn(Account & account) : in_process(account.mutex) {
        const std::string lock = account.folder + "/lock." + account.device;
        file = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (file < 0 || flock(file, LOCK_EX) != 0) {
            // No account is worse than no test.
            std::perror(lock.c_str());
            std::abort();
        }
    }
    ~Turn() { close(file); }
    Turn(const Turn &) = delete;
    Turn & operator=(const Turn &) = delete;

  private:
    std::lock_guard<std::mutex> in_process;
    int file;
};

Account::Account(std::string folder, std::string device) : folder(std::move(folder)), device(std::move(device)) {}

bool Account::take(size_t heap, uint64_t bytes, uint64_t size) {
    const Turn turn(*this);
    const uint64_t taken = others()[heap] + own[heap];
    if (bytes > size || taken > size - bytes) {
        return false;
    }
    own[heap] += bytes;
    if (!write()) {
        own[heap] -= bytes;
        return false;
    }
    return true;
}

void Account::give(size_t heap, uint64_t bytes) {
    const Turn turn(*this);
    own[heap] -= bytes < own[heap] ? bytes : own[heap];
    write();
}

Taken Account::look() {
    const Turn turn(*this);
    Taken taken = {own, others()};
    for (size_t heap = 0; heap < HEAPS; ++heap) {
        taken.all[heap] += own[heap];
    }
    return taken;
}

Bytes Account::others() const {
    Bytes sum = {};
    DIR * entries = opendir(folder.c_str());
    if (entries == nullptr) {
        std::perror(folder.c_str());
        std::abort();
    }
    const std::string prefix = "held." + device + ".";
    while (const dirent * entry = readdir(entries)) {
        const std::string other = folder + "/" + entry->d_name;
        if (std::strncmp(entry->d_name, prefix.c_str(), prefix.size()) != 0 || other == path) {
            continue;
        }
        const int found = open(other.c_str(), O_RDONLY | O_CLOEXEC);
        if (found < 0) {
            continue;
        }
        Bytes held = {};
        if (flock(found, LOCK_SH | LOCK_NB) == 0) {
            // Its process has ended.
            unlink(other.c_str());
        } else if (pread(found, held.data(), sizeof(held), 0) == static_cast<ssize_t>(sizeof(held))) {
            for (size_t heap = 0; heap < HEAPS; ++heap) {
                sum[heap] += held[heap];
            }
        }
        close(found);
    }
    closedir(entries);
    return sum;
}

bool Account::write() {
    if (file < 0) {
        std::string name = folder + "/held." + device + ".XXXXXX";
        file = mkostemp(name.data(), O_CLOEXEC);
        if (file < 0 || flock(file, LOCK_EX) != 0) {
            std::perror(name.c_str());
            std::abort();
        }
        path = name;
    }
    return pwrite(file, own.data(), sizeof(own), 0) == static_cast<ssize_t>(sizeof(own));
}

} // namespace accounts

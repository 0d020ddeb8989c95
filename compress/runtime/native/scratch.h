// Memory of a thread that is kept between calls: fresh pages cost more than the work that is done in them.
#pragma once

#include <cstdlib>

#include "common.h"

namespace sq {

class Scratch {
  public:
    // At least `bytes`, 64-byte aligned, valid until this thread asks again.
    void* of(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = (bytes + 63) / 64 * 64;
            memory_ = std::aligned_alloc(64, static_cast<size_t>(size_));
            if (!memory_) std::abort();  // as the C++ runtime would, without exceptions through C
        }
        return memory_;
    }
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

  private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace sq

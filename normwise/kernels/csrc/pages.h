// Whether an output is better written past the caches.
//
// A store to memory that is not in the cache reads it first. Where an output does not fit the cache anyway, storing
// past it saves that read: a third of a forward's traffic. But the first store to a fresh page must go through the
// kernel, which leaves the page in the cache: there it costs more than it saves.
#pragma once

#include <cstdint>
#include <cstdio>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace normwise {

#if defined(__linux__)

// Bytes of the last cache that one core reaches, or of a usual one. `sysconf` may tell the sum of all such caches.
inline int64_t last_cache() {
  static const int64_t bytes = [] {
    long kibibytes = 0;
    if (FILE* told = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re")) {
      for (int c; (c = std::fgetc(told)) >= '0' && c <= '9';) kibibytes = 10 * kibibytes + (c - '0');
      std::fclose(told);
    }
    return kibibytes > 0 ? int64_t(kibibytes) << 10 : int64_t(1) << 25;
  }();
  return bytes;
}

// Whether pages are there, as far as a few of them tell.
inline bool are_warm(const void* memory, int64_t bytes) {
  constexpr int kLooks = 16;
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), first = reinterpret_cast<uintptr_t>(memory);
  for (int look = 0; look < kLooks; ++look) {
    const uintptr_t at = first + uintptr_t(bytes - 1) / (kLooks - 1) * look;
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(at / page * page), page, &resident) != 0 || !(resident & 1)) return false;
  }
  return true;
}

inline bool pays_to_stream(const void* output, int64_t bytes) {
  return output && bytes >= last_cache() && are_warm(output, bytes);
}

#else

inline int64_t last_cache() { return 0; }
inline bool pays_to_stream(const void*, int64_t) { return false; }

#endif

}  // namespace normwise

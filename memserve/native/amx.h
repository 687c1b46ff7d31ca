// Intel AMX for the kernels that multiply bfloat16 matrices: permission, tile shapes, and a fence.
//
// MEMSERVE_AMX says whether this build may use it; whether the kernel of the system lets us is known
// only at run time, by `request_amx`.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define MEMSERVE_AMX 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace memserve {

// Asks Linux, once per process, for the tile registers. All threads may use them afterwards.
inline bool request_amx() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023;
    constexpr long XFEATURE_XTILEDATA = 18;
    static const bool granted =
        syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

// The compiler doesn't see that tile loads read memory: without this, stores to it may come later.
inline void fence_tile_loads() { asm volatile("" ::: "memory"); }

// The tile registers of this thread while it lives: `rows[i]` rows of 64 bytes in register i.
class Tiles {
   public:
    explicit Tiles(const uint8_t (&rows)[8]) {
        struct alignas(64) {
            uint8_t palette, start, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } config = {};
        config.palette = 1;
        for (int i = 0; i < 8; i++) {
            config.row_bytes[i] = 64;
            config.rows[i] = rows[i];
        }
        // For the compiler the next instruction reads only 8 bytes of it.
        asm volatile("" ::"r"(&config) : "memory");
        _tile_loadconfig(&config);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
};

}  // namespace memserve
#else
#define MEMSERVE_AMX 0
#endif

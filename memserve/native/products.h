// Products of small matrices for attention over long chunks, and the transposition of operands.
//
// The result has its columns in the lanes of vectors, 16 of them a panel. Operands are float, or
// bfloat16 for AMX, whose caller holds `Registers`; sums are float.
#pragma once

#include <utility>

#include "amx.h"
#include "kernels.h"

namespace memserve {

// sums [num_panels][size, 16] = left [size, depth] x right [num_panels][depth, 16], or += .
template <class E>
struct Product {
    const E* left;
    int64_t left_stride;
    const E* right;
    float* sums;
    int size;   // multiple of 32
    int depth;  // multiple of 32
    int num_panels;
    bool add;
};

// M lines of the result in P panels, whose sums stay in registers.
template <int M, int P>
inline void multiply_some(const Product<float>& product, int line, int panel) {
    floats sums[M][P];
    float* target = product.sums + (panel * product.size + line) * LANES;
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++)
            sums[m][p] = product.add ? load(target + (p * product.size + m) * LANES) : floats{};
    const float* left = product.left + line * product.left_stride;
    const float* right = product.right + panel * product.depth * LANES;
    for (int k = 0; k < product.depth; k++, left++, right += LANES) {
        floats factors[P];
        for (int p = 0; p < P; p++) factors[p] = load(right + p * product.depth * LANES);
        for (int m = 0; m < M; m++)
            for (int p = 0; p < P; p++)
                sums[m][p] += left[m * product.left_stride] * factors[p];
    }
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) store(target + (p * product.size + m) * LANES, sums[m][p]);
}

// 32 lines of the result in P panels.
template <int P>
inline void multiply_part(const Product<float>& product, int line, int panel) {
    for (int m = 0; m < 32; m += 8) multiply_some<8, P>(product, line + m, panel);
}

#if MEMSERVE_AMX
// 32 lines of the result in P panels: registers 0 to 3 sums, 4 and 5 left, 6 and 7 right.
template <int P>
inline void multiply_part(const Product<bfloat16>& product, int line, int panel) {
    constexpr int STRIDE = LANES * sizeof(float);
    fence_tile_loads();
    float* sums[2][2];
    for (int m = 0; m < 2; m++)
        for (int p = 0; p < P; p++)
            sums[m][p] = product.sums + ((panel + p) * product.size + line + m * 16) * LANES;
    if (product.add) {
        _tile_loadd(0, sums[0][0], STRIDE);
        _tile_loadd(2, sums[1][0], STRIDE);
        if (P == 2) _tile_loadd(1, sums[0][1], STRIDE);
        if (P == 2) _tile_loadd(3, sums[1][1], STRIDE);
    } else {
        _tile_zero(0);
        _tile_zero(2);
        if (P == 2) _tile_zero(1);
        if (P == 2) _tile_zero(3);
    }
    const int64_t left_bytes = product.left_stride * sizeof(bfloat16);
    const bfloat16* left = product.left + line * product.left_stride;
    const bfloat16* right = product.right + panel * product.depth * LANES;
    for (int k = 0; k < product.depth; k += 32, left += 32, right += 32 * LANES) {
        _tile_loadd(4, left, left_bytes);
        _tile_loadd(6, right, STRIDE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, left + 16 * product.left_stride, left_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (P == 2) {
            _tile_loadd(7, right + product.depth * LANES, STRIDE);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0][0], STRIDE);
    _tile_stored(2, sums[1][0], STRIDE);
    if (P == 2) _tile_stored(1, sums[0][1], STRIDE);
    if (P == 2) _tile_stored(3, sums[1][1], STRIDE);
}
#endif


// What a thread holds while it multiplies.
template <class E>
struct Registers {};

#if MEMSERVE_AMX
constexpr uint8_t FULL_TILES[8] = {16, 16, 16, 16, 16, 16, 16, 16};

template <>
struct Registers<bfloat16> : Tiles {
    Registers() : Tiles(FULL_TILES) {}
};
#endif

template <class E>
void multiply(const Product<E>& product) {
    int panel = 0;
    for (; panel + 2 <= product.num_panels; panel += 2)
        for (int m = 0; m < product.size; m += 32) multiply_part<2>(product, m, panel);
    if (panel < product.num_panels)
        for (int m = 0; m < product.size; m += 32) multiply_part<1>(product, m, panel);
}

template <int S, size_t... L>
inline void swap_lanes(floats& a, floats& b, std::index_sequence<L...>) {
    const floats low = __builtin_shufflevector(a, b, (L & S ? int(L) + LANES - S : int(L))...);
    b = __builtin_shufflevector(a, b, (L & S ? int(L) + LANES : int(L) + S)...);
    a = low;
}

template <int S>
inline void transpose_stage(floats (&rows)[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) swap_lanes<S>(rows[i], rows[i + S], std::make_index_sequence<LANES>());
}

// target [words, 16] = source [16, words] of 4 bytes each; strides in bytes.
inline void transpose(const void* source, int64_t source_stride, int words, void* target,
               int64_t target_stride) {
    for (int word = 0; word < words; word += LANES) {
        floats rows[LANES];
        const char* from = static_cast<const char*>(source) + word * 4;
        for (int i = 0; i < LANES; i++) std::memcpy(&rows[i], from + i * source_stride, 64);
        transpose_stage<8>(rows);
        transpose_stage<4>(rows);
        transpose_stage<2>(rows);
        transpose_stage<1>(rows);
        char* to = static_cast<char*>(target) + word * target_stride;
        for (int i = 0; i < LANES; i++) std::memcpy(to + i * target_stride, &rows[i], 64);
    }
}

}  // namespace memserve

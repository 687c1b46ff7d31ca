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
    const E* const* left;  // where each LANES lines of it begin
    int64_t left_stride;
    const E* right;
    float* sums;
    int size;   // multiple of 32
    int depth;  // multiple of 32
    int num_panels;
    bool add;
};

// M lines of the result in P panels; the sums stay in registers.
template <int M, int P>
inline void multiply_some(const Product<float>& product, int line, int panel) {
    floats sums[M][P];
    float* target = product.sums + (panel * product.size + line) * LANES;
    for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++)
            sums[m][p] = product.add ? load(target + (p * product.size + m) * LANES) : floats{};
    const float* left = product.left[line / LANES] + line % LANES * product.left_stride;
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

template <int P>
inline void multiply_panels(const Product<float>& product, int panel) {
    for (int line = 0; line < product.size; line += 8) multiply_some<8, P>(product, line, panel);
}

#if MEMSERVE_AMX
// The sums over K * 32 of the depth in P panels. Registers: 0 and 1 sums, 2 and 3 left, 4 to 7 the
// right operand, which stays: a sum of 2 x 2 tiles would load less, but waits for its stores.
template <int P, int K>
inline void multiply_tiles(const Product<bfloat16>& product, int panel, int start, bool add) {
    constexpr int STRIDE = LANES * sizeof(float);
    fence_tile_loads();
    const bfloat16* right = product.right + (panel * product.depth + start) * LANES;
    const bfloat16* next = right + product.depth * LANES;
    _tile_loadd(4, right, STRIDE);
    if (K == 2) _tile_loadd(5, right + 32 * LANES, STRIDE);
    if (P == 2) _tile_loadd(6, next, STRIDE);
    if (P == 2 && K == 2) _tile_loadd(7, next + 32 * LANES, STRIDE);
    const int64_t left_bytes = product.left_stride * sizeof(bfloat16);
    float* sums = product.sums + panel * product.size * LANES;
    float* others = sums + product.size * LANES;
    for (int line = 0; line < product.size; line += LANES) {
        if (add) {
            _tile_loadd(0, sums, STRIDE);
            if (P == 2) _tile_loadd(1, others, STRIDE);
        } else {
            _tile_zero(0);
            if (P == 2) _tile_zero(1);
        }
        const bfloat16* left = product.left[line / LANES] + start;
        _tile_loadd(2, left, left_bytes);
        _tile_dpbf16ps(0, 2, 4);
        if (P == 2) _tile_dpbf16ps(1, 2, 6);
        if (K == 2) _tile_loadd(3, left + 32, left_bytes);
        if (K == 2) _tile_dpbf16ps(0, 3, 5);
        if (P == 2 && K == 2) _tile_dpbf16ps(1, 3, 7);
        _tile_stored(0, sums, STRIDE);
        if (P == 2) _tile_stored(1, others, STRIDE);
        sums += LANES * LANES;
        others += LANES * LANES;
    }
}

template <int P>
inline void multiply_panels(const Product<bfloat16>& product, int panel) {
    int start = 0;
    for (; start + 64 <= product.depth; start += 64)
        multiply_tiles<P, 2>(product, panel, start, product.add || start > 0);
    if (start < product.depth)
        multiply_tiles<P, 1>(product, panel, start, product.add || start > 0);
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
    for (; panel + 2 <= product.num_panels; panel += 2) multiply_panels<2>(product, panel);
    if (panel < product.num_panels) multiply_panels<1>(product, panel);
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

// target [16, 16] of 4 bytes each = the rows, transposed; its stride in bytes.
inline void transpose_square(floats (&rows)[LANES], void* target, int64_t stride) {
    transpose_stage<8>(rows);
    transpose_stage<4>(rows);
    transpose_stage<2>(rows);
    transpose_stage<1>(rows);
    char* to = static_cast<char*>(target);
    for (int i = 0; i < LANES; i++) std::memcpy(to + i * stride, &rows[i], 64);
}

// target [words, 16] = source [16, words] of 4 bytes each; strides in bytes.
inline void transpose(const void* source, int64_t source_stride, int words, void* target,
                      int64_t target_stride) {
    for (int word = 0; word < words; word += LANES) {
        floats rows[LANES];
        const char* from = static_cast<const char*>(source) + word * 4;
        for (int i = 0; i < LANES; i++) std::memcpy(&rows[i], from + i * source_stride, 64);
        transpose_square(rows, static_cast<char*>(target) + word * target_stride, target_stride);
    }
}

// Copies `size` elements and fills up with zeros to `width`; a null source is all zeros.
template <class T, class E>
void copy_row(const T* source, int size, int width, E* target) {
    int d = 0;
    if (source != nullptr) {
        if constexpr (sizeof(T) == sizeof(E)) {
            constexpr int VECTOR = 64 / sizeof(E);
            for (; d + VECTOR <= size; d += VECTOR) std::memcpy(target + d, source + d, 64);
            for (; d < size; d++) target[d] = source[d];
        } else {
            for (; d + LANES <= size; d += LANES) store(target + d, load(source + d));
            for (; d < size; d++) target[d] = to_float(source[d]);
        }
    }
    if (d < width) std::memset(target + d, 0, (width - d) * sizeof(E));
}

// target [width, num_rows] = rows [num_rows][width]; width and num_rows are multiples of 32.
inline void transpose_rows(const float* const* rows, int num_rows, int width, float* target) {
    for (int row = 0; row < num_rows; row += LANES)
        for (int d = 0; d < width; d += LANES) {
            floats square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load(rows[row + i] + d);
            transpose_square(square, target + d * num_rows + row, num_rows * 4);
        }
}

inline void transpose_rows(const bfloat16* const* rows, int num_rows, int width, bfloat16* target) {
    for (int row = 0; row < num_rows; row += 2 * LANES)
        for (int d = 0; d < width; d += LANES) {
            floats pairs[LANES];
            for (int p = 0; p < LANES; p++) {
                const bfloat16* even = rows[row + 2 * p] + d;
                const bfloat16* odd = rows[row + 2 * p + 1] + d;
                pairs[p] = (floats)((uints)load(even) >> 16 | (uints)load(odd));
            }
            transpose_square(pairs, target + d * num_rows + row, num_rows * 2);
        }
}

}  // namespace memserve

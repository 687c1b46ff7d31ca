// Dot products of bfloat16 rows, 16 at a time, on processors that multiply pairs of bfloat16.
#pragma once

#include "products.h"

#if defined(__AVX512BF16__)
#define MEMSERVE_BF16_DOTS 1
#include <immintrin.h>

namespace memserve {

template <int S>
inline void fold(floats (&rows)[LANES]) {
    for (int i = 0; i < S; i++) {
        swap_lanes<S>(rows[i], rows[i + S], std::make_index_sequence<LANES>());
        rows[i] += rows[i + S];
    }
}

// Lane i of the result is the sum over the lanes of rows[i], which are used up.
inline floats sums_of(floats (&rows)[LANES]) {
    fold<8>(rows);
    fold<4>(rows);
    fold<2>(rows);
    fold<1>(rows);
    return rows[0];
}

// Lane j of the result is left . right[j], for j < count; all rows have W * 32 elements.
template <int W>
inline floats dots(const bfloat16* left, const bfloat16* const* right, int64_t offset, int count) {
    __m512bh factors[W];
    for (int w = 0; w < W; w++) factors[w] = (__m512bh)_mm512_loadu_si512(left + w * 32);
    floats products[LANES];
    for (int j = 0; j < LANES; j++) {
        __m512 product = _mm512_setzero_ps();
        if (j < count)
            for (int w = 0; w < W; w++) {
                const bfloat16* row = right[j] + offset + w * 32;
                product = _mm512_dpbf16_ps(product, (__m512bh)_mm512_loadu_si512(row), factors[w]);
            }
        products[j] = (floats)product;
    }
    return sums_of(products);
}

}  // namespace memserve
#else
#define MEMSERVE_BF16_DOTS 0
#endif

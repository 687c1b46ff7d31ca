// Shared by the CPU kernels: element types, vectors of 16 floats, and the description of a step.
//
// Vectors are GCC's portable vector types: the compiler lowers them to whatever the machine has
// (AVX-512, AVX2, NEON). All arithmetic is in float; storage is float or bfloat16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace memserve {

constexpr int LANES = 16;
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t uints __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

template <>
inline bfloat16 from_float<bfloat16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {uint16_t(0x7fc0)};
    bits += 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even, as torch rounds
    return {uint16_t(bits >> 16)};
}

inline floats load(const float* p) {
    floats result;
    std::memcpy(&result, p, sizeof result);
    return result;
}

inline floats load(const bfloat16* p) {
    halves raw;
    std::memcpy(&raw, p, sizeof raw);
    return (floats)(__builtin_convertvector(raw, uints) << 16);
}

inline void store(float* p, floats x) { std::memcpy(p, &x, sizeof x); }

inline void store(bfloat16* p, floats x) {
    uints bits = (uints)x;
    uints rounded = bits + 0x7fff + ((bits >> 16) & 1);
    uints is_nan = (uints)(x != x);
    rounded = (rounded & ~is_nan) | (is_nan & 0x7fc00000u);
    halves raw = __builtin_convertvector(rounded >> 16, halves);
    std::memcpy(p, &raw, sizeof raw);
}

inline floats splat(float x) { return x - floats{}; }

typedef float floats8 __attribute__((vector_size(32)));
typedef float floats4 __attribute__((vector_size(16)));

inline float sum(floats x) {
    floats8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    floats4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) +
                __builtin_shufflevector(a, a, 4, 5, 6, 7);
    b += __builtin_shufflevector(b, b, 2, 3, 0, 1);
    return b[0] + b[1];
}

inline float largest(floats x) {
    floats8 low = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
    floats8 high = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    floats8 a = low > high ? low : high;
    float top = a[0];
    for (int i = 1; i < 8; i++) top = a[i] > top ? a[i] : top;
    return top;
}

// e**x for x <= 88, relative error below 2e-7; below -87 the result is 0.
inline floats exponential(floats x) {
    floats clamped = x < -87.0f ? splat(-87.0f) : x;
    floats scaled = clamped * 1.44269504088896341f;
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
    floats whole = (scaled + MAGIC) - MAGIC;
    floats rest = clamped - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    floats y = splat(1.9875691500e-4f);
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    ints exponent = (__builtin_convertvector(whole, ints) + 127) << 23;
    floats result = y * (floats)exponent;
    return x < -87.0f ? floats{} : result;
}

// x * sigmoid(x). Far below zero it is 0; the bound keeps the exponential finite.
inline floats silu(floats x) {
    floats bounded = x < -80.0f ? splat(-80.0f) : x;
    return x / (exponential(-bounded) + 1.0f);
}

// One step's sequences and where their blocks lie. Strides and offsets count elements; mirrored in
// Python (memserve/model/attention/native.py). A block that is only read may lie in another arena of
// the same layout: offsets may be negative.
struct Step {
    void* arena;            // [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]
    int64_t layer_stride;
    int64_t value_stride;   // from a key to its value
    const int64_t* positions;    // [num_tokens]
    const int32_t* query_start;  // [num_sequences + 1]
    const int32_t* kv_len;       // [num_sequences]
    const int64_t* offsets;      // [num_sequences, table_stride], of blocks, from `arena` on
    int64_t table_stride;
    int32_t num_sequences;
    int32_t num_tokens;
    int32_t block_size;
    int32_t num_query_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t is_bfloat16;
};

// Where the key of `position` of a sequence lies, for the first KV head.
template <class T>
T* key_row(const Step& step, int64_t layer, const int64_t* offsets, int64_t position) {
    int64_t row = position % step.block_size;
    return static_cast<T*>(step.arena) + offsets[position / step.block_size] +
           layer * step.layer_stride + row * step.num_kv_heads * step.head_dim;
}

}  // namespace memserve

/* One block of KV to 8-bit integers and back.
 *
 * plain:  [plane][token][head][head_dim] of the value type
 * int8:   [plane][head] float32 scales, then [plane][token][head][head_dim] int8, then padding
 *
 * A scale is the largest magnitude among a head's values of one plane, divided by 127, cut to 17
 * significant bits: 127 times it is exact in float32, so what came from int8 goes back to the same
 * codes and the same scale. Codes are rounded to nearest, ties to even. NaN becomes 0, infinity the
 * largest finite number; magnitudes below 2^-100 become 0. Loops are written for vectorisation:
 * types are constants after inlining, and rounding is an addition.
 *
 * The source may change under the reader's hands (its copy is dropped then): nothing here depends on
 * its bytes for safety.
 */
#include "int8.h"

#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };

#define INLINE static inline __attribute__((always_inline))

static const float TINY = 0x1p-100f;
static const float ROUNDING = 0x1.8p23f; /* added to |x| < 2^22, leaves x as an integer in the low bits */

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint32_t load_bits(const void *values, int64_t i, int type) {
    return type == FLOAT32 ? ((const uint32_t *)values)[i] : ((const uint16_t *)values)[i];
}

INLINE uint32_t infinity(int type) {
    return type == FLOAT32 ? 0x7f800000u : type == BFLOAT16 ? 0x7f80u : 0x7c00u;
}

INLINE uint32_t sign_bit(int type) { return type == FLOAT32 ? 0x80000000u : 0x8000u; }

/* Bits of the magnitude, which order as the magnitudes do; NaN is 0, infinity the largest number. */
INLINE uint32_t magnitude(uint32_t bits, int type) {
    const uint32_t unsigned_bits = bits & (sign_bit(type) - 1);
    const uint32_t finite = unsigned_bits < infinity(type) ? unsigned_bits : infinity(type) - 1;
    return finite & -(uint32_t)(unsigned_bits <= infinity(type));
}

INLINE float magnitude_value(uint32_t bits, int type) {
    if (type == FLOAT32)
        return as_float(bits);
    if (type == BFLOAT16)
        return as_float(bits << 16);
    return as_float(bits << 13) * 0x1p112f; /* the exponent's other bias; subnormal numbers too */
}

INLINE void store_value(void *values, int64_t i, float value, int type) {
    if (type == FLOAT32) {
        ((float *)values)[i] = value;
    } else if (type == BFLOAT16) {
        const uint32_t bits = as_bits(value);
        ((uint16_t *)values)[i] = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    } else {
        const uint32_t bits = as_bits(value * 0x1p-112f);
        const uint32_t size = bits & 0x7fffffffu;
        ((uint16_t *)values)[i] =
            (uint16_t)((size + 0xfffu + (size >> 13 & 1)) >> 13 | (bits >> 16 & 0x8000u));
    }
}

/* The largest magnitude of one head's values, `row` values from token to token. */
INLINE float head_scale(const void *restrict values, int64_t first, int64_t row, int64_t num_tokens,
                        int64_t head_dim, int type) {
    uint32_t largest = 0;
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t i = 0; i < head_dim; i++) {
            const uint32_t size = magnitude(load_bits(values, first + token * row + i, type), type);
            largest = size > largest ? size : largest;
        }
    const float value = magnitude_value(largest, type);
    return value < TINY ? 0.0f : as_float(as_bits(value / 127.0f) & ~0x7fu);
}

INLINE void head_to_int8(int8_t *restrict codes, const void *restrict values, int64_t head_dim,
                         float inverse, int type) {
    for (int64_t i = 0; i < head_dim; i++) {
        const uint32_t bits = load_bits(values, i, type);
        const float size = magnitude_value(magnitude(bits, type), type) * inverse;
        const float clamped = size < 127.0f ? size : 127.0f;
        const int32_t code = (int32_t)(as_bits(clamped + ROUNDING) & 0xffu);
        codes[i] = (int8_t)(bits & sign_bit(type) ? -code : code);
    }
}

INLINE void head_from_int8(void *restrict values, const int8_t *restrict codes, int64_t head_dim,
                           float scale, int type) {
    for (int64_t i = 0; i < head_dim; i++)
        store_value(values, i, (float)codes[i] * scale, type);
}

INLINE void to_int8(char *destination, const char *source, const block_format_t *format, int type) {
    const block_format_t f = *format;
    const int64_t row = f.num_heads * f.head_dim, size = type == FLOAT32 ? 4 : 2;
    float *scales = (float *)destination;
    int8_t *codes = (int8_t *)(scales + f.num_planes * f.num_heads);
    for (int64_t plane = 0; plane < f.num_planes; plane++)
        for (int64_t head = 0; head < f.num_heads; head++) {
            const int64_t first = plane * f.block_size * row + head * f.head_dim;
            const float scale = head_scale(source, first, row, f.block_size, f.head_dim, type);
            const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
            scales[plane * f.num_heads + head] = scale;
            for (int64_t at = first; at < first + f.block_size * row; at += row)
                head_to_int8(codes + at, source + at * size, f.head_dim, inverse, type);
        }
}

INLINE void from_int8(char *destination, const char *source, const block_format_t *format,
                      int type) {
    const block_format_t f = *format;
    const int64_t size = type == FLOAT32 ? 4 : 2;
    const float *scales = (const float *)source;
    const int8_t *codes = (const int8_t *)(scales + f.num_planes * f.num_heads);
    int64_t at = 0;
    for (int64_t plane = 0; plane < f.num_planes; plane++)
        for (int64_t token = 0; token < f.block_size; token++)
            for (int64_t head = 0; head < f.num_heads; head++, at += f.head_dim)
                head_from_int8(destination + at * size, codes + at, f.head_dim,
                               scales[plane * f.num_heads + head], type);
}

void memserve_block_to_int8(char *destination, const char *source, const block_format_t *format) {
    switch (format->value_type) {
    case FLOAT32:
        to_int8(destination, source, format, FLOAT32);
        break;
    case BFLOAT16:
        to_int8(destination, source, format, BFLOAT16);
        break;
    default:
        to_int8(destination, source, format, FLOAT16);
    }
}

void memserve_block_from_int8(char *destination, const char *source,
                              const block_format_t *format) {
    switch (format->value_type) {
    case FLOAT32:
        from_int8(destination, source, format, FLOAT32);
        break;
    case BFLOAT16:
        from_int8(destination, source, format, BFLOAT16);
        break;
    default:
        from_int8(destination, source, format, FLOAT16);
    }
}

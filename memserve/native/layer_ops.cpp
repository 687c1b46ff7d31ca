// The small operators of a decoder layer, fused: residual + RMSNorm, rotary + write of K and V into
// the arena, and SiLU times gate. Arithmetic in float, storage in float or bfloat16.
#include <algorithm>

#include "kernels.h"

namespace memserve {
namespace {

constexpr int64_t PARALLEL_FROM = 1 << 15;  // elements: below, waking a thread costs more

template <class T>
floats load_some(const T* p, int count) {
    float lanes[LANES] = {};
    for (int i = 0; i < count; i++) lanes[i] = to_float(p[i]);
    return load(lanes);
}

template <class T>
void store_some(T* p, floats x, int count) {
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < count; i++) p[i] = from_float<T>(lanes[i]);
}

// Calls body(offset, count) for vectors of a row; count is LANES for all but the last.
template <class Body>
inline void for_vectors(int64_t width, Body body) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) body(i, LANES);
    if (i < width) body(i, int(width - i));
}

template <class T>
inline floats read(const T* p, int count) {
    return count == LANES ? load(p) : load_some(p, count);
}

template <class T>
inline void write(T* p, floats x, int count) {
    if (count == LANES)
        store(p, x);
    else
        store_some(p, x, count);
}

template <class T>
void norm_row(const T* source, const T* weight, T* target, int64_t width, float epsilon) {
    floats squares{};
    for_vectors(width, [&](int64_t i, int n) {
        floats x = read(source + i, n);
        squares += x * x;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / width + epsilon);
    for_vectors(width, [&](int64_t i, int n) {
        write(target + i, read(source + i, n) * scale * read(weight + i, n), n);
    });
}

template <class T>
void add_norm(T* residual, const T* delta, const T* weight, T* target, int64_t rows, int64_t width,
              float epsilon) {
#pragma omp parallel for if (rows * width >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++) {
        T* sum_row = residual + r * width;
        if (delta != nullptr) {
            const T* delta_row = delta + r * width;
            for_vectors(width, [&](int64_t i, int n) {
                write(sum_row + i, read(sum_row + i, n) + read(delta_row + i, n), n);
            });
        }
        norm_row(sum_row, weight, target + r * width, width, epsilon);
    }
}

// Rotates the first 2 * half values of a head in place; cosine and sine hold `half` values.
template <class T>
void rotate(T* head, const float* cosine, const float* sine, int64_t half) {
    for_vectors(half, [&](int64_t i, int n) {
        floats low = read(head + i, n), high = read(head + half + i, n);
        floats c = read(cosine + i, n), s = read(sine + i, n);
        write(head + i, low * c - high * s, n);
        write(head + half + i, high * c + low * s, n);
    });
}

template <class T>
void rotate_and_write(const Step& step, int64_t layer, T* qkv, const float* cosine,
                      const float* sine, const T* query_norm, const T* key_norm, float epsilon) {
    const int64_t width = step.head_dim;
    const int64_t half = width / 2;
    const int64_t queries = step.num_query_heads;
    const int64_t keys = step.num_kv_heads;
    const int64_t stride = (queries + 2 * keys) * width;
#pragma omp parallel for if (step.num_tokens * stride >= PARALLEL_FROM)
    for (int64_t t = 0; t < step.num_tokens; t++) {
        T* row = qkv + t * stride;
        for (int64_t h = 0; h < queries + keys; h++) {
            T* head = row + h * width;
            const T* norm = h < queries ? query_norm : key_norm;
            if (norm != nullptr) norm_row(head, norm, head, width, epsilon);
            rotate(head, cosine + t * half, sine + t * half, half);
        }
        const int32_t* end = step.query_start + step.num_sequences + 1;
        const int64_t sequence =
            std::upper_bound(step.query_start, end, int32_t(t)) - step.query_start - 1;
        const int64_t* offsets = step.offsets + sequence * step.table_stride;
        T* slot = key_row<T>(step, layer, offsets, step.positions[t]);
        std::memcpy(slot, row + queries * width, keys * width * sizeof(T));
        std::memcpy(slot + step.value_stride, row + (queries + keys) * width,
                    keys * width * sizeof(T));
    }
}

template <class T>
void silu_times(const T* gate_up, T* target, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++) {
        const T* gate = gate_up + r * 2 * width;
        for_vectors(width, [&](int64_t i, int n) {
            floats activated = silu(read(gate + i, n));
            write(target + r * width + i, activated * read(gate + width + i, n), n);
        });
    }
}

template <class T>
void write_all(const Step& step, int64_t layer, const T* key, int64_t key_stride, const T* value,
               int64_t value_stride) {
    const int64_t width = int64_t(step.num_kv_heads) * step.head_dim;
    for (int s = 0; s < step.num_sequences; s++) {
        const int64_t* offsets = step.offsets + s * step.table_stride;
        for (int64_t t = step.query_start[s]; t < step.query_start[s + 1]; t++) {
            T* row = key_row<T>(step, layer, offsets, step.positions[t]);
            std::memcpy(row, key + t * key_stride, width * sizeof(T));
            std::memcpy(row + step.value_stride, value + t * value_stride, width * sizeof(T));
        }
    }
}

template <class T>
void gather(const Step& step, int64_t layer, int32_t sequence, int64_t first, int64_t count,
            T* keys, T* values) {
    const int64_t* offsets = step.offsets + sequence * step.table_stride + first;
    const int64_t size = int64_t(step.block_size) * step.num_kv_heads * step.head_dim;
#pragma omp parallel for if (count * size >= PARALLEL_FROM)
    for (int64_t i = 0; i < count; i++) {
        const T* block = static_cast<const T*>(step.arena) + offsets[i] + layer * step.layer_stride;
        std::memcpy(keys + i * size, block, size * sizeof(T));
        std::memcpy(values + i * size, block + step.value_stride, size * sizeof(T));
    }
}

}  // namespace
}  // namespace memserve

using memserve::bfloat16;

extern "C" {

// residual += delta (unless null); target = RMSNorm(residual) * weight. All [rows, width].
void memserve_add_norm(void* residual, const void* delta, const void* weight, void* target,
                       int64_t rows, int64_t width, float epsilon, int32_t is_bfloat16) {
    if (is_bfloat16)
        memserve::add_norm(static_cast<bfloat16*>(residual), static_cast<const bfloat16*>(delta),
                           static_cast<const bfloat16*>(weight), static_cast<bfloat16*>(target),
                           rows, width, epsilon);
    else
        memserve::add_norm(static_cast<float*>(residual), static_cast<const float*>(delta),
                           static_cast<const float*>(weight), static_cast<float*>(target), rows,
                           width, epsilon);
}

// qkv [num_tokens, query heads + 2 * KV heads, head_dim], rotated in place; its keys and values are
// written to the arena. cosine, sine [num_tokens, head_dim / 2]. The norms may be null.
void memserve_rotate_and_write(const memserve::Step* step, int64_t layer, void* qkv,
                               const float* cosine, const float* sine, const void* query_norm,
                               const void* key_norm, float epsilon) {
    if (step->is_bfloat16)
        memserve::rotate_and_write(*step, layer, static_cast<bfloat16*>(qkv), cosine, sine,
                                   static_cast<const bfloat16*>(query_norm),
                                   static_cast<const bfloat16*>(key_norm), epsilon);
    else
        memserve::rotate_and_write(*step, layer, static_cast<float*>(qkv), cosine, sine,
                                   static_cast<const float*>(query_norm),
                                   static_cast<const float*>(key_norm), epsilon);
}

// target [rows, width] = SiLU(gate) * up, of gate_up [rows, 2, width].
void memserve_silu_times(const void* gate_up, void* target, int64_t rows, int64_t width,
                         int32_t is_bfloat16) {
    if (is_bfloat16)
        memserve::silu_times(static_cast<const bfloat16*>(gate_up), static_cast<bfloat16*>(target),
                             rows, width);
    else
        memserve::silu_times(static_cast<const float*>(gate_up), static_cast<float*>(target), rows,
                             width);
}

// Writes keys and values [num_tokens, num_kv_heads, head_dim] of a step to their slots.
void memserve_write_kv(const memserve::Step* step, int64_t layer, const void* key,
                       int64_t key_stride, const void* value, int64_t value_stride) {
    if (step->is_bfloat16)
        memserve::write_all(*step, layer, static_cast<const bfloat16*>(key), key_stride,
                            static_cast<const bfloat16*>(value), value_stride);
    else
        memserve::write_all(*step, layer, static_cast<const float*>(key), key_stride,
                            static_cast<const float*>(value), value_stride);
}

// Copies keys and values of `count` blocks of a sequence, from number `first` on, one block behind the
// other: [count * block_size, num_kv_heads, head_dim] each.
void memserve_gather_kv(const memserve::Step* step, int64_t layer, int32_t sequence, int64_t first,
                        int64_t count, void* keys, void* values) {
    if (step->is_bfloat16)
        memserve::gather(*step, layer, sequence, first, count, static_cast<bfloat16*>(keys),
                         static_cast<bfloat16*>(values));
    else
        memserve::gather(*step, layer, sequence, first, count, static_cast<float*>(keys),
                         static_cast<float*>(values));
}
}

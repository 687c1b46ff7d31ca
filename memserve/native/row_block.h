// Attention of a block of rows over packed tiles of their contexts, with online softmax.
//
// Everything is computed transposed: the rows lie in the lanes of a vector, 16 of them a panel, so
// that the softmax of 16 rows needs no sums across lanes, and its weights come out as the second
// product wants them:
//   scores [TOKENS, 16] = keys [TOKENS, width] x query [width, 16]
//   output [width, 16] += values [width, TOKENS] x weights [TOKENS, 16]
// Keys and transposed values of a tile are packed once for all rows that see it. Needs AVX-512.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "prefill_plan.h"
#include "products.h"

namespace memserve {
namespace {

constexpr int HALF_TILE = 32;
constexpr int MAX_WIDTH = 256;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float NEVER = -1e30f;  // a maximum before anything was seen; finite, so that no NaN comes
constexpr float SLACK = 8.0f;    // how far weights may grow over 1 before all is rescaled

// The rows at hand; operands and sums are [panel][..., LANES].
template <class E>
struct Block {
    alignas(64) E query[ROWS * MAX_WIDTH];
    alignas(64) E weights[ROWS * TOKENS];
    alignas(64) float scores[ROWS * TOKENS];
    alignas(64) float output[ROWS * MAX_WIDTH];
    floats maximum[PANELS];  // scaled; any value near it serves
    floats total[PANELS];
    ints first[PANELS];  // first visible context position
    ints last[PANELS];   // one past the last
    int32_t lowest_last[PANELS];
    int32_t highest_first[PANELS];
    int num_panels;
};

// Rows `from` to `to` of a block, which see a packed tile.
struct Visit {
    int32_t begin;   // the tile's first context position
    int32_t tokens;  // as many of it are multiplied
    int32_t from, to;
};

// Elements of a tile packed for one head: values [width, TOKENS], and before them keys
// [TOKENS, width] unless these are read in place.
inline int64_t tile_size(const Call& call) {
    return int64_t(call.reads_in_place ? 1 : 2) * TOKENS * call.width();
}

// Where the keys of a head's tile lie in the arena; null where the sequence has no more.
template <class T>
void find_keys(const Call& call, const Packed& packed, int kv_head, const T** keys) {
    const Step& step = *call.step;
    const int begin = packed.tile * TOKENS;
    const int visible = std::min(TOKENS, step.kv_len[packed.sequence] - begin);
    const int64_t* offsets = step.offsets + packed.sequence * step.table_stride;
    const int64_t offset = int64_t(kv_head) * step.head_dim;
    for (int t = 0; t < TOKENS; t++)
        keys[t] = t < visible
                      ? key_row<const T>(step, call.layer, offsets, begin + t) + offset
                      : nullptr;
}

// Packs a tile for one head. `keys` are its keys, `next` those of the tile that will be packed after
// it: rows lie too far apart for the hardware to foresee.
template <class T, class E>
void pack_tile(const Call& call, const T* const* keys, const T* const* next, E* target) {
    const int size = call.step->head_dim, width = call.width();
    const int64_t to_value = call.step->value_stride;
    constexpr int LINE = 64 / sizeof(T);
    for (int t = 0; t < TOKENS; t++)
        for (int d = 0; next[t] != nullptr && d < size; d += LINE) {
            __builtin_prefetch(next[t] + d, 0, 2);
            __builtin_prefetch(next[t] + d + to_value, 0, 2);
        }
    alignas(64) E copied[TOKENS * MAX_WIDTH];
    const E* values[TOKENS];
    for (int t = 0; t < TOKENS; t++) {
        const T* value = keys[t] == nullptr ? nullptr : keys[t] + to_value;
        if constexpr (sizeof(T) == sizeof(E))
            if (call.reads_in_place && value != nullptr) {
                values[t] = value;
                continue;
            }
        copy_row(value, size, width, copied + t * width);
        values[t] = copied + t * width;
    }
    if (!call.reads_in_place) {
        for (int t = 0; t < TOKENS; t++) copy_row(keys[t], size, width, target + t * width);
        target += TOKENS * width;
    }
    transpose_rows(values, TOKENS, width, target);
}

// Packs tiles `begin` to `end` for all heads of the group, which lie side by side in the arena.
template <class T, class E>
void pack_tiles(const Call& call, const Group& group, int64_t begin, int64_t end, E* scratch) {
    const int64_t heads = group.num_heads;
    const T* keys[2][TOKENS] = {};
    for (int64_t i = begin * heads; i <= end * heads; i++) {
        const T** const next = keys[i % 2];
        if (i < end * heads)
            find_keys(call, group.packed[i / heads], group.first_head + int(i % heads), next);
        if (i > begin * heads)
            pack_tile(call, keys[(i - 1) % 2], next, scratch + (i - 1) * tile_size(call));
    }
}

// Calls body(lane, token in the step, query head) for the rows of a part.
template <class Body>
inline void for_rows(const Call& call, const Group& group, const Part& part, int kv_head,
                     Body body) {
    const Job& job = group.jobs[part.job];
    const int heads = call.group();
    const int first_token = call.step->query_start[job.sequence];
    for (int i = 0; i < part.num_rows; i++) {
        const int row = part.first_row + i;
        body(part.lane + i, first_token + row / heads, kv_head * heads + row % heads);
    }
}

template <class T, class E>
void start_block(const Call& call, const Group& group, const RowBlock& rows, int kv_head,
                 Block<E>& block) {
    const Step& step = *call.step;
    const int width = call.width();
    const T* sources[ROWS];
    int32_t firsts[ROWS], lasts[ROWS];
    int lane = 0;
    const auto fill_panel = [&] {  // up with what the last row is and sees
        for (; lane % LANES != 0; lane++) {
            sources[lane] = sources[lane - 1];
            firsts[lane] = firsts[lane - 1];
            lasts[lane] = lasts[lane - 1];
        }
    };
    for (int p = 0; p < rows.num_parts; p++) {
        const Part& part = group.parts[rows.first_part + p];
        const int sequence = group.jobs[part.job].sequence;
        const int unseen = step.query_start[sequence + 1] - step.kv_len[sequence];
        if (lane < part.lane) fill_panel();
        for_rows(call, group, part, kv_head, [&](int at, int64_t token, int64_t head) {
            sources[at] = static_cast<const T*>(call.query) + token * call.query_stride +
                          head * step.head_dim;
            lasts[at] = int32_t(token) + 1 - unseen;
            firsts[at] = first_visible(lasts[at], call.window);
        });
        lane = part.lane + part.num_rows;
    }
    fill_panel();
    block.num_panels = rows.num_panels;
    alignas(64) E copied[LANES * MAX_WIDTH];
    for (int p = 0; p < block.num_panels; p++) {
        const int from = p * LANES;
        for (int i = 0; i < LANES; i++)
            copy_row(sources[from + i], step.head_dim, width, copied + i * width);
        std::memcpy(&block.first[p], firsts + from, sizeof(ints));
        std::memcpy(&block.last[p], lasts + from, sizeof(ints));
        block.highest_first[p] = *std::max_element(firsts + from, firsts + from + LANES);
        block.lowest_last[p] = *std::min_element(lasts + from, lasts + from + LANES);
        constexpr int IN_WORD = 4 / sizeof(E);
        transpose(copied, width * sizeof(E), width / IN_WORD, block.query + from * width, 64);
        block.maximum[p] = splat(NEVER);
        block.total[p] = floats{};
    }
    std::memset(block.output, 0, sizeof(float) * block.num_panels * width * LANES);
}

template <class T, class E>
void finish_block(const Call& call, const Group& group, const RowBlock& rows, int kv_head,
                  Block<E>& block) {
    const Step& step = *call.step;
    const int width = call.width();
    alignas(64) float turned[ROWS * MAX_WIDTH];
    for (int p = 0; p < block.num_panels; p++) {
        float* output = block.output + p * width * LANES;
        const floats shrink = 1.0f / block.total[p];
        for (int d = 0; d < width; d++)
            store(output + d * LANES, load(output + d * LANES) * shrink);
        for (int d = 0; d < width; d += LANES)
            transpose(output + d * LANES, 64, LANES, turned + p * LANES * width + d, width * 4);
    }
    for (int p = 0; p < rows.num_parts; p++)
        for_rows(call, group, group.parts[rows.first_part + p], kv_head,
                 [&](int lane, int64_t token, int64_t head) {
                     T* target = static_cast<T*>(call.output) + token * call.output_stride +
                                 head * step.head_dim;
                     const float* row = turned + lane * width;
                     int d = 0;
                     for (; d + LANES <= step.head_dim; d += LANES) store(target + d, load(row + d));
                     for (; d < step.head_dim; d++) target[d] = from_float<T>(row[d]);
                 });
}

// Weights of scaled scores, x <= SLACK. Weights that become bfloat16 are powers of 2 by a short
// polynomial (relative error 3e-6), the others powers of e.
template <class E>
struct Weight {
    static constexpr float UNIT = 1.0f;
    static floats of(floats x) { return exponential(x); }
};

template <>
struct Weight<bfloat16> {
    static constexpr float UNIT = 1.44269504088896341f;
    static floats of(floats x) {
        constexpr int TO_FLOOR = 1;
        const floats rest = (floats)_mm512_reduce_ps((__m512)x, TO_FLOOR);
        floats y = splat(0.01353417f);
        y = y * rest + 0.05201146f;
        y = y * rest + 0.24144276f;
        y = y * rest + 0.69300383f;
        y = y * rest + 1.00000259f;
        return (floats)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)x);
    }
};

inline void store_pair(float* target, floats even, floats odd) {
    store(target, even);
    store(target + LANES, odd);
}

inline void store_pair(bfloat16* target, floats even, floats odd) {
    const uints low = ((uints)even + 0x8000) >> 16;  // rounds to nearest: weights are no NaN
    const uints both = low | (((uints)odd + 0x8000) & 0xffff0000u);
    std::memcpy(target, &both, 64);
}

inline floats larger(floats a, floats b) { return a > b ? a : b; }

// Turns the scores of a panel into weights, and rescales what was accumulated if they grow large.
template <class E>
void soften(Block<E>& block, int panel, int tokens, int width, float scale) {
    float* scores = block.scores + panel * tokens * LANES;
    floats tops[4];
    for (int i = 0; i < 4; i++) tops[i] = load(scores + i * LANES);
    for (int t = 4; t < tokens; t += 4)
        for (int i = 0; i < 4; i++) tops[i] = larger(tops[i], load(scores + (t + i) * LANES));
    const floats top = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])) * scale;
    floats maximum = block.maximum[panel];
    const ints grown = top > maximum + SLACK;
    if (_mm512_test_epi32_mask((__m512i)grown, (__m512i)grown)) {
        const floats shrink = grown ? Weight<E>::of(maximum - top) : splat(1.0f);
        maximum = grown ? top : maximum;
        block.maximum[panel] = maximum;
        block.total[panel] *= shrink;
        float* output = block.output + panel * width * LANES;
        for (int d = 0; d < width; d++)
            store(output + d * LANES, load(output + d * LANES) * shrink);
    }
    E* weights = block.weights + panel * tokens * LANES;
    floats evens{}, odds{};
    for (int t = 0; t < tokens; t += 2) {
        const floats even = Weight<E>::of(load(scores + t * LANES) * scale - maximum);
        const floats odd = Weight<E>::of(load(scores + (t + 1) * LANES) * scale - maximum);
        evens += even;
        odds += odd;
        store_pair(weights + t * LANES, even, odd);
    }
    block.total[panel] += evens + odds;
}

// Hides what a panel's rows don't see of a tile: other rows than the visiting ones see nothing.
template <class E>
void mask(Block<E>& block, const Visit& visit, int panel) {
    const bool all_rows = visit.from <= panel * LANES && visit.to >= (panel + 1) * LANES;
    if (all_rows && visit.begin + visit.tokens <= block.lowest_last[panel] &&
        visit.begin >= block.highest_first[panel])
        return;
    constexpr ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const ints row = LANE + panel * LANES;
    const ints visiting = (row >= visit.from) & (row < visit.to);
    const ints last = block.last[panel] & visiting;  // 0: sees nothing
    float* scores = block.scores + panel * visit.tokens * LANES;
    for (int t = 0; t < visit.tokens; t++) {
        const ints position = visit.begin + t - ints{};
        const ints hidden = (position >= last) | (position < block.first[panel]);
        const floats score = load(scores + t * LANES);
        store(scores + t * LANES, hidden ? splat(NEG_INF) : score);
    }
}

// The operands of a tile.
template <class E>
struct Operands {
    const E* keys[TOKENS / LANES];  // where each LANES of them begin
    int64_t key_stride;
    const E* values;  // packed
};

// Keys in place lie LANES in a row. Where the sequence has no more, others serve: nobody sees them.
template <class T, class E>
Operands<E> operands(const Call& call, const Group& group, int number, int head, const E* scratch) {
    const Step& step = *call.step;
    const E* packed = scratch + (int64_t(number) * group.num_heads + head) * tile_size(call);
    Operands<E> found;
    if constexpr (sizeof(T) == sizeof(E))
        if (call.reads_in_place) {
            const auto [sequence, tile] = group.packed[number];
            const int64_t* offsets = step.offsets + sequence * step.table_stride;
            const int64_t offset = int64_t(group.first_head + head) * step.head_dim;
            for (int i = 0; i < TOKENS / LANES; i++) {
                const int position = tile * TOKENS + i * LANES;
                found.keys[i] =
                    position < step.kv_len[sequence]
                        ? key_row<const E>(step, call.layer, offsets, position) + offset
                        : found.keys[0];
            }
            found.key_stride = int64_t(step.num_kv_heads) * step.head_dim;
            found.values = packed;
            return found;
        }
    for (int i = 0; i < TOKENS / LANES; i++) found.keys[i] = packed + i * LANES * call.width();
    found.key_stride = call.width();
    found.values = packed + TOKENS * call.width();
    return found;
}

template <class E>
void run_visit(const Call& call, const Visit& visit, const Operands<E>& tile, Block<E>& block) {
    const int width = call.width();
    const float scale = call.scale * Weight<E>::UNIT;
    const int first = visit.from / LANES;
    const int count = (visit.to + LANES - 1) / LANES - first;
    multiply<E>({tile.keys, tile.key_stride, block.query + first * width * LANES,
                 block.scores + first * visit.tokens * LANES, visit.tokens, width, count, false});
    for (int p = first; p < first + count; p++) {
        mask(block, visit, p);
        soften(block, p, visit.tokens, width, scale);
    }
    const E* values[MAX_WIDTH / LANES];
    for (int d = 0; d < width; d += LANES) values[d / LANES] = tile.values + d * TOKENS;
    multiply<E>({values, TOKENS, block.weights + first * visit.tokens * LANES,
                 block.output + first * width * LANES, width, visit.tokens, count, true});
}

// The rows of one of the group's heads, which lies `head` after its first.
template <class T, class E>
void run_block(const Call& call, const Group& group, const RowBlock& rows, int head,
               const E* scratch, Block<E>& block) {
    const Part* parts = group.parts.data() + rows.first_part;
    int begin = parts[0].begin, end = parts[0].end;
    for (int p = 1; p < rows.num_parts; p++) {
        begin = std::min(begin, parts[p].begin);
        end = std::max(end, parts[p].end);
    }
    start_block<T>(call, group, rows, group.first_head + head, block);
    for (int tile = begin / TOKENS; tile * TOKENS < end; tile++) {
        for (int p = 0, next; p < rows.num_parts; p = next) {
            const int number = group.number(parts[p], tile);
            int seen = parts[p].end;
            for (next = p + 1; next < rows.num_parts; next++) {
                if (group.number(parts[next], tile) != number) break;
                seen = std::max(seen, parts[next].end);
            }
            if (number < 0) continue;
            const int tokens = seen - tile * TOKENS <= HALF_TILE ? HALF_TILE : TOKENS;
            const int to = next < rows.num_parts ? parts[next].lane : rows.num_panels * LANES;
            run_visit(call, {tile * TOKENS, tokens, parts[p].lane, to},
                      operands<T>(call, group, number, head, scratch), block);
        }
    }
    finish_block<T>(call, group, rows, group.first_head + head, block);
}

}  // namespace
}  // namespace memserve

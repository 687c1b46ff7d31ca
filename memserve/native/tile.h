// One tile of a context in paged attention: scores of its keys, online softmax, sum of its values.
//
// All for the query rows of one KV head; `addresses` and `offset` say where its keys or values lie.
#pragma once

#include <algorithm>
#include <limits>

#include "dots.h"
#include "kernels.h"

namespace memserve {
namespace {

constexpr int TILE = 32;       // context tokens at a time
constexpr int MAX_ROWS = 16;  // (query token, query head) pairs of one KV head in a unit
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

// Query heads that share a KV head, at most MAX_ROWS of them.
struct Heads {
    int32_t kv_head;
    int32_t first;
    int32_t count;
};

// The online softmax of the rows (query token, query head) of some heads.
template <int V>
struct Rows {
    alignas(64) float query[MAX_ROWS][V * LANES];
    alignas(64) float output[MAX_ROWS][V * LANES];
    const void* raw[MAX_ROWS];  // the query as it came, not scaled
    Heads heads;
    int32_t count;
    float maximum[MAX_ROWS];
    float total[MAX_ROWS];
    int32_t first[MAX_ROWS];  // first visible context position
    int32_t last[MAX_ROWS];   // one past the last
};

// The keys, then the values of one KV head at hand, and the scores, then the weights.
template <int V>
struct Tile {
    alignas(64) float rows[TILE][V * LANES];
    alignas(64) float scores[MAX_ROWS][TILE];
};

template <class T, int V>
void load_tile(int width, const T* const* addresses, int64_t offset, int count, Tile<V>& tile) {
    for (int j = 0; j < count; j++) {
        const T* source = addresses[j] + offset;
        if (width == V * LANES) {
            for (int v = 0; v < V; v++) store(&tile.rows[j][v * LANES], load(source + v * LANES));
        } else {
            for (int d = 0; d < width; d++) tile.rows[j][d] = to_float(source[d]);
        }
    }
}

template <int V>
void score_loaded(const Rows<V>& rows, int count, Tile<V>& tile) {
    for (int j = 0; j < count; j++) {
        floats key[V];
        for (int v = 0; v < V; v++) key[v] = load(&tile.rows[j][v * LANES]);
        for (int r = 0; r < rows.count; r++) {
            floats product = load(rows.query[r]) * key[0];
            for (int v = 1; v < V; v++) product += load(&rows.query[r][v * LANES]) * key[v];
            tile.scores[r][j] = sum(product);
        }
    }
}

#if MEMSERVE_BF16_DOTS
// The same straight from the arena: products of bfloat16 are exact in float.
template <int V>
void score_rows(const Rows<V>& rows, const bfloat16* const* addresses, int64_t offset, int count,
                float scale, Tile<V>& tile) {
    for (int j = 0; j < count; j += LANES)
        for (int r = 0; r < rows.count; r++) {
            const bfloat16* query = static_cast<const bfloat16*>(rows.raw[r]);
            const int some = std::min(LANES, count - j);
            const floats scores = some == LANES
                                      ? dots<V / 2>(query, addresses + j, offset, LANES)
                                      : dots<V / 2>(query, addresses + j, offset, some);
            store(&tile.scores[r][j], scores * scale);
        }
}
#endif

template <class T, int V>
void score_tile(int width, [[maybe_unused]] float scale, const Rows<V>& rows,
                const T* const* addresses, int64_t offset, int count, Tile<V>& tile) {
#if MEMSERVE_BF16_DOTS
    if constexpr (sizeof(T) == 2)
        if (width == V * LANES) return score_rows<V>(rows, addresses, offset, count, scale, tile);
#endif
    load_tile<T, V>(width, addresses, offset, count, tile);
    score_loaded<V>(rows, count, tile);
}

template <int V>
void hide_scores(const Rows<V>& rows, int begin, int count, Tile<V>& tile) {
    for (int r = 0; r < rows.count; r++) {
        const int first = std::min(TILE, rows.first[r] - begin);
        const int last = std::max(0, std::min(count, rows.last[r] - begin));
        for (int j = 0; j < first; j++) tile.scores[r][j] = NEG_INF;
        for (int j = last; j < TILE; j++) tile.scores[r][j] = NEG_INF;
    }
}

// Turns scores into weights and rescales what was accumulated under the old maximum.
template <int V>
void soften_tile(Rows<V>& rows, Tile<V>& tile) {
    for (int r = 0; r < rows.count; r++) {
        float* scores = tile.scores[r];
        floats tops = load(scores);
        for (int j = LANES; j < TILE; j += LANES) {
            floats next = load(scores + j);
            tops = tops > next ? tops : next;
        }
        const float top = std::max(rows.maximum[r], largest(tops));
        if (top == NEG_INF) {
            std::memset(scores, 0, sizeof tile.scores[r]);
            continue;
        }
        floats total{};
        for (int j = 0; j < TILE; j += LANES) {
            floats weight = exponential(load(scores + j) - top);
            store(scores + j, weight);
            total += weight;
        }
        if (top == rows.maximum[r]) {
            rows.total[r] += sum(total);
            continue;
        }
        const float shrink = std::exp(rows.maximum[r] - top);
        rows.total[r] = rows.total[r] * shrink + sum(total);
        rows.maximum[r] = top;
        for (int v = 0; v < V; v++)
            store(&rows.output[r][v * LANES], load(&rows.output[r][v * LANES]) * shrink);
    }
}

// Adds the weighted values, which lie at `addresses`, to R rows, whose sums stay in registers.
template <class T, int V, int R>
void add_values_to(Rows<V>& rows, int row, const T* const* addresses, int64_t offset,
                   const Tile<V>& tile, int count) {
    floats output[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) output[r][v] = load(&rows.output[row + r][v * LANES]);
    for (int j = 0; j < count; j++) {
        floats value[V];
        for (int v = 0; v < V; v++) value[v] = load(addresses[j] + offset + v * LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) output[r][v] += value[v] * tile.scores[row + r][j];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(&rows.output[row + r][v * LANES], output[r][v]);
}

template <class T, int V>
void add_rows(Rows<V>& rows, const T* const* addresses, int64_t offset, const Tile<V>& tile,
              int count) {
    int r = 0;
    if constexpr (V <= 4) {
        for (; r + 4 <= rows.count; r += 4)
            add_values_to<T, V, 4>(rows, r, addresses, offset, tile, count);
        for (; r + 3 <= rows.count; r += 3)
            add_values_to<T, V, 3>(rows, r, addresses, offset, tile, count);
    }
    if constexpr (V <= 8)
        for (; r + 2 <= rows.count; r += 2)
            add_values_to<T, V, 2>(rows, r, addresses, offset, tile, count);
    for (; r < rows.count; r++) add_values_to<T, V, 1>(rows, r, addresses, offset, tile, count);
}

// Adds the weighted values; few rows take them straight from the arena.
template <class T, int V>
void add_values(int width, Rows<V>& rows, const T* const* addresses, int64_t offset, int count,
                Tile<V>& tile) {
    if (width == V * LANES && rows.count <= 4)
        return add_rows<T, V>(rows, addresses, offset, tile, count);
    load_tile<T, V>(width, addresses, offset, count, tile);
    const float* loaded[TILE];
    for (int j = 0; j < count; j++) loaded[j] = tile.rows[j];
    add_rows<float, V>(rows, loaded, 0, tile, count);
}

}  // namespace
}  // namespace memserve

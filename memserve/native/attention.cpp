// Paged attention on the CPU for decode and short chunks, and the write of new keys and values.
//
// A unit of work is (sequence, a few query tokens, KV head, part of the context). All query heads
// of the KV head are computed together, so that a key is read once for the whole group. Softmax is
// online over tiles of the context. Parts of one context are merged by their log-sum-exp.
#include <algorithm>
#include <limits>
#include <vector>

#include <omp.h>

#include "kernels.h"

namespace memserve {
namespace {

constexpr int TILE = 32;       // context tokens at a time
constexpr int MAX_ROWS = 16;   // (query token, query head) pairs of one unit
constexpr int MIN_PART = 256;  // a part of a context is at least this long
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

struct Call {
    const Step* step;
    int64_t layer;
    const void* query;  // [num_tokens, num_query_heads, head_dim], rows query_stride apart
    int64_t query_stride;
    void* output;  // like query
    int64_t output_stride;
    float* lse;  // [num_tokens, num_query_heads] or null
    float scale;
    int32_t window;  // 0: none
};

struct Unit {
    int32_t sequence;
    int32_t token;  // first query token, counted in the step
    int32_t num_tokens;
    int32_t kv_head;
    int32_t head;  // first query head
    int32_t num_heads;
    int32_t begin, end;  // context positions
    int32_t part, num_parts;
    int64_t scratch;  // first row in the partial results
};

// The online softmax of a unit's rows, and the tile of keys or values at hand.
template <int V>
struct Rows {
    alignas(64) float query[MAX_ROWS][V * LANES];
    alignas(64) float output[MAX_ROWS][V * LANES];
    alignas(64) float tile[TILE][V * LANES];
    alignas(64) float scores[MAX_ROWS][TILE];
    float maximum[MAX_ROWS];
    float total[MAX_ROWS];
    int32_t first[MAX_ROWS];  // first visible context position
    int32_t last[MAX_ROWS];   // one past the last
};

// The keys of a run of context positions of one KV head: one row address per position.
template <class T>
void find_rows(const Call& call, const Unit& unit, int begin, int count,
               const T** addresses) {
    const Step& step = *call.step;
    const int32_t* table = step.block_table + unit.sequence * step.table_stride;
    const int64_t stride = int64_t(step.num_kv_heads) * step.head_dim;
    int block = begin / step.block_size;
    int row = begin % step.block_size;
    for (int j = 0; j < count;) {
        const T* base = static_cast<const T*>(step.arena) + table[block] * step.block_stride +
                        call.layer * step.layer_stride + int64_t(unit.kv_head) * step.head_dim;
        for (; row < step.block_size && j < count; row++, j++) addresses[j] = base + row * stride;
        row = 0;
        block++;
    }
}

// A layer's rows of one KV head lie too far apart for the hardware to foresee.
template <class T>
void prefetch_rows(const Step& step, const T* const* rows, int64_t offset, int count) {
    constexpr int LINE = 64 / sizeof(T);
    for (int j = 0; j < count; j++)
        for (int d = 0; d < step.head_dim; d += LINE) __builtin_prefetch(rows[j] + offset + d);
}

template <class T, int V>
void load_tile(int width, const T* const* rows, int64_t offset, int count,
               float (*tile)[V * LANES]) {
    for (int j = 0; j < count; j++) {
        const T* row = rows[j] + offset;
        if (width == V * LANES) {
            for (int v = 0; v < V; v++) store(&tile[j][v * LANES], load(row + v * LANES));
        } else {
            for (int d = 0; d < width; d++) tile[j][d] = to_float(row[d]);
        }
    }
}

template <int V>
void score_tile(Rows<V>& rows, int num_rows, int begin, int count) {
    for (int j = 0; j < count; j++) {
        floats key[V];
        for (int v = 0; v < V; v++) key[v] = load(&rows.tile[j][v * LANES]);
        for (int r = 0; r < num_rows; r++) {
            floats product = load(rows.query[r]) * key[0];
            for (int v = 1; v < V; v++) product += load(&rows.query[r][v * LANES]) * key[v];
            rows.scores[r][j] = sum(product);
        }
    }
    for (int r = 0; r < num_rows; r++) {
        const int first = std::min(TILE, rows.first[r] - begin);
        const int last = std::max(0, std::min(count, rows.last[r] - begin));
        for (int j = 0; j < first; j++) rows.scores[r][j] = NEG_INF;
        for (int j = last; j < TILE; j++) rows.scores[r][j] = NEG_INF;
    }
}

// Turns scores into weights and rescales what was accumulated under the old maximum.
template <int V>
void soften_tile(Rows<V>& rows, int num_rows) {
    for (int r = 0; r < num_rows; r++) {
        float* scores = rows.scores[r];
        floats tops = load(scores);
        for (int j = LANES; j < TILE; j += LANES) {
            floats next = load(scores + j);
            tops = tops > next ? tops : next;
        }
        const float top = std::max(rows.maximum[r], largest(tops));
        if (top == NEG_INF) {
            std::memset(scores, 0, sizeof rows.scores[r]);
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

// Adds the weighted values to R rows, whose sums stay in registers.
template <int V, int R>
void add_values_to(Rows<V>& rows, int row, int count) {
    floats output[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) output[r][v] = load(&rows.output[row + r][v * LANES]);
    for (int j = 0; j < count; j++) {
        floats value[V];
        for (int v = 0; v < V; v++) value[v] = load(&rows.tile[j][v * LANES]);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) output[r][v] += value[v] * rows.scores[row + r][j];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(&rows.output[row + r][v * LANES], output[r][v]);
}

template <int V>
void add_values(Rows<V>& rows, int num_rows, int count) {
    int r = 0;
    if constexpr (V <= 4) {
        for (; r + 4 <= num_rows; r += 4) add_values_to<V, 4>(rows, r, count);
        for (; r + 3 <= num_rows; r += 3) add_values_to<V, 3>(rows, r, count);
    }
    if constexpr (V <= 8)
        for (; r + 2 <= num_rows; r += 2) add_values_to<V, 2>(rows, r, count);
    for (; r < num_rows; r++) add_values_to<V, 1>(rows, r, count);
}

template <class T, int V>
void start_rows(const Call& call, const Unit& unit, Rows<V>& rows) {
    const Step& step = *call.step;
    const int last_token = step.query_start[unit.sequence + 1] - 1;
    for (int t = 0, r = 0; t < unit.num_tokens; t++) {
        const int token = unit.token + t;
        const int last = step.kv_len[unit.sequence] - (last_token - token);
        for (int h = 0; h < unit.num_heads; h++, r++) {
            const T* source = static_cast<const T*>(call.query) + token * call.query_stride +
                              int64_t(unit.head + h) * step.head_dim;
            for (int d = 0; d < V * LANES; d++)
                rows.query[r][d] = d < step.head_dim ? to_float(source[d]) * call.scale : 0.0f;
            rows.last[r] = last;
            rows.first[r] = call.window > 0 ? std::max(0, last - call.window) : 0;
            rows.maximum[r] = NEG_INF;
            rows.total[r] = 0.0f;
        }
    }
    std::memset(rows.output, 0, sizeof rows.output);
    if (step.head_dim != V * LANES) std::memset(rows.tile, 0, sizeof rows.tile);
}

template <class T>
void write_row(const Call& call, const Unit& unit, int row, const float* values, float scale,
               float lse) {
    const Step& step = *call.step;
    const int64_t token = unit.token + row / unit.num_heads;
    const int64_t head = unit.head + row % unit.num_heads;
    T* target = static_cast<T*>(call.output) + token * call.output_stride + head * step.head_dim;
    for (int d = 0; d < step.head_dim; d++) target[d] = from_float<T>(values[d] * scale);
    if (call.lse != nullptr) call.lse[token * step.num_query_heads + head] = lse;
}

// A partial result in scratch memory: head_dim values, then maximum and total.
template <class T, int V>
void run_unit(const Call& call, const Unit& unit, float* scratch) {
    const Step& step = *call.step;
    Rows<V> rows;
    start_rows<T, V>(call, unit, rows);
    const int num_rows = unit.num_tokens * unit.num_heads;
    const T* addresses[2][TILE];
    int count = std::min(TILE, unit.end - unit.begin);
    find_rows(call, unit, unit.begin, count, addresses[0]);
    for (int begin = unit.begin, now = 0; begin < unit.end; begin += TILE, now ^= 1) {
        const int next_count = std::max(0, std::min(TILE, unit.end - begin - TILE));
        find_rows(call, unit, begin + TILE, next_count, addresses[now ^ 1]);
        prefetch_rows(step, addresses[now ^ 1], 0, next_count);
        load_tile<T, V>(step.head_dim, addresses[now], 0, count, rows.tile);
        score_tile<V>(rows, num_rows, begin, count);
        soften_tile<V>(rows, num_rows);
        prefetch_rows(step, addresses[now ^ 1], step.value_stride, next_count);
        load_tile<T, V>(step.head_dim, addresses[now], step.value_stride, count, rows.tile);
        add_values<V>(rows, num_rows, count);
        count = next_count;
    }
    for (int r = 0; r < num_rows; r++) {
        if (unit.num_parts == 1) {
            float total = rows.total[r];
            float lse = total > 0.0f ? rows.maximum[r] + std::log(total) : NEG_INF;
            write_row<T>(call, unit, r, rows.output[r], total > 0.0f ? 1.0f / total : 0.0f, lse);
        } else {
            float* target = scratch + (unit.scratch + r) * (step.head_dim + 2);
            std::memcpy(target, rows.output[r], sizeof(float) * step.head_dim);
            target[step.head_dim] = rows.maximum[r];
            target[step.head_dim + 1] = rows.total[r];
        }
    }
}

// Merges the parts of one context; `unit` is the first of them.
template <class T>
void merge_parts(const Call& call, const Unit& unit, const float* scratch) {
    const int width = call.step->head_dim;
    const int num_rows = unit.num_tokens * unit.num_heads;
    std::vector<float> merged(width);
    for (int r = 0; r < num_rows; r++) {
        const float* first = scratch + (unit.scratch + r) * (width + 2);
        const int64_t next = int64_t(num_rows) * (width + 2);
        float top = NEG_INF;
        for (int p = 0; p < unit.num_parts; p++) top = std::max(top, first[p * next + width]);
        float total = 0.0f;
        std::fill(merged.begin(), merged.end(), 0.0f);
        for (int p = 0; p < unit.num_parts; p++) {
            const float* part = first + p * next;
            if (part[width] == NEG_INF) continue;
            const float share = std::exp(part[width] - top);
            total += part[width + 1] * share;
            for (int d = 0; d < width; d++) merged[d] += part[d] * share;
        }
        float lse = total > 0.0f ? top + std::log(total) : NEG_INF;
        write_row<T>(call, unit, r, merged.data(), total > 0.0f ? 1.0f / total : 0.0f, lse);
    }
}

int parts_of(const Step& step, int length, int units, int threads) {
    if (threads == 1 || units >= 2 * threads || length < 2 * MIN_PART) return 1;
    const int wanted = (2 * threads * step.num_kv_heads + units - 1) / units;
    return std::max(1, std::min(wanted, length / MIN_PART));
}

// The units of the given sequences, and the number of rows of partial results they need.
int64_t plan(const Call& call, const int32_t* sequences, int num_sequences, int threads,
             std::vector<Unit>& units) {
    const Step& step = *call.step;
    const int group = step.num_query_heads / step.num_kv_heads;
    const int heads_at_once = std::min(group, MAX_ROWS);
    const int tokens_at_once = std::max(1, MAX_ROWS / heads_at_once);
    int64_t scratch = 0;
    for (int i = 0; i < num_sequences; i++) {
        const int s = sequences[i];
        const int stop = step.query_start[s + 1];
        for (int token = step.query_start[s]; token < stop; token += tokens_at_once) {
            const int count = std::min(tokens_at_once, stop - token);
            const int end = step.kv_len[s] - (stop - (token + count));
            const int oldest = end - count + 1 - call.window;
            const int begin = call.window > 0 ? std::max(0, oldest) / TILE * TILE : 0;
            const int parts =
                parts_of(step, end - begin, num_sequences * step.num_kv_heads, threads);
            const int tiles = (end - begin + TILE - 1) / TILE;
            for (int kv_head = 0; kv_head < step.num_kv_heads; kv_head++) {
                for (int head = 0; head < group; head += heads_at_once) {
                    const int heads = std::min(heads_at_once, group - head);
                    for (int p = 0; p < parts; p++) {
                        const int from = begin + tiles * p / parts * TILE;
                        const int to = std::min(end, begin + tiles * (p + 1) / parts * TILE);
                        units.push_back({s, token, count, kv_head, kv_head * group + head, heads,
                                         from, to, p, parts, scratch});
                        if (parts > 1) scratch += int64_t(count) * heads;
                    }
                }
            }
        }
    }
    return scratch;
}

template <class T, int V>
void run_all(const Call& call, const std::vector<Unit>& units, float* scratch) {
    const int64_t count = static_cast<int64_t>(units.size());
#pragma omp parallel if (count > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) run_unit<T, V>(call, units[i], scratch);
        if (scratch != nullptr) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count; i++)
                if (units[i].num_parts > 1 && units[i].part == 0)
                    merge_parts<T>(call, units[i], scratch);
        }
    }
}

template <class T>
void attend(const Call& call, const std::vector<Unit>& units, float* scratch) {
    const int vectors = (call.step->head_dim + LANES - 1) / LANES;
    if (vectors <= 2) return run_all<T, 2>(call, units, scratch);
    if (vectors <= 4) return run_all<T, 4>(call, units, scratch);
    if (vectors <= 6) return run_all<T, 6>(call, units, scratch);
    if (vectors <= 8) return run_all<T, 8>(call, units, scratch);
    return run_all<T, 16>(call, units, scratch);
}

template <class T>
void write_all(const Step& step, int64_t layer, const T* key, int64_t key_stride, const T* value,
               int64_t value_stride) {
    const int64_t width = int64_t(step.num_kv_heads) * step.head_dim;
    for (int s = 0; s < step.num_sequences; s++) {
        const int32_t* table = step.block_table + s * step.table_stride;
        for (int64_t t = step.query_start[s]; t < step.query_start[s + 1]; t++) {
            T* row = key_row<T>(step, layer, table, step.positions[t]);
            std::memcpy(row, key + t * key_stride, width * sizeof(T));
            std::memcpy(row + step.value_stride, value + t * value_stride, width * sizeof(T));
        }
    }
}

}  // namespace
}  // namespace memserve

extern "C" {

// Attention of the query tokens of `sequences` over their visible context, which must be in the
// arena. head_dim is at most 256.
void memserve_attend(const memserve::Step* step, int64_t layer, const void* query,
                     int64_t query_stride, void* output, int64_t output_stride, float* lse,
                     float scale, int32_t window, const int32_t* sequences,
                     int32_t num_sequences) {
    memserve::Call call{step,   layer, query, query_stride, output, output_stride,
                        lse,    scale, window};
    std::vector<memserve::Unit> units;
    const int64_t rows =
        memserve::plan(call, sequences, num_sequences, omp_get_max_threads(), units);
    std::vector<float> scratch(rows * (step->head_dim + 2));
    float* partial = rows > 0 ? scratch.data() : nullptr;
    if (step->is_bfloat16)
        memserve::attend<memserve::bfloat16>(call, units, partial);
    else
        memserve::attend<float>(call, units, partial);
}

// Writes keys and values [num_tokens, num_kv_heads, head_dim] of a step to their slots.
void memserve_write_kv(const memserve::Step* step, int64_t layer, const void* key,
                       int64_t key_stride, const void* value, int64_t value_stride) {
    using memserve::bfloat16;
    if (step->is_bfloat16)
        memserve::write_all(*step, layer, static_cast<const bfloat16*>(key), key_stride,
                            static_cast<const bfloat16*>(value), value_stride);
    else
        memserve::write_all(*step, layer, static_cast<const float*>(key), key_stride,
                            static_cast<const float*>(value), value_stride);
}
}

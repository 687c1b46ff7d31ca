// Paged attention on the CPU for decode and short chunks.
//
// A unit of work is (sequence, a few query tokens, part of the context). It goes through its part
// tile by tile and computes all heads on each tile, so that memory is read in long runs and once;
// the query heads of a KV head share each key. Softmax is online. Parts of one context are merged
// by their log-sum-exp.
#include <algorithm>
#include <vector>

#include <omp.h>

#include "kernels.h"
#include "tile.h"

namespace memserve {
namespace {

constexpr int MIN_PART = 64;  // a part of a context is at least this long

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
    int32_t begin, end;  // context positions
    int32_t part, num_parts;
    int64_t scratch;  // first row in the partial results
};

Heads heads_at(const Step& step, int index) {
    const int group = step.num_query_heads / step.num_kv_heads;
    const int per_kv_head = (group + MAX_ROWS - 1) / MAX_ROWS;
    const int kv_head = index / per_kv_head;
    const int skipped = index % per_kv_head * MAX_ROWS;
    return {kv_head, kv_head * group + skipped, std::min(MAX_ROWS, group - skipped)};
}

int num_heads_groups(const Step& step) {
    const int group = step.num_query_heads / step.num_kv_heads;
    return step.num_kv_heads * ((group + MAX_ROWS - 1) / MAX_ROWS);
}

// Where the keys of a run of context positions lie: the first KV head of each.
template <class T>
void find_rows(const Call& call, const Unit& unit, int begin, int count,
               const T** addresses) {
    const Step& step = *call.step;
    const int64_t* offsets = step.offsets + unit.sequence * step.table_stride;
    const int64_t stride = int64_t(step.num_kv_heads) * step.head_dim;
    int block = begin / step.block_size;
    int row = begin % step.block_size;
    for (int j = 0; j < count;) {
        const T* base = static_cast<const T*>(step.arena) + offsets[block] +
                        call.layer * step.layer_stride;
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
void start_rows(const Call& call, const Unit& unit, Rows<V>& rows) {
    const Step& step = *call.step;
    const int last_token = step.query_start[unit.sequence + 1] - 1;
    rows.count = unit.num_tokens * rows.heads.count;
    for (int r = 0; r < rows.count; r++) {
        const int token = unit.token + r / rows.heads.count;
        const int head = rows.heads.first + r % rows.heads.count;
        const int last = step.kv_len[unit.sequence] - (last_token - token);
        const T* source = static_cast<const T*>(call.query) + token * call.query_stride +
                          int64_t(head) * step.head_dim;
        for (int d = 0; d < V * LANES; d++)
            rows.query[r][d] = d < step.head_dim ? to_float(source[d]) * call.scale : 0.0f;
        rows.raw[r] = source;
        std::memset(rows.output[r], 0, sizeof rows.output[r]);
        rows.last[r] = last;
        rows.first[r] = call.window > 0 ? std::max(0, last - call.window) : 0;
        rows.maximum[r] = NEG_INF;
        rows.total[r] = 0.0f;
    }
}

template <class T>
void write_row(const Call& call, int64_t token, int64_t head, const float* values, float top,
               float total) {
    const Step& step = *call.step;
    T* target = static_cast<T*>(call.output) + token * call.output_stride + head * step.head_dim;
    const float scale = total > 0.0f ? 1.0f / total : 0.0f;
    for (int d = 0; d < step.head_dim; d++) target[d] = from_float<T>(values[d] * scale);
    if (call.lse != nullptr)
        call.lse[token * step.num_query_heads + head] =
            total > 0.0f ? top + std::log(total) : NEG_INF;
}

// Writes the results of a unit's rows, or, of a part, unscaled to scratch memory: head_dim values,
// then maximum and total, per (query token, query head).
template <class T, int V>
void finish_rows(const Call& call, const Unit& unit, const Rows<V>& rows, float* scratch) {
    const Step& step = *call.step;
    for (int r = 0; r < rows.count; r++) {
        const int64_t token = r / rows.heads.count;
        const int64_t head = rows.heads.first + r % rows.heads.count;
        if (unit.num_parts == 1) {
            write_row<T>(call, unit.token + token, head, rows.output[r], rows.maximum[r],
                         rows.total[r]);
            continue;
        }
        const int64_t index = unit.scratch + token * step.num_query_heads + head;
        float* target = scratch + index * (step.head_dim + 2);
        std::memcpy(target, rows.output[r], sizeof(float) * step.head_dim);
        target[step.head_dim] = rows.maximum[r];
        target[step.head_dim + 1] = rows.total[r];
    }
}

template <class T, int V>
void run_unit(const Call& call, const Unit& unit, float* scratch) {
    const Step& step = *call.step;
    const int width = step.head_dim;
    Tile<V> tile;
    if (width != V * LANES) std::memset(&tile, 0, sizeof tile);
    std::vector<Rows<V>> groups(num_heads_groups(step));
    for (size_t g = 0; g < groups.size(); g++) {
        groups[g].heads = heads_at(step, int(g));
        start_rows<T, V>(call, unit, groups[g]);
    }
    const T* addresses[2][TILE];
    int count = std::min(TILE, unit.end - unit.begin);
    find_rows(call, unit, unit.begin, count, addresses[0]);
    for (int begin = unit.begin, now = 0; begin < unit.end; begin += TILE, now ^= 1) {
        const int next = std::max(0, std::min(TILE, unit.end - begin - TILE));
        find_rows(call, unit, begin + TILE, next, addresses[now ^ 1]);
        for (Rows<V>& rows : groups) {
            const int64_t key = int64_t(rows.heads.kv_head) * width;
            const int64_t value = key + step.value_stride;
            prefetch_rows(step, addresses[now ^ 1], key, next);
            score_tile<T, V>(width, call.scale, rows, addresses[now], key, count, tile);
            hide_scores<V>(rows, begin, count, tile);
            soften_tile<V>(rows, tile);
            prefetch_rows(step, addresses[now ^ 1], value, next);
            add_values<T, V>(width, rows, addresses[now], value, count, tile);
        }
        count = next;
    }
    for (const Rows<V>& rows : groups) finish_rows<T, V>(call, unit, rows, scratch);
}

// Merges the parts of one context; `unit` is the first of them.
template <class T>
void merge_parts(const Call& call, const Unit& unit, const float* scratch) {
    const int width = call.step->head_dim;
    const int heads = call.step->num_query_heads;
    const int64_t next = int64_t(unit.num_tokens) * heads * (width + 2);
    std::vector<float> merged(width);
    for (int r = 0; r < unit.num_tokens * heads; r++) {
        const float* first = scratch + (unit.scratch + r) * (width + 2);
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
        write_row<T>(call, unit.token + r / heads, r % heads, merged.data(), top, total);
    }
}

// How many parts a context is cut into, so that each thread has work.
int parts_of(int length, int num_units, int threads) {
    if (threads == 1 || num_units >= 2 * threads) return 1;
    const int wanted = (2 * threads + num_units - 1) / num_units;
    return std::max(1, std::min(wanted, length / MIN_PART));
}

// The units of the given sequences, and the number of rows of partial results they need.
int64_t plan(const Call& call, const int32_t* sequences, int num_sequences, int threads,
             std::vector<Unit>& units) {
    const Step& step = *call.step;
    const int group = step.num_query_heads / step.num_kv_heads;
    const int tokens_at_once = std::max(1, MAX_ROWS / group);
    int64_t scratch = 0;
    for (int i = 0; i < num_sequences; i++) {
        const int s = sequences[i];
        const int stop = step.query_start[s + 1];
        for (int token = step.query_start[s]; token < stop; token += tokens_at_once) {
            const int count = std::min(tokens_at_once, stop - token);
            const int end = step.kv_len[s] - (stop - (token + count));
            const int oldest = std::max(0, end - count + 1 - call.window);
            const int begin = call.window > 0 ? oldest / TILE * TILE : 0;
            const int parts = parts_of(end - begin, num_sequences, threads);
            const int tiles = (end - begin + TILE - 1) / TILE;
            for (int p = 0; p < parts; p++) {
                const int from = begin + tiles * p / parts * TILE;
                const int to = std::min(end, begin + tiles * (p + 1) / parts * TILE);
                units.push_back({s, token, count, from, to, p, parts, scratch});
                if (parts > 1) scratch += int64_t(count) * step.num_query_heads;
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
}

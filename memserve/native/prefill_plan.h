// What a call of the kernel for long chunks packs and computes, and in which order.
//
// Slices of one sequence, each behind the other, see the same context but for its end: it is packed
// once, for the last of them. So it is where several instances prefill one prompt, and each has two
// slices of it in a step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace memserve {
namespace {

constexpr int TOKENS = 64;  // context tokens of a tile
constexpr int ROWS = 64;    // rows at a time

struct Call {
    const Step* step;
    int64_t layer;
    const void* query;  // [num_tokens, num_query_heads, head_dim], rows query_stride apart
    int64_t query_stride;
    void* output;  // like query
    int64_t output_stride;
    float scale;
    int32_t window;  // 0: none

    int group() const { return step->num_query_heads / step->num_kv_heads; }
    int width() const { return (step->head_dim + 31) / 32 * 32; }
};

// A KV head of a slice, and where its packed context lies.
struct Job {
    int32_t sequence;
    int32_t kv_head;
    int32_t begin;      // first packed context position
    int32_t num_tiles;  // to be packed for it; 0: a later job's context is its own, too
    int32_t num_rows;
    int64_t keys;    // offset in the scratch memory, elements: [num_tiles, TOKENS, width]
    int64_t values;  // [num_tiles, width, TOKENS]
};

struct Unit {
    const Job* job;
    int32_t index;  // of a tile to pack, or of the first row to compute
};

// Whether the context of one slice begins with all that the other one sees.
inline bool extends(const Step& step, int32_t slice, int32_t other) {
    const int64_t* blocks = step.offsets + slice * step.table_stride;
    const int64_t* others = step.offsets + other * step.table_stride;
    const int num_blocks = (step.kv_len[other] + step.block_size - 1) / step.block_size;
    return step.kv_len[slice] >= step.kv_len[other] &&
           std::equal(others, others + num_blocks, blocks);
}

// The jobs of a call, in groups whose packed contexts fit into the scratch memory together.
inline std::vector<std::vector<Job>> plan(const Call& call, const int32_t* sequences,
                                          int num_sequences, int64_t capacity) {
    const Step& step = *call.step;
    std::vector<std::vector<Job>> groups;
    int64_t used = capacity;
    for (int first = 0, last = 0; first < num_sequences; first = ++last) {
        while (call.window == 0 && last + 1 < num_sequences &&
               extends(step, sequences[last + 1], sequences[last]))
            last++;
        const int32_t longest = sequences[last];
        const int count = step.query_start[longest + 1] - step.query_start[longest];
        const int hidden = std::max(0, step.kv_len[longest] - count + 1 - call.window);
        const int begin = call.window > 0 ? hidden / TOKENS * TOKENS : 0;
        const int num_tiles = (step.kv_len[longest] - begin + TOKENS - 1) / TOKENS;
        const int64_t size = int64_t(num_tiles) * TOKENS * call.width();
        for (int head = 0; head < step.num_kv_heads; head++) {
            if (used + 2 * size > capacity) {
                groups.emplace_back();
                used = 0;
            }
            for (int i = first; i <= last; i++) {
                const int32_t s = sequences[i];
                const int num_rows = (step.query_start[s + 1] - step.query_start[s]) * call.group();
                groups.back().push_back(
                    {s, head, begin, i == last ? num_tiles : 0, num_rows, used, used + size});
            }
            used += 2 * size;
        }
    }
    return groups;
}

// Rows of late tokens see most: they come first, so that no thread ends up with one.
inline std::vector<Unit> row_units(const std::vector<Job>& jobs) {
    std::vector<Unit> units;
    for (const Job& job : jobs)
        for (int row = (job.num_rows - 1) / ROWS * ROWS; row >= 0; row -= ROWS)
            units.push_back({&job, row});
    return units;
}

inline std::vector<Unit> tile_units(const std::vector<Job>& jobs) {
    std::vector<Unit> units;
    for (const Job& job : jobs)
        for (int tile = 0; tile < job.num_tiles; tile++) units.push_back({&job, tile});
    return units;
}

}  // namespace
}  // namespace memserve

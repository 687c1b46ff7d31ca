// What attention over tiles of context computes: the tiles to pack, and the rows that meet at them.
//
// Sequences whose block tables begin alike share the packed tiles of what they have in common, and
// their rows are multiplied with these together: for questions about a document it is packed once,
// the single rows of answers to them fill a panel, and where several instances prefill one prompt
// and each has two slices of it in a step, both are served. Which rows a row is computed beside
// changes none of its bits: rows are lanes, and each sees its own tiles in order.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace memserve {
namespace {

constexpr int TOKENS = 64;  // context tokens of a tile
constexpr int ROWS = 64;    // rows at a time
constexpr int PANELS = ROWS / LANES;

struct Call {
    const Step* step;
    int64_t layer;
    const void* query;  // [num_tokens, num_query_heads, head_dim], rows query_stride apart
    int64_t query_stride;
    void* output;  // like query
    int64_t output_stride;
    float scale;
    int32_t window;  // 0: none
    bool reads_in_place;  // keys and values are operands as they lie in the arena

    int group() const { return step->num_query_heads / step->num_kv_heads; }
    int width() const { return (step->head_dim + 31) / 32 * 32; }
};

// A sequence, with rows for each KV head.
struct Job {
    int32_t sequence;
    int32_t first_tile;  // of the context
    int32_t end_tile;
    int32_t num_rows;
    int32_t numbers;  // where its tiles' numbers begin in `Group::numbers`
};

// A tile to pack. Its number, the place in `Group::packed`, tells its place in the scratch memory.
struct Packed {
    int32_t sequence;  // one that has it
    int32_t tile;
};

// Rows of a job in a block of rows.
struct Part {
    int32_t job;
    int32_t first_row;
    int32_t num_rows;
    int32_t lane;  // of the first one in the block
    int32_t begin, end;  // context positions of which a row sees something
};

// Rows that are computed together, for one KV head after the other.
struct RowBlock {
    int32_t first_part;
    int32_t num_parts;
    int32_t num_panels;
};

// Jobs for some KV heads whose packed tiles fit into the scratch memory together.
struct Group {
    int32_t first_head;
    int32_t num_heads;
    std::vector<Job> jobs;
    std::vector<Packed> packed;
    std::vector<int32_t> numbers;  // of the tiles of each job
    std::vector<Part> parts;
    std::vector<RowBlock> blocks;

    // The packed tile that a part's rows see at a place of the context; -1: they see nothing of it.
    int32_t number(const Part& part, int tile) const {
        const Job& job = jobs[part.job];
        if (part.end <= tile * TOKENS || part.begin >= (tile + 1) * TOKENS) return -1;
        return numbers[job.numbers + tile - job.first_tile];
    }
};

inline int num_new(const Step& step, int sequence) {
    return step.query_start[sequence + 1] - step.query_start[sequence];
}

// First visible context position of the token that sees `last` - 1 as its last.
inline int first_visible(int last, int window) { return window > 0 ? std::max(0, last - window) : 0; }

// Sequences in an order in which those that share tiles are neighbours.
class Sharing {
   public:
    Sharing(const Step& step, const int32_t* sequences, int count)
        : step_(step), order_(sequences, sequences + count) {
        std::stable_sort(order_.begin(), order_.end(), [this](int32_t a, int32_t b) {
            return std::lexicographical_compare(blocks(a), blocks(a) + num_whole(a), blocks(b),
                                                blocks(b) + num_whole(b));
        });
    }

    const std::vector<int32_t>& order() const { return order_; }

    // Tiles at the beginning of the context that two sequences share. One that a context doesn't fill
    // is its own: it is packed as far as it goes.
    int num_shared(int32_t a, int32_t b) const {
        const int most = std::min(num_whole(a), num_whole(b));
        const auto differ = std::mismatch(blocks(a), blocks(a) + most, blocks(b));
        const int64_t tokens = (differ.first - blocks(a)) * step_.block_size;
        const int whole = std::min(step_.kv_len[a], step_.kv_len[b]) / TOKENS;
        return std::min(whole, int(tokens / TOKENS));
    }

   private:
    const int64_t* blocks(int32_t s) const { return step_.offsets + s * step_.table_stride; }

    // Blocks that whole tiles of a context lie in.
    int num_whole(int32_t s) const {
        const int tokens = step_.kv_len[s] / TOKENS * TOKENS;
        return (tokens + step_.block_size - 1) / step_.block_size;
    }

    const Step& step_;
    std::vector<int32_t> order_;
};

// A tile that is packed and computed for a panel or two takes as long as this many rows of the kernel
// for short chunks take for it.
constexpr int SHORT_ROWS = 10;

// Marks those of the unmarked sequences whose few rows are better computed over tiles: neighbours
// that share half of their tiles, if there are enough of them.
inline void claim_sharing(const Step& step, uint8_t* claimed) {
    std::vector<int32_t> unclaimed;
    for (int s = 0; s < step.num_sequences; s++)
        if (!claimed[s]) unclaimed.push_back(s);
    const Sharing sharing(step, unclaimed.data(), int(unclaimed.size()));
    const std::vector<int32_t>& order = sharing.order();
    const int group = step.num_query_heads / step.num_kv_heads;
    for (size_t first = 0, next; first < order.size(); first = next) {
        int64_t rows = 0, tiles = 0;
        for (next = first; next < order.size(); next++) {
            const int32_t s = order[next];
            const int own = (step.kv_len[s] + TOKENS - 1) / TOKENS;
            const int shared = next == first ? 0 : sharing.num_shared(order[next - 1], s);
            if (next > first && shared * 2 < own) break;
            rows += int64_t(num_new(step, s)) * group * own;
            tiles += own - shared;
        }
        if (next - first > 1 && rows > SHORT_ROWS * tiles)
            for (size_t i = first; i < next; i++) claimed[order[i]] = 1;
    }
}

// Adds the tiles of the group's last job, of which it shares some with the job before it.
inline void add_tiles(Group& group, int shared_begin, int shared_end) {
    const int index = int(group.jobs.size()) - 1;
    const Job& job = group.jobs[index];
    for (int tile = job.first_tile; tile < job.end_tile; tile++) {
        if (tile >= shared_begin && tile < shared_end) {
            const Job& before = group.jobs[index - 1];
            group.numbers.push_back(group.numbers[before.numbers + tile - before.first_tile]);
        } else {
            group.numbers.push_back(int32_t(group.packed.size()));
            group.packed.push_back({job.sequence, tile});
        }
    }
}

// Adds the rows of the group's last job to blocks of at most `panels` panels. A job that shares tiles
// goes on in the block of the job before; in its last panel only if all rows find room there.
inline void add_rows(Group& group, const Call& call, bool shares, int panels) {
    const Step& step = *call.step;
    const int index = int(group.jobs.size()) - 1;
    const Job& job = group.jobs[index];
    const int before = step.kv_len[job.sequence] - num_new(step, job.sequence);
    bool goes_on = shares && !group.blocks.empty();
    for (int row = 0; row < job.num_rows;) {
        int lane = 0;
        if (goes_on) {
            const Part& last = group.parts.back();
            const int left = (LANES - (last.lane + last.num_rows) % LANES) % LANES;
            lane = last.lane + last.num_rows + (left < job.num_rows - row ? left : 0);
        }
        if (!goes_on || lane >= panels * LANES) {
            group.blocks.push_back({int32_t(group.parts.size()), 0, 0});
            lane = 0;
        }
        const int count = std::min(job.num_rows - row, panels * LANES - lane);
        const int last = before + (row + count - 1) / call.group() + 1;
        const int begin = first_visible(before + row / call.group() + 1, call.window);
        group.parts.push_back({index, row, count, lane, begin, last});
        RowBlock& block = group.blocks.back();
        block.num_parts++;
        block.num_panels = (lane + count + LANES - 1) / LANES;
        row += count;
        goes_on = false;
    }
}

// Blocks that see much come first, so that no thread ends up with one.
inline void sort_blocks(Group& group) {
    const auto seen = [&group](const RowBlock& block) {
        int most = 0;
        for (int i = 0; i < block.num_parts; i++) {
            const Part& part = group.parts[block.first_part + i];
            most = std::max(most, part.end - part.begin);
        }
        return most * block.num_panels;
    };
    std::stable_sort(
        group.blocks.begin(), group.blocks.end(),
        [&seen](const RowBlock& a, const RowBlock& b) { return seen(a) > seen(b); });
}

// Fewer panels to a block, if there would be few blocks for the threads.
inline int panels_at_once(const Call& call, const std::vector<int32_t>& order, int threads) {
    int64_t rows = 0;
    for (int32_t s : order) rows += num_new(*call.step, s) * call.group();
    int panels = PANELS;
    const auto num_blocks = [&] {
        return call.step->num_kv_heads * ((rows + panels * LANES - 1) / (panels * LANES));
    };
    while (panels > 1 && threads > 1 && num_blocks() < 2 * threads) panels /= 2;
    return panels;
}

// Adds a sequence to the last group, or to a new one for the same heads if that has no room for it.
inline void add_sequence(std::vector<Group>& groups, const Call& call, const Sharing& sharing,
                         int32_t s, int64_t room, int panels) {
    const Step& step = *call.step;
    const int count = num_new(step, s);
    const int first = first_visible(step.kv_len[s] - count + 1, call.window) / TOKENS;
    const int end = (step.kv_len[s] + TOKENS - 1) / TOKENS;
    int shared_begin = 0, shared_end = 0;
    if (!groups.back().jobs.empty()) {
        const Job& before = groups.back().jobs.back();
        shared_begin = std::max(first, before.first_tile);
        shared_end = std::max(shared_begin, sharing.num_shared(before.sequence, s));
    }
    const int num_own = end - first - (shared_end - shared_begin);
    if (int64_t(groups.back().packed.size() + num_own) * groups.back().num_heads > room) {
        groups.push_back({groups.back().first_head, groups.back().num_heads, {}, {}, {}, {}, {}});
        shared_end = shared_begin;
    }
    Group& group = groups.back();
    group.jobs.push_back({s, first, end, count * call.group(), int32_t(group.numbers.size())});
    add_tiles(group, shared_begin, shared_end);
    add_rows(group, call, shared_begin < shared_end, panels);
}

// All groups of a call. The scratch memory has room for so many tiles of one head; for those of any
// sequence it must have.
inline std::vector<Group> plan(const Call& call, const int32_t* sequences, int num_sequences,
                               int64_t room, int threads) {
    const Step& step = *call.step;
    const Sharing sharing(step, sequences, num_sequences);
    const int panels = panels_at_once(call, sharing.order(), threads);
    int64_t longest = 1;
    for (int32_t s : sharing.order())
        longest = std::max<int64_t>(longest, (step.kv_len[s] + TOKENS - 1) / TOKENS);
    const int heads = int(std::clamp<int64_t>(room / longest, 1, step.num_kv_heads));
    std::vector<Group> groups;
    for (int head = 0; head < step.num_kv_heads; head += heads) {
        groups.push_back({head, std::min(heads, step.num_kv_heads - head), {}, {}, {}, {}, {}});
        for (int32_t s : sharing.order()) add_sequence(groups, call, sharing, s, room, panels);
    }
    for (Group& group : groups) sort_blocks(group);
    return groups;
}

}  // namespace
}  // namespace memserve

// Paged attention on the CPU for long chunks: matrix products over tiles of the context.
//
// A row is a pair (query token, query head). The heads that share a KV head are computed together,
// ROWS rows at a time: for each tile of TOKENS context tokens the scores, the online softmax, and
// the weighted values. Everything is computed transposed: the rows lie in the lanes of a vector, 16
// of them a panel, so that the softmax of 16 rows needs no sums across lanes, and its weights come
// out as the second product wants them:
//   scores [TOKENS, 16] = keys [TOKENS, width] x query [width, 16]
//   output [width, 16] += values [width, TOKENS] x weights [TOKENS, 16]
// Keys and transposed values of a KV head are packed once per call for all its rows, those of
// other slices of its sequence too (`prefill_plan.h`).
//
// A bfloat16 arena is multiplied as such on matrix tiles (AMX); without them, and for a float
// arena, operands are float. Everything needs AVX-512: elsewhere the functions exist and
// `memserve_prefill_operands` says no.
#include "prefill_plan.h"
#include "products.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

namespace memserve {
namespace {

constexpr int HALF_TILE = 32;
constexpr int PANELS = ROWS / LANES;
constexpr int MAX_WIDTH = 256;
constexpr int64_t SCRATCH_BYTES = 4 << 20;  // packed keys and values at a time: about an L2 cache
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
    int num_panels;
};

template <class T, class E>
void pack_tile(const Call& call, const Job& job, int tile, E* scratch) {
    const Step& step = *call.step;
    const int width = call.width();
    const int begin = job.begin + tile * TOKENS;
    const int visible = std::min(TOKENS, step.kv_len[job.sequence] - begin);
    const int64_t* offsets = step.offsets + job.sequence * step.table_stride;
    const int64_t offset = int64_t(job.kv_head) * step.head_dim;
    E* keys = scratch + job.keys + int64_t(tile) * TOKENS * width;
    alignas(64) E values[TOKENS * MAX_WIDTH];
    for (int t = 0; t < TOKENS; t++) {
        const T* key = nullptr;
        if (t < visible) key = key_row<const T>(step, call.layer, offsets, begin + t) + offset;
        const T* value = key == nullptr ? nullptr : key + step.value_stride;
        copy_row(key, step.head_dim, width, keys + t * width);
        copy_row(value, step.head_dim, width, values + t * width);
    }
    transpose_rows(values, TOKENS, width, scratch + job.values + int64_t(tile) * TOKENS * width);
}

template <class T, class E>
void start_block(const Call& call, const Job& job, int first_row, int num_rows, Block<E>& block) {
    const Step& step = *call.step;
    const int group = call.group();
    const int width = call.width();
    const int token = step.query_start[job.sequence];
    const int before = step.kv_len[job.sequence] - (step.query_start[job.sequence + 1] - token);
    block.num_panels = (num_rows + LANES - 1) / LANES;
    alignas(64) E rows[LANES * MAX_WIDTH];
    for (int p = 0; p < block.num_panels; p++) {
        for (int i = 0; i < LANES; i++) {
            const int row = std::min(p * LANES + i, num_rows - 1) + first_row;
            const T* source = static_cast<const T*>(call.query) +
                              (token + row / group) * call.query_stride +
                              int64_t(job.kv_head * group + row % group) * step.head_dim;
            copy_row(source, step.head_dim, width, rows + i * width);
            const int last = before + row / group + 1;
            block.last[p][i] = last;
            block.first[p][i] = call.window > 0 ? std::max(0, last - call.window) : 0;
        }
        constexpr int IN_WORD = 4 / sizeof(E);
        transpose(rows, width * sizeof(E), width / IN_WORD, block.query + p * width * LANES, 64);
        block.maximum[p] = splat(NEVER);
        block.total[p] = floats{};
    }
    std::memset(block.output, 0, sizeof(float) * block.num_panels * width * LANES);
}

template <class T, class E>
void finish_block(const Call& call, const Job& job, int first_row, int num_rows, Block<E>& block) {
    const Step& step = *call.step;
    const int group = call.group();
    const int width = call.width();
    const int token = step.query_start[job.sequence];
    alignas(64) float rows[LANES * MAX_WIDTH];
    for (int p = 0; p < block.num_panels; p++) {
        float* output = block.output + p * width * LANES;
        const floats shrink = 1.0f / block.total[p];
        for (int d = 0; d < width; d++)
            store(output + d * LANES, load(output + d * LANES) * shrink);
        for (int d = 0; d < width; d += LANES)
            transpose(output + d * LANES, 64, LANES, rows + d, width * 4);
        for (int i = 0; i < std::min(LANES, num_rows - p * LANES); i++) {
            const int row = first_row + p * LANES + i;
            T* target = static_cast<T*>(call.output) +
                        (token + row / group) * call.output_stride +
                        int64_t(job.kv_head * group + row % group) * step.head_dim;
            int d = 0;
            for (; d + LANES <= step.head_dim; d += LANES)
                store(target + d, load(rows + i * width + d));
            for (; d < step.head_dim; d++) target[d] = from_float<T>(rows[i * width + d]);
        }
    }
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

// Hides what a panel's rows don't see of a tile that begins at `begin`.
template <class E>
void mask(Block<E>& block, int panel, int begin, int tokens) {
    // Rows are in order of their tokens: the first sees least ahead, the last least behind.
    if (begin + tokens <= block.last[panel][0] && begin >= block.first[panel][LANES - 1]) return;
    float* scores = block.scores + panel * tokens * LANES;
    for (int t = 0; t < tokens; t++) {
        const ints position = begin + t - ints{};
        const ints hidden = (position >= block.last[panel]) | (position < block.first[panel]);
        const floats score = load(scores + t * LANES);
        store(scores + t * LANES, hidden ? splat(NEG_INF) : score);
    }
}

template <class T, class E>
void run_block(const Call& call, const Job& job, int first_row, const E* scratch,
               Block<E>& block) {
    const int num_rows = std::min(ROWS, job.num_rows - first_row);
    const int width = call.width();
    const int64_t tile_size = int64_t(TOKENS) * width;
    const float scale = call.scale * Weight<E>::UNIT;
    start_block<T>(call, job, first_row, num_rows, block);
    const int end = block.last[block.num_panels - 1][LANES - 1];
    const int first_tile = (block.first[0][0] - job.begin) / TOKENS;
    for (int tile = first_tile; job.begin + tile * TOKENS < end; tile++) {
        const int begin = job.begin + tile * TOKENS;
        const int tokens = end - begin <= HALF_TILE ? HALF_TILE : TOKENS;
        const E* keys = scratch + job.keys + tile * tile_size;
        multiply<E>({keys, width, block.query, block.scores, tokens, width, block.num_panels,
                     false});
        for (int p = 0; p < block.num_panels; p++) {
            mask(block, p, begin, tokens);
            soften(block, p, tokens, width, scale);
        }
        const E* values = scratch + job.values + tile * tile_size;
        multiply<E>({values, TOKENS, block.weights, block.output, width, tokens, block.num_panels,
                     true});
    }
    finish_block<T>(call, job, first_row, num_rows, block);
}

template <class T, class E>
void run(const Call& call, const int32_t* sequences, int num_sequences, void* memory,
         int64_t capacity) {
    E* scratch = static_cast<E*>(memory);
    const int64_t room = capacity / int64_t(sizeof(E));
    for (const std::vector<Job>& jobs : plan(call, sequences, num_sequences, room)) {
        const std::vector<Unit> tiles = tile_units(jobs);
        const std::vector<Unit> rows = row_units(jobs);
        const int64_t num_tiles = int64_t(tiles.size()), num_rows = int64_t(rows.size());
#pragma omp parallel if (num_rows > 1)
        {
            [[maybe_unused]] const Registers<E> registers;
            Block<E> block;
#pragma omp for schedule(dynamic, 4)
            for (int64_t i = 0; i < num_tiles; i++)
                pack_tile<T>(call, *tiles[i].job, tiles[i].index, scratch);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < num_rows; i++)
                run_block<T>(call, *rows[i].job, rows[i].index, scratch, block);
        }
    }
}

bool use_amx() {
#if MEMSERVE_AMX
    return request_amx();
#else
    return false;
#endif
}

}  // namespace
}  // namespace memserve

extern "C" {

// Whether `memserve_prefill` works here: 0 no, 1 with float operands, 2 and with bfloat16 ones.
int32_t memserve_prefill_operands() { return memserve::use_amx() ? 2 : 1; }

// Bytes of scratch memory that suffice for `memserve_prefill` of these sequences.
int64_t memserve_prefill_scratch(const memserve::Step* step, const int32_t* sequences,
                                 int32_t num_sequences) {
    const memserve::Call call{step, 0, nullptr, 0, nullptr, 0, 1.0f, 0};
    const int64_t element = step->is_bfloat16 && memserve::use_amx() ? 2 : 4;
    int64_t all = 0, largest = 0;
    for (int i = 0; i < num_sequences; i++) {
        const int64_t context = step->kv_len[sequences[i]] + memserve::TOKENS - 1;
        const int64_t packed = context / memserve::TOKENS * memserve::TOKENS;
        const int64_t job = 2 * packed * call.width() * element;
        all += job * step->num_kv_heads;
        largest = std::max(largest, job);
    }
    return std::min(all, std::max(largest, memserve::SCRATCH_BYTES));
}

// Attention of the query tokens of `sequences` over their visible context, which must be in the
// arena. head_dim is at most 256, scale positive; scratch is aligned to 64 bytes.
void memserve_prefill(const memserve::Step* step, int64_t layer, const void* query,
                      int64_t query_stride, void* output, int64_t output_stride, float scale,
                      int32_t window, const int32_t* sequences, int32_t num_sequences,
                      void* scratch, int64_t capacity) {
    using memserve::bfloat16;
    using memserve::run;
    const memserve::Call call{step,   layer,         query, query_stride,
                              output, output_stride, scale, window};
    if (!step->is_bfloat16)
        return run<float, float>(call, sequences, num_sequences, scratch, capacity);
#if MEMSERVE_AMX
    if (memserve::use_amx())
        return run<bfloat16, bfloat16>(call, sequences, num_sequences, scratch, capacity);
#endif
    run<bfloat16, float>(call, sequences, num_sequences, scratch, capacity);
}
}
#else
extern "C" {

int32_t memserve_prefill_operands() { return 0; }

int64_t memserve_prefill_scratch(const memserve::Step*, const int32_t*, int32_t) { return 0; }

void memserve_prefill(const memserve::Step*, int64_t, const void*, int64_t, void*, int64_t, float,
                      int32_t, const int32_t*, int32_t, void*, int64_t) {}
}
#endif

// Linear layers in bfloat16 on the CPU's matrix tiles (Intel AMX): y = x W^T + b, sums in float.
//
// A weight is packed once, and one layout serves every number of rows. A tile is 16 outputs by 32
// inputs, stored as the tile registers want it: 16 lines of 64 bytes, line i holding inputs 2i and
// 2i + 1 of each output. A panel is two tiles of outputs, side by side for each 32 inputs, so that
// a product reads its weights as one stream. Whatever is beyond the weight's edges is zero.
//
// With few rows the time is that of reading the weights, so the next ones are fetched while one is
// computed. With many, as many rows are taken at a time as stay in the second-level cache beside
// the weights that pass through it; a slab of a panel stays in the first-level cache for all of them,
// and the rows pass it by. Rows are read where they lie; only those that don't fill a tile are
// copied, and filled up with zeros.
//
// Where the compiler has no AMX the functions exist and `memserve_matmul_available` says no.
#include <algorithm>
#include <memory>
#include <new>

#include <omp.h>

#include "amx.h"
#include "kernels.h"

#if MEMSERVE_AMX
namespace memserve {
namespace {

constexpr int64_t TILE_ROWS = 16;  // rows of x, or outputs of the weight
constexpr int64_t TILE_INPUTS = 32;
constexpr int64_t TILE = TILE_ROWS * TILE_INPUTS;  // elements, 1 KiB
constexpr int64_t PANEL = 2 * TILE_ROWS;           // outputs
constexpr int64_t BLOCK = 2 * TILE_ROWS;           // rows multiplied at once
constexpr int64_t SLAB = 18;                // input tiles of a panel at a time: 36 KiB
constexpr int64_t LINE = 32;                // elements of a cache line
constexpr int64_t AHEAD = 4096;             // elements, 8 KiB: how far a single block fetches ahead
constexpr int64_t CACHED_ROWS = 1 << 19;    // elements: 1 MiB, half a second-level cache
constexpr int64_t PARALLEL_FROM = 1 << 17;  // products: below, waking a thread costs more

int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Rows of x as the tile registers read them; strides count elements.
struct Rows {
    const bfloat16* first;
    int64_t row_stride;
    int64_t input_stride;  // from 32 inputs to the next
    int64_t tile_stride;   // from 16 rows to the next
};

struct Product {
    const bfloat16* rows;
    const bfloat16* weight;  // packed
    const bfloat16* bias;    // may be null
    bfloat16* target;
    int64_t num_rows;
    int64_t num_inputs;
    int64_t num_outputs;  // of the target
};

// Rows of the tile registers for blocks of `rows` rows. Registers 0 to 3 hold the sums [row tile]
// [output tile], 4 and 5 rows, 6 and 7 weights.
struct Shapes {
    uint8_t rows[8];

    explicit Shapes(int64_t count) {
        const auto low = uint8_t(std::min(count, TILE_ROWS));
        const auto high = uint8_t(std::clamp<int64_t>(count - TILE_ROWS, 1, TILE_ROWS));
        const uint8_t wanted[8] = {low, low, high, high, low, high, TILE_ROWS, TILE_ROWS};
        std::copy(wanted, wanted + 8, rows);
    }
};

// sums [16 * ROW_TILES, 32] = rows times `input_tiles` of a panel, or += . A panel that serves many
// blocks stays in the first-level cache: rows then pass it by. `between` is called for every tile of
// inputs; what it does hides behind the products.
template <int ROW_TILES, bool IS_SINGLE, class Between>
inline void multiply(const Rows& rows, const bfloat16* panel, int64_t input_tiles, bool add,
                     float* sums, const Between& between) {
    constexpr int64_t sum_stride = PANEL * sizeof(float);
    float* const low = sums + TILE_ROWS * PANEL;
    if (add) {
        _tile_loadd(0, sums, sum_stride);
        _tile_loadd(1, sums + TILE_ROWS, sum_stride);
        if (ROW_TILES == 2) {
            _tile_loadd(2, low, sum_stride);
            _tile_loadd(3, low + TILE_ROWS, sum_stride);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (ROW_TILES == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    const bfloat16* x = rows.first;
    const int64_t stride = rows.row_stride * sizeof(bfloat16);
    for (int64_t i = 0; i < input_tiles; i++) {
        between();
        if (IS_SINGLE)
            _tile_loadd(4, x, stride);
        else
            _tile_stream_loadd(4, x, stride);
        _tile_loadd(6, panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (ROW_TILES == 2) {
            if (IS_SINGLE)
                _tile_loadd(5, x + rows.tile_stride, stride);
            else
                _tile_stream_loadd(5, x + rows.tile_stride, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        x += rows.input_stride;
        panel += 2 * TILE;
    }
    _tile_stored(0, sums, sum_stride);
    _tile_stored(1, sums + TILE_ROWS, sum_stride);
    if (ROW_TILES == 2) {
        _tile_stored(2, low, sum_stride);
        _tile_stored(3, low + TILE_ROWS, sum_stride);
    }
}

inline __mmask32 first_lanes(int64_t count) {
    return count >= PANEL ? ~__mmask32(0) : (__mmask32(1) << std::max<int64_t>(count, 0)) - 1;
}

// Rounds one row's sums of a panel, plus the bias, into the target.
inline void finish(const Product& product, int64_t panel, int64_t row, const float* sums) {
    const int64_t column = panel * PANEL;
    const __mmask32 lanes = first_lanes(product.num_outputs - column);
    floats low = load(sums), high = load(sums + TILE_ROWS);
    if (product.bias != nullptr) {
        alignas(64) bfloat16 bias[PANEL];
        _mm512_store_si512(bias, _mm512_maskz_loadu_epi16(lanes, product.bias + column));
        low += load(bias);
        high += load(bias + TILE_ROWS);
    }
    _mm512_mask_storeu_epi16(product.target + row * product.num_outputs + column, lanes,
                             (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

// The same for SiLU(gate) * up: a panel's first tile is gate, its second up.
inline void finish_gated(const Product& product, int64_t panel, int64_t row, const float* sums) {
    const int64_t column = panel * TILE_ROWS;
    const auto lanes = __mmask16(first_lanes(product.num_outputs - column));
    const floats result = silu(load(sums)) * load(sums + TILE_ROWS);
    _mm256_mask_storeu_epi16(product.target + row * product.num_outputs + column, lanes,
                             (__m256i)_mm512_cvtneps_pbh((__m512)result));
}

// Rounds the sums of rows `begin` to `end`, the first of which is `sums`, into the target.
template <bool GATED>
inline void finish_rows(const Product& product, int64_t panel, int64_t begin, int64_t end,
                        const float* sums) {
    for (int64_t row = begin; row < end; row++, sums += PANEL)
        (GATED ? finish_gated : finish)(product, panel, row, sums);
}

// Copies rows `begin` to `end`, 16 at most, into tiles, filled up with zeros.
void copy_into_tiles(const Product& product, int64_t begin, int64_t end, bfloat16* target) {
    for (int64_t input = 0; input < product.num_inputs; input += TILE_INPUTS) {
        const __mmask32 lanes = first_lanes(product.num_inputs - input);
        for (int64_t row = begin; row < begin + TILE_ROWS; row++, target += TILE_INPUTS) {
            const bfloat16* source = product.rows + row * product.num_inputs + input;
            _mm512_store_si512(target, _mm512_maskz_loadu_epi16(row < end ? lanes : 0, source));
        }
    }
}

// Memory that is kept, since fresh memory costs more than what is done with it.
template <class T>
class Kept {
   public:
    T* of(int64_t size) {
        if (size > capacity_) {
            memory_.reset(new (std::align_val_t(64)) T[size]);
            capacity_ = size;
        }
        return memory_.get();
    }

   private:
    struct Free {
        void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t capacity_ = 0;
};

// Rows `begin` to `end` of a product. The first `num_in_place` are read where they lie.
struct Pass {
    const Product& product;
    int64_t begin;
    int64_t end;
    int64_t num_in_place;
    bfloat16* copied;
    int64_t width;  // inputs, rounded up to whole tiles

    void copy() const {
#pragma omp for schedule(static)
        for (int64_t row = begin + num_in_place; row < end; row += TILE_ROWS)
            copy_into_tiles(product, row, std::min(row + TILE_ROWS, end),
                            copied + (row - begin - num_in_place) * width);
    }

    Rows block(int64_t row) const {
        if (row < begin + num_in_place)
            return {product.rows + row * width, width, TILE_INPUTS, TILE_ROWS * width};
        const bfloat16* first = copied + (row - begin - num_in_place) * width;
        return {first, TILE_INPUTS, TILE, TILE_ROWS * width};
    }

    // A single block of rows by a panel.
    template <bool GATED>
    void multiply_block(int64_t panel) const {
        alignas(64) float sums[BLOCK * PANEL];
        const bfloat16* weight = product.weight + panel * PANEL * width;
        const bfloat16* ahead = weight + AHEAD;
        const auto fetch = [&] {
            for (int64_t line = 0; line < 2 * TILE / LINE; line++, ahead += LINE)
                _mm_prefetch(ahead, _MM_HINT_T0);
        };
        const auto run = end - begin > TILE_ROWS ? multiply<2, true, decltype(fetch)>
                                                 : multiply<1, true, decltype(fetch)>;
        run(block(begin), weight, width / TILE_INPUTS, false, sums, fetch);
        finish_rows<GATED>(product, panel, begin, end, sums);
    }

    // All blocks of rows by a slab of a panel: `count` input tiles from `first` on. The sums of the
    // block before are finished, and the lines of the target that the next ones go to are fetched,
    // while a block is multiplied. `sums` has a place for every block; without a later slab, two do.
    template <bool GATED>
    void multiply_slab(int64_t panel, int64_t first, int64_t count, float* sums) const {
        const int64_t column = panel * (GATED ? TILE_ROWS : PANEL);
        const bool is_last = (first + count) * TILE_INPUTS == width;
        const bool is_only = is_last && first == 0;
        const int64_t num_lines = tiles(2 * TILE / LINE, tiles(end - begin, BLOCK));
        const int64_t pace = tiles(BLOCK, count);  // rows to finish meanwhile
        const bfloat16* weight = product.weight + panel * PANEL * width + first * 2 * TILE;
        const bfloat16* ahead = weight + count * 2 * TILE;
        int64_t done = begin, done_before = begin;  // finished rows; those to be finished
        const float* finished = nullptr;
        const bfloat16* wanted = nullptr;
        const auto meanwhile = [&] {
            for (int64_t line = 0; line < num_lines; line++, ahead += LINE)
                _mm_prefetch(ahead, _MM_HINT_T1);
            const int64_t until = std::min(done + pace, done_before);
            finish_rows<GATED>(product, panel, done, until, finished);
            finished += (until - done) * PANEL;
            done = until;
            for (int64_t row = 0; is_last && row < pace; row++, wanted += product.num_outputs)
                _mm_prefetch(wanted, _MM_HINT_ET0);
        };
        for (int64_t row = begin, number = 0; row < end; row += BLOCK, number++) {
            float* target = sums + (is_only ? number % 2 : number) * BLOCK * PANEL;
            Rows rows = block(row);
            rows.first += first * rows.input_stride;
            wanted = product.target + row * product.num_outputs + column;
            multiply<2, false>(rows, weight, count, first > 0, target, meanwhile);
            finish_rows<GATED>(product, panel, done, done_before, finished);
            done = row;
            done_before = is_last ? std::min(row + BLOCK, end) : row;
            finished = target;
        }
        finish_rows<GATED>(product, panel, done, done_before, finished);
    }

    // This thread's share of the panels.
    template <bool GATED>
    void multiply_share(int64_t num_panels) const {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t last = num_panels * (thread + 1) / threads;
        int64_t panel = num_panels * thread / threads;
        if (end - begin <= BLOCK) {
            for (; panel < last; panel++) multiply_block<GATED>(panel);
            return;
        }
        const int64_t input_tiles = width / TILE_INPUTS;
        const int64_t slab = tiles(input_tiles, tiles(input_tiles, SLAB));
        thread_local Kept<float> memory;
        float* sums = memory.of(tiles(end - begin, BLOCK) * BLOCK * PANEL);
        for (; panel < last; panel++)
            for (int64_t first = 0; first < input_tiles; first += slab)
                multiply_slab<GATED>(panel, first, std::min(slab, input_tiles - first), sums);
    }
};

template <bool GATED>
void multiply_all(const Product& product) {
    if (product.num_rows == 0) return;
    const int64_t width = tiles(product.num_inputs, TILE_INPUTS) * TILE_INPUTS;
    const int64_t num_panels = tiles(product.num_outputs, GATED ? TILE_ROWS : PANEL);
    const bool is_aligned = width == product.num_inputs;
    const bool is_small = is_aligned && product.num_rows <= BLOCK;
    // Passes of equal size, in whole blocks.
    const int64_t num_passes = tiles(product.num_rows, std::max(CACHED_ROWS / width, BLOCK));
    const int64_t pass_rows = tiles(product.num_rows, num_passes * BLOCK) * BLOCK;
    thread_local Kept<bfloat16> memory;
    const int64_t num_copied = is_small ? 0 : is_aligned ? BLOCK : pass_rows;
    bfloat16* copied = memory.of(num_copied * width);
    const int64_t work = product.num_rows * width * num_panels * PANEL;
#pragma omp parallel if (work >= PARALLEL_FROM)
    {
        const Shapes shapes(is_small ? product.num_rows : BLOCK);
        const Tiles registers(shapes.rows);
        for (int64_t begin = 0; begin < product.num_rows; begin += pass_rows) {
            const int64_t end = std::min(begin + pass_rows, product.num_rows);
            const int64_t whole = (end - begin) / BLOCK * BLOCK;
            const int64_t num_in_place = is_small ? end : is_aligned ? whole : 0;
            const Pass pass{product, begin, end, num_in_place, copied, width};
            if (begin + num_in_place < end) pass.copy();
            pass.multiply_share<GATED>(num_panels);
#pragma omp barrier
        }
    }
}

void pack(const bfloat16* weight, int64_t num_outputs, int64_t num_inputs, int64_t first_tile,
          int64_t tile_step, bfloat16* packed) {
    const int64_t input_tiles = tiles(num_inputs, TILE_INPUTS);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tiles(num_outputs, TILE_ROWS); t++) {
        const int64_t place = first_tile + t * tile_step;
        bfloat16* tile = packed + (place / 2 * input_tiles * 2 + place % 2) * TILE;
        const int64_t outputs = std::min(TILE_ROWS, num_outputs - t * TILE_ROWS);
        for (int64_t i = 0; i < input_tiles; i++, tile += 2 * TILE) {
            const int64_t inputs = std::min(TILE_INPUTS, num_inputs - i * TILE_INPUTS);
            for (int64_t o = 0; o < outputs; o++) {
                const bfloat16* source =
                    weight + (t * TILE_ROWS + o) * num_inputs + i * TILE_INPUTS;
                for (int64_t k = 0; k < inputs; k++)
                    tile[k / 2 * LINE + o * 2 + k % 2] = source[k];
            }
        }
    }
}

}  // namespace
}  // namespace memserve
#endif

using memserve::bfloat16;

extern "C" {

// Whether the other functions may be called: compiled for the tiles, and the kernel lets this
// process use them. To be called first.
int32_t memserve_matmul_available() {
#if MEMSERVE_AMX
    return memserve::request_amx();
#else
    return 0;
#endif
}

// Puts a weight [num_outputs, num_inputs] into `packed`, which has room for an even number of
// output tiles by all input tiles and was zero: output tile t at first_tile + t * tile_step.
void memserve_pack_weight([[maybe_unused]] const bfloat16* weight,
                          [[maybe_unused]] int64_t num_outputs,
                          [[maybe_unused]] int64_t num_inputs, [[maybe_unused]] int64_t first_tile,
                          [[maybe_unused]] int64_t tile_step, [[maybe_unused]] bfloat16* packed) {
#if MEMSERVE_AMX
    memserve::pack(weight, num_outputs, num_inputs, first_tile, tile_step, packed);
#endif
}

// target [num_rows, num_outputs] = rows [num_rows, num_inputs] times the packed weight, plus the
// bias unless null. Gated: the weight's tiles are gate and up in turn, and the target is
// SiLU(gate) * up; there is no bias.
void memserve_multiply([[maybe_unused]] const bfloat16* rows,
                       [[maybe_unused]] const bfloat16* packed,
                       [[maybe_unused]] const bfloat16* bias, [[maybe_unused]] bfloat16* target,
                       [[maybe_unused]] int64_t num_rows, [[maybe_unused]] int64_t num_inputs,
                       [[maybe_unused]] int64_t num_outputs, [[maybe_unused]] int32_t is_gated) {
#if MEMSERVE_AMX
    const memserve::Product product{rows,     packed,     bias,       target,
                                    num_rows, num_inputs, num_outputs};
    if (is_gated)
        memserve::multiply_all<true>(product);
    else
        memserve::multiply_all<false>(product);
#endif
}
}

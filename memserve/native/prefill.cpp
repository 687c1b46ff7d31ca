// Paged attention on the CPU for long chunks, and for short ones that share contexts: matrix products
// over tiles of the context.
//
// A row is a pair (query token, query head). The heads that share a KV head are computed together,
// up to ROWS rows at a time: for each tile of TOKENS context tokens the scores, the online softmax,
// and the weighted values (`row_block.h`). Which tiles are packed, and which rows meet at them, is
// planned first (`prefill_plan.h`): sequences that share blocks share their packed tiles.
//
// A bfloat16 arena is multiplied as such on matrix tiles (AMX); without them, and for a float
// arena, operands are float. Everything needs AVX-512: elsewhere the functions exist and
// `memserve_prefill_operands` says no.
#include "products.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <omp.h>

#include "prefill_plan.h"
#include "row_block.h"

namespace memserve {
namespace {

constexpr int64_t SCRATCH_BYTES = 4 << 20;  // packed keys and values at a time: about an L2 cache

// Whether LANES keys of any tile lie as its product wants them.
template <class T, class E>
bool reads_in_place(const Call& call) {
    return sizeof(T) == sizeof(E) && call.step->head_dim == call.width() &&
           call.step->block_size % LANES == 0;
}

template <class T, class E>
void run(Call call, const int32_t* sequences, int num_sequences, void* memory, int64_t capacity) {
    call.reads_in_place = reads_in_place<T, E>(call);
    E* scratch = static_cast<E*>(memory);
    const int64_t room = capacity / (tile_size(call) * int64_t(sizeof(E)));
    for (const Group& group : plan(call, sequences, num_sequences, room, omp_get_max_threads())) {
        const int64_t num_tiles = int64_t(group.packed.size());
        const int64_t num_units = int64_t(group.blocks.size()) * group.num_heads;
#pragma omp parallel if (num_units > 1)
        {
            [[maybe_unused]] const Registers<E> registers;
            Block<E> block;
            const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
            pack_tiles<T>(call, group, num_tiles * thread / threads,
                          num_tiles * (thread + 1) / threads, scratch);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < num_units; i++)
                run_block<T>(call, group, group.blocks[i / group.num_heads],
                             int(i % group.num_heads), scratch, block);
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

// Sets claimed[s] for sequences with few query tokens that `memserve_prefill` computes sooner than
// `memserve_attend` with all of them, on matrix tiles, since they share much of their contexts.
void memserve_prefill_claim(const memserve::Step* step, uint8_t* claimed) {
    memserve::claim_sharing(*step, claimed);
}

// Bytes of scratch memory that suffice for `memserve_prefill` of these sequences.
int64_t memserve_prefill_scratch(const memserve::Step* step, const int32_t* sequences,
                                 int32_t num_sequences) {
    const memserve::Call call{step, 0, nullptr, 0, nullptr, 0, 1.0f, 0, false};
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
                              output, output_stride, scale, window, false};
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

void memserve_prefill_claim(const memserve::Step*, uint8_t*) {}

int64_t memserve_prefill_scratch(const memserve::Step*, const int32_t*, int32_t) { return 0; }

void memserve_prefill(const memserve::Step*, int64_t, const void*, int64_t, void*, int64_t, float,
                      int32_t, const int32_t*, int32_t, void*, int64_t) {}
}
#endif

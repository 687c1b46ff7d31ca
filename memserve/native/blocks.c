/* Generations of an arena's blocks, and copies that check them: a seqlock over shared memory.
 *
 * The table holds one 32-bit generation per block. Its owner bumps a block's generation when the
 * block loses its content, before anything else may be written there. A reader compares, copies,
 * and compares again; a block that changed meanwhile is reported, and its copy must not be used.
 * The mapping is read-only on the reader's side: nothing here writes to the table but `bump`.
 */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "int8.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef _Atomic uint32_t generation_t;

_Static_assert(sizeof(generation_t) == 4, "a generation is 4 bytes in shared memory");
_Static_assert(ATOMIC_INT_LOCK_FREE == 2, "a lock would not be shared between processes");

/* Ends the content of n blocks. The full fence keeps every later write to them after the bump, for a
 * reader on any processor: who copied a byte of the new content can't miss it at the second look. */
void memserve_bump_generations(generation_t *table, const int64_t *blocks, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        atomic_fetch_add_explicit(&table[blocks[i]], 1, memory_order_seq_cst);
    atomic_thread_fence(memory_order_seq_cst);
}

#if defined(__x86_64__)
enum { PAGE = 4096, STREAMS = 4, LINE = 64, AHEAD = 8 * LINE };

static inline void stream_line(char *destination, const char *source) {
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)destination, _mm512_loadu_si512((const void *)source));
#else
    for (int i = 0; i < LINE; i += 16)
        _mm_stream_si128((__m128i *)(destination + i),
                         _mm_loadu_si128((const __m128i *)(source + i)));
#endif
}

/* A copy that is not read again soon: four pages at a time, line by line in turn, past the caches. One
 * stream alone leaves most of the memory's bandwidth idle; C libraries do the same, but only for
 * copies of many megabytes, and a block is smaller than that. */
static void copy_bytes(char *destination, const char *source, size_t num_bytes) {
    size_t done = 0;
    if ((uintptr_t)destination % LINE == 0) {
        for (; done + STREAMS * PAGE <= num_bytes; done += STREAMS * PAGE)
            for (size_t line = 0; line < PAGE; line += LINE)
                for (size_t page = 0; page < STREAMS * PAGE; page += PAGE) {
                    const char *from = source + done + page + line;
                    __builtin_prefetch(from + AHEAD, 0, 3);
                    stream_line(destination + done + page + line, from);
                }
    }
    memcpy(destination + done, source + done, num_bytes - done);
    _mm_sfence();
}
#else
static void copy_bytes(char *destination, const char *source, size_t num_bytes) {
    memcpy(destination, source, num_bytes);
}
#endif

static int copy_block(char *destination, const char *source, size_t num_bytes,
                      generation_t *generation, uint32_t expected) {
    if (atomic_load_explicit(generation, memory_order_acquire) != expected)
        return 0;
    copy_bytes(destination, source, num_bytes);
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(generation, memory_order_seq_cst) == expected;
}

/* Copies num_bytes of each of n blocks, which lie block_bytes apart: all of a block, or one layer of it
 * if source and destination point there. ok[i] = 1 if source block i had the expected generation before
 * and after its copy; otherwise what was copied has no meaning. Returns the number of ones. */
int64_t memserve_copy_blocks(char *destination, const int64_t *destination_blocks,
                             const char *source, const int64_t *source_blocks,
                             const generation_t *table, const uint32_t *expected, int64_t n,
                             int64_t block_bytes, int64_t num_bytes, uint8_t *ok) {
    int64_t num_ok = 0;
    for (int64_t i = 0; i < n; i++) {
        ok[i] = (uint8_t)copy_block(destination + destination_blocks[i] * block_bytes,
                                    source + source_blocks[i] * block_bytes, (size_t)num_bytes,
                                    (generation_t *)&table[source_blocks[i]], expected[i]);
        num_ok += ok[i];
    }
    return num_ok;
}

/* Whether n blocks, which were read in place, still have the expected generations. */
int32_t memserve_generations_hold(const generation_t *table, const int64_t *blocks,
                                  const uint32_t *expected, int64_t n) {
    atomic_thread_fence(memory_order_seq_cst);
    for (int64_t i = 0; i < n; i++)
        if (atomic_load_explicit((generation_t *)&table[blocks[i]], memory_order_relaxed) !=
            expected[i])
            return 0;
    return 1;
}

/* Copies n blocks of block_bytes each between two arenas of this process, whose owner keeps both ends
 * from changing meanwhile. */
void memserve_move_blocks(char *destination, const int64_t *destination_blocks, const char *source,
                          const int64_t *source_blocks, int64_t n, int64_t block_bytes) {
    for (int64_t i = 0; i < n; i++)
        copy_bytes(destination + destination_blocks[i] * block_bytes,
                   source + source_blocks[i] * block_bytes, (size_t)block_bytes);
}

/* Copies n blocks from an arena of plain blocks into one of int8 blocks (`to_int8`), or the other way.
 * With a table each is verified as by `memserve_copy_blocks`; without one (NULL) the caller keeps both
 * ends from changing meanwhile. Returns the number of blocks copied whole. */
int64_t memserve_convert_blocks(char *destination, const int64_t *destination_blocks,
                                const char *source, const int64_t *source_blocks,
                                const generation_t *table, const uint32_t *expected, int64_t n,
                                const block_format_t *format, int64_t to_int8, uint8_t *ok) {
    const int64_t size_into = to_int8 ? format->int8_bytes : format->plain_bytes;
    const int64_t size_from = to_int8 ? format->plain_bytes : format->int8_bytes;
    int64_t num_ok = 0;
    for (int64_t i = 0; i < n; i++) {
        generation_t *generation = table ? (generation_t *)&table[source_blocks[i]] : NULL;
        char *into = destination + destination_blocks[i] * size_into;
        const char *from = source + source_blocks[i] * size_from;
        ok[i] = !generation ||
                atomic_load_explicit(generation, memory_order_acquire) == expected[i];
        if (!ok[i])
            continue;
        (to_int8 ? memserve_block_to_int8 : memserve_block_from_int8)(into, from, format);
        atomic_thread_fence(memory_order_seq_cst);
        ok[i] = !generation ||
                atomic_load_explicit(generation, memory_order_seq_cst) == expected[i];
        num_ok += ok[i];
    }
    return num_ok;
}

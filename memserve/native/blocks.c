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

static int copy_block(char *destination, const char *source, size_t num_bytes,
                      generation_t *generation, uint32_t expected) {
    if (atomic_load_explicit(generation, memory_order_acquire) != expected)
        return 0;
    memcpy(destination, source, num_bytes);
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(generation, memory_order_seq_cst) == expected;
}

/* Copies n blocks of block_bytes each. ok[i] = 1 if source block i had the expected generation
 * before and after its copy; otherwise the destination block holds bytes of no meaning. Returns the
 * number of blocks copied whole. */
int64_t memserve_copy_blocks(char *destination, const int64_t *destination_blocks,
                             const char *source, const int64_t *source_blocks,
                             const generation_t *table, const uint32_t *expected, int64_t n,
                             int64_t block_bytes, uint8_t *ok) {
    int64_t num_ok = 0;
    for (int64_t i = 0; i < n; i++) {
        ok[i] = (uint8_t)copy_block(destination + destination_blocks[i] * block_bytes,
                                    source + source_blocks[i] * block_bytes, (size_t)block_bytes,
                                    (generation_t *)&table[source_blocks[i]], expected[i]);
        num_ok += ok[i];
    }
    return num_ok;
}

/* Copies n blocks of block_bytes each between two arenas of this process, whose owner keeps both ends
 * from changing meanwhile. */
void memserve_move_blocks(char *destination, const int64_t *destination_blocks, const char *source,
                          const int64_t *source_blocks, int64_t n, int64_t block_bytes) {
    for (int64_t i = 0; i < n; i++)
        memcpy(destination + destination_blocks[i] * block_bytes,
               source + source_blocks[i] * block_bytes, (size_t)block_bytes);
}

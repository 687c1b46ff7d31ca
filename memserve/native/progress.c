/* How far a step is: a 64-bit word in shared memory that grows, and waiting for it to grow.
 *
 * Its owner stores with release semantics, so who reads a value sees all that was written before it.
 * A waiter sleeps in the kernel on the word's lower half, which a read-only mapping suffices for; the
 * owner's call to wake is made whether or not anybody waits (150 ns if nobody does).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef _Atomic uint64_t word_t;

_Static_assert(sizeof(word_t) == 8, "the word is 8 bytes in shared memory");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a lock would not be shared between processes");

static uint32_t *lower_half(word_t *word) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return (uint32_t *)word;
#else
    return (uint32_t *)word + 1;
#endif
}

/* Stores a value and wakes all who wait. */
void memserve_store_progress(word_t *word, uint64_t value) {
    atomic_store_explicit(word, value, memory_order_release);
    syscall(SYS_futex, lower_half(word), FUTEX_WAKE, INT_MAX, 0, 0, 0);
}

/* The word, as soon as it is at least `wanted`, or as it is after `seconds`. May return earlier. */
uint64_t memserve_wait_for_progress(word_t *word, uint64_t wanted, double seconds) {
    uint64_t value = atomic_load_explicit(word, memory_order_acquire);
    if (value >= wanted || seconds <= 0)
        return value;
    struct timespec limit = {(time_t)seconds, 0};
    limit.tv_nsec = (long)((seconds - (double)limit.tv_sec) * 1e9);
    /* Not entered if the word has changed since it was read. */
    syscall(SYS_futex, lower_half(word), FUTEX_WAIT, (uint32_t)value, &limit, 0, 0);
    return atomic_load_explicit(word, memory_order_acquire);
}

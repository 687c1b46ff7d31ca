/* Blocks of KV as 8-bit integers with one scale for each layer, K or V, and head; see int8.c. */
#ifndef MEMSERVE_INT8_H
#define MEMSERVE_INT8_H

#include <stdint.h>

/* Shape of one block, as `memserve.pool.int8.block_format` packs it. */
typedef struct {
    int64_t num_planes; /* layers, twice: K and V */
    int64_t block_size;
    int64_t num_heads;
    int64_t head_dim;
    int64_t value_type; /* 0 float32, 1 bfloat16, 2 float16 */
    int64_t plain_bytes;
    int64_t int8_bytes;
} block_format_t;

void memserve_block_to_int8(char *destination, const char *source, const block_format_t *format);
void memserve_block_from_int8(char *destination, const char *source, const block_format_t *format);

#endif

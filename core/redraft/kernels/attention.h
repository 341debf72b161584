/* Paged attention, as other files call it. */
#ifndef REDRAFT_ATTENTION_H
#define REDRAFT_ATTENTION_H

#include <stdatomic.h>
#include <stdint.h>

#include "pool.h"

enum { QUERIES_PER_ITEM = 8 };
typedef struct {
  const float *query;           /* [tokens, heads, head_dim], a token's at `query_stride` floats from the last one's */
  const float *keys, *values;   /* [kv_heads, num_slots, head_dim] of this layer */
  float *output;                /* [tokens, heads, head_dim] */
  const int32_t *items;         /* [num_items / kv_heads][4]: first token, queries, first query's position, table row */
  const int32_t *blocks;        /* [segments, table_width] block ids */
  long query_stride, heads, kv_heads, head_dim, num_slots, block_size, table_width, window; /* window 0: none */
  float scale, softcap;                                                       /* softcap 0: none */
  /* what follows is the kernel's own */
  long num_tasks, part_size;
  float *parts;
  atomic_int failed;
} attention_job;

/* Work of items[num_items][4]; the caller has entered the pool. head_dim: a multiple of 8, at most 256. 0, or -1: memory
 * ran out. */
INTERNAL int attention_run(attention_job *job, long num_items);

#endif

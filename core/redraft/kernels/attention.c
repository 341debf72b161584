/* Paged attention: reads keys and values where they lie; see pool.h for what all kernels promise. */
#include <stdlib.h>

#include "attention.h"
#include "vector.h"

/* The score of a key: its product with the query, scaled and, if wanted, capped. */
INLINE float score_of(const attention_job *job, const float *q, const float *key, int dim) {
  __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
  int d = 0;
  for (; d + 16 <= dim; d += 16) {
    even = _mm256_fmadd_ps(_mm256_loadu_ps(q + d), _mm256_loadu_ps(key + d), even);
    odd = _mm256_fmadd_ps(_mm256_loadu_ps(q + d + 8), _mm256_loadu_ps(key + d + 8), odd);
  }
  if (d < dim) even = _mm256_fmadd_ps(_mm256_loadu_ps(q + d), _mm256_loadu_ps(key + d), even);
  float score = sum8(_mm256_add_ps(even, odd)) * job->scale;
  return job->softcap > 0.0f ? __builtin_tanhf(score / job->softcap) * job->softcap : score;
}

/* Positions from `position` on that lie behind one another in memory, at most `left`; the first one's slot. */
INLINE long next_run(const attention_job *job, const int32_t *table, long position, long left, long *slot) {
  long offset = position % job->block_size, run = job->block_size - offset;
  *slot = table[position / job->block_size] * job->block_size + offset;
  return run < left ? run : left;
}

/* One query row over `count` keys from position `first`: scores, softmax, weighted values. */
INLINE void attend_row(const attention_job *job, const float *q, const float *keys, const float *values,
                       const int32_t *table, long first, long count, float *scores, float *out, int dim) {
  float highest = -__builtin_inff();
  for (long j = 0, slot, end; j < count;) {
    end = j + next_run(job, table, first + j, count - j, &slot);
    for (const float *key = keys + slot * dim; j < end; j++, key += dim) {
      scores[j] = score_of(job, q, key, dim);
      if (scores[j] > highest) highest = scores[j];
    }
  }
  long padded = (count + 7) / 8 * 8;
  for (long j = count; j < padded; j++) scores[j] = -__builtin_inff();
  __m256 total = _mm256_setzero_ps();
  for (long j = 0; j < padded; j += 8) {
    __m256 e = exp_negative(_mm256_sub_ps(_mm256_loadu_ps(scores + j), _mm256_set1_ps(highest)));
    _mm256_storeu_ps(scores + j, e);
    total = _mm256_add_ps(total, e);
  }
  /* the padding's exp(-87) is 1e-38 each: below the resolution of a sum that is at least 1 */
  float inverse = 1.0f / sum8(total);
  __m256 mixed[32];
  for (int v = 0; v < dim / 8; v++) mixed[v] = _mm256_setzero_ps();
  for (long j = 0, slot, end; j < count;) {
    end = j + next_run(job, table, first + j, count - j, &slot);
    for (const float *value = values + slot * dim; j < end; j++, value += dim) {
      __m256 weight = _mm256_set1_ps(scores[j]);
      for (int v = 0; v < dim / 8; v++) mixed[v] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(value + 8 * v), mixed[v]);
    }
  }
  for (int v = 0; v < dim / 8; v++) _mm256_storeu_ps(out + 8 * v, _mm256_mul_ps(mixed[v], _mm256_set1_ps(inverse)));
}

INLINE void attend_item(attention_job *job, long item, int dim) {
  const int32_t *work = job->items + item / job->kv_heads * 4;
  long kv_head = item % job->kv_heads, group = job->heads / job->kv_heads;
  long first_token = work[0], queries = work[1], start = work[2];
  const int32_t *table = job->blocks + work[3] * job->table_width;
  const float *keys = job->keys + kv_head * job->num_slots * dim, *values = job->values + kv_head * job->num_slots * dim;
  float *scores = malloc((start + queries + 8) * sizeof(float));
  if (!scores) { atomic_store(&job->failed, 1); return; }
  for (long t = 0; t < queries; t++) {
    long end = start + t + 1, first = job->window > 0 && end > job->window ? end - job->window : 0;
    for (long g = 0; g < group; g++) {
      long token = first_token + t, head = kv_head * group + g;
      attend_row(job, job->query + token * job->query_stride + head * dim, keys, values, table, first, end - first,
                 scores, job->output + (token * job->heads + head) * dim, dim);
    }
  }
  free(scores);
}

/* a constant head_dim lets the compiler keep a row of values in registers */
AVX2 static void attention_item(void *arg, long item) {
  attention_job *job = arg;
  switch (job->head_dim) {
    case 64: attend_item(job, item, 64); break;
    case 128: attend_item(job, item, 128); break;
    default: attend_item(job, item, (int)job->head_dim);
  }
}

int attention_run(attention_job *job, long num_items) {
  atomic_store(&job->failed, 0);
  pool_run(attention_item, job, num_items * job->kv_heads);
  return atomic_load(&job->failed) ? -1 : 0;
}

/* Returns 0, or -1 if memory ran out. */
int redraft_attention(const float *query, const float *keys, const float *values, float *output, const int32_t *items,
                      long num_items, const int32_t *blocks, long table_width, long heads, long kv_heads,
                      long head_dim, long num_slots, long block_size, long window, float scale, float softcap) {
  attention_job job = {query, keys, values, output, items, blocks, heads * head_dim, heads, kv_heads, head_dim,
                       num_slots, block_size, table_width, window, scale, softcap, 0};
  pool_enter();
  int status = attention_run(&job, num_items);
  pool_leave();
  return status;
}

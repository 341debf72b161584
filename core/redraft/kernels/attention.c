/* Paged attention in fp32; see pool.h for what all kernels promise. */
#include <immintrin.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "pool.h"

/* ---- paged attention: reads keys and values where they lie ---- */

enum { QUERIES_PER_ITEM = 8 };

typedef struct {
  const float *query;           /* [tokens, heads, head_dim] */
  const float *keys, *values;   /* [kv_heads, num_slots, head_dim] of this layer */
  float *output;                /* [tokens, heads, head_dim] */
  const int32_t *items;         /* [num_items / kv_heads][4]: first token, queries, first query's position, table row */
  const int32_t *blocks;        /* [segments, table_width] block ids */
  long heads, kv_heads, head_dim, num_slots, block_size, table_width, window; /* window 0: none */
  float scale, softcap;                                                       /* softcap 0: none */
  atomic_int failed;
} attention_job;

/* exp(x) for x <= 0, relative error < 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf) */
INLINE __m256 exp_negative(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
  __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

INLINE float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* One query row over `count` keys from position `first`: scores, softmax, weighted values. */
INLINE void attend_row(const attention_job *job, const float *q, const float *keys, const float *values,
                       const int32_t *table, long first, long count, float *scores, float *out, int dim) {
  float highest = -__builtin_inff();
  for (long j = 0; j < count; j++) {
    long position = first + j;
    const float *key = keys + (table[position / job->block_size] * job->block_size + position % job->block_size) * dim;
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    int d = 0;
    for (; d + 16 <= dim; d += 16) {
      even = _mm256_fmadd_ps(_mm256_loadu_ps(q + d), _mm256_loadu_ps(key + d), even);
      odd = _mm256_fmadd_ps(_mm256_loadu_ps(q + d + 8), _mm256_loadu_ps(key + d + 8), odd);
    }
    if (d < dim) even = _mm256_fmadd_ps(_mm256_loadu_ps(q + d), _mm256_loadu_ps(key + d), even);
    float score = sum8(_mm256_add_ps(even, odd)) * job->scale;
    if (job->softcap > 0.0f) score = __builtin_tanhf(score / job->softcap) * job->softcap;
    scores[j] = score;
    if (score > highest) highest = score;
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
  for (long j = 0; j < count; j++) {
    long position = first + j;
    const float *value = values + (table[position / job->block_size] * job->block_size + position % job->block_size) * dim;
    __m256 weight = _mm256_set1_ps(scores[j]);
    for (int v = 0; v < dim / 8; v++) mixed[v] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(value + 8 * v), mixed[v]);
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
      long row = ((first_token + t) * job->heads + kv_head * group + g) * dim;
      attend_row(job, job->query + row, keys, values, table, first, end - first, scores, job->output + row, dim);
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

/* head_dim: a multiple of 8, at most 256. Returns 0, or -1 if memory ran out. */
int redraft_attention(const float *query, const float *keys, const float *values, float *output, const int32_t *items,
                      long num_items, const int32_t *blocks, long table_width, long heads, long kv_heads,
                      long head_dim, long num_slots, long block_size, long window, float scale, float softcap) {
  attention_job job = {query, keys, values, output, items, blocks, heads, kv_heads, head_dim, num_slots,
                       block_size, table_width, window, scale, softcap, 0};
  pool_enter();
  pool_run(attention_item, &job, num_items * kv_heads);
  pool_leave();
  return atomic_load(&job.failed) ? -1 : 0;
}

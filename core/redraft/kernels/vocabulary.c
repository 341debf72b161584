/* What verification, capture and the draft need to know of rows over a whole vocabulary: each row is one item of the
 * pool, so what comes out for a row does not depend on the others. All of a row fits the second-level cache, so its
 * passes cost arithmetic. */

#include <stdatomic.h>
#include <stdlib.h>

#include "vocabulary.h"

/* -- the largest values of a row -------------------------------------------------------------------------------- */

/* smaller value, or of equal ones the later id: what has to leave first */
INLINE int worse(entry a, entry b) { return a.value < b.value || (a.value == b.value && a.id > b.id); }

/* a heap with the worst entry on top */
INLINE void sift_down(entry *heap, long size, long at) {
  entry moved = heap[at];
  for (long child; (child = 2 * at + 1) < size; at = child) {
    if (child + 1 < size && worse(heap[child + 1], heap[child])) child++;
    if (!worse(heap[child], moved)) break;
    heap[at] = heap[child];
  }
  heap[at] = moved;
}

AVX2 static int best_first(const void *a, const void *b) { return worse(*(const entry *)b, *(const entry *)a) ? -1 : 1; }

AVX2 void largest(const float *x, long n, entry *best, long size) {
  long i = 0;
  for (; i < size; i++) best[i] = (entry){x[i], (int32_t)i};
  for (long at = size / 2 - 1; at >= 0; at--) sift_down(best, size, at);
  for (; i < n && size; i++) {
    if (i % 8 == 0 && i + 8 <= n) { /* mostly none of eight is good enough */
      __m256 better = _mm256_cmp_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(best[0].value), _CMP_GT_OQ);
      if (!_mm256_movemask_ps(better)) { i += 7; continue; }
    }
    if (x[i] <= best[0].value) continue;
    best[0] = (entry){x[i], (int32_t)i};
    sift_down(best, size, 0);
  }
  qsort(best, size, sizeof(entry), best_first);
}

/* -- summaries --------------------------------------------------------------------------------------------------- */

typedef struct {
  const float *logits;
  long n, num_top;
  const float *temperatures;
  int32_t *ids;
  float *values, *totals, *tempered;
  atomic_int failed;
} summary_job;

AVX2 static void summarise_item(void *arg, long row) {
  summary_job *job = arg;
  const float *x = job->logits + row * job->n;
  float most = maximum(x, job->n), temperature = job->temperatures[row];
  job->totals[row] = most + (float)log(sum_exp(x, job->n, most, 1.0f, NULL));
  float slope = temperature > 0.0f ? 1.0f / temperature : 1.0f;
  job->tempered[row] = slope == 1.0f ? job->totals[row]
                                     : (float)(most * (double)slope + log(sum_exp(x, job->n, most, slope, NULL)));
  entry *best = malloc((job->num_top + 1) * sizeof(entry));
  if (!best) { atomic_store(&job->failed, 1); return; }
  largest(x, job->n, best, job->num_top);
  for (long i = 0; i < job->num_top; i++) {
    job->ids[row * job->num_top + i] = best[i].id;
    job->values[row * job->num_top + i] = best[i].value;
  }
  free(best);
}

/* The num_top largest logits of every row with their ids, and logsumexp of the logits and of logits / temperature (of
 * the logits where that is 0). Returns 0, or -1 if memory ran out. */
int redraft_summarise(const float *logits, long rows, long n, long num_top, const float *temperatures, int32_t *ids,
                      float *values, float *totals, float *tempered) {
  summary_job job = {logits, n, num_top, temperatures, ids, values, totals, tempered, 0};
  pool_enter();
  pool_run(summarise_item, &job, rows);
  pool_leave();
  return atomic_load(&job.failed) ? -1 : 0;
}

/* -- peaks, overlaps ----------------------------------------------------------------------------------------------- */

typedef struct {
  const float *scores;
  long n;
  int64_t *ids;
  float *values, *shares;
} peak_job;

AVX2 static void peak_item(void *arg, long row) {
  peak_job *job = arg;
  const float *x = job->scores + row * job->n;
  float most = job->values[row] = maximum(x, job->n);
  if (job->shares) /* NaN as well where the largest is not finite */
    job->shares[row] = most - most == 0.0f ? 1.0f / (float)sum_exp(x, job->n, most, 1.0f, NULL) : __builtin_nanf("");
  job->ids[row] = 0;
  for (long i = 0; i < job->n; i += 8) {
    int lanes = _mm256_movemask_ps(_mm256_cmp_ps(load_rest(x, i, job->n), _mm256_set1_ps(most), _CMP_EQ_OQ));
    if (lanes) { job->ids[row] = i + __builtin_ctz(lanes); return; }
  }
}

/* The largest score of every row and its first id; NaN and 0 where one is NaN. `shares`, unless NULL: its part of the
 * sum of all exponentials. */
void redraft_peaks(const float *scores, long rows, long n, int64_t *ids, float *values, float *shares) {
  peak_job job = {scores, n, ids, values, shares};
  pool_enter();
  pool_run(peak_item, &job, rows);
  pool_leave();
}

typedef struct {
  const float *p;
  const int64_t *p_rows;
  const float *q;
  const int64_t *q_rows;
  long n;
  float *overlaps;
} overlap_job;

AVX2 static void overlap_item(void *arg, long pair) {
  overlap_job *job = arg;
  const float *p = job->p + job->p_rows[pair] * job->n, *q = job->q + job->q_rows[pair] * job->n;
  __m256d sum = _mm256_setzero_pd();
  long i = 0;
  for (; i + 8 <= job->n; i += 8) sum = add_wide(sum, _mm256_min_ps(_mm256_loadu_ps(p + i), _mm256_loadu_ps(q + i)));
  double total = sum4(sum);
  for (; i < job->n; i++) total += p[i] < q[i] ? p[i] : q[i];
  job->overlaps[pair] = (float)total;
}

/* sum_v min(p_v, q_v) of `pairs` pairs of rows. */
void redraft_overlaps(const float *p, const int64_t *p_rows, const float *q, const int64_t *q_rows, long pairs, long n,
                      float *overlaps) {
  overlap_job job = {p, p_rows, q, q_rows, n, overlaps};
  pool_enter();
  pool_run(overlap_item, &job, pairs);
  pool_leave();
}

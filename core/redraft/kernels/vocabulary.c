/* What verification, capture and the draft need to know of rows over a whole vocabulary: each row is one item of the
 * pool, so what comes out for a row does not depend on the others. All of a row fits the second-level cache, so its
 * passes cost arithmetic. */

#include <stdatomic.h>
#include <stdlib.h>

#include "vocabulary.h"

enum { STRIPE = 128, MAX_STRIPES = 2048 }; /* floats, at least, whose largest is remembered; how many of them */

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

/* Where a stripe of `width` ends in a row of n; the last may be shorter. */
INLINE long end_of(long stripe, long width, long n) {
  long end = (stripe + 1) * width;
  return end < n ? end : n;
}

/* The largest of a stripe of x, never NaN; `unordered` remembers the NaNs. */
INLINE float stripe_peak(const float *x, long count, __m256 *unordered) {
  __m256 most = _mm256_set1_ps(-INFINITY);
  for (long i = 0; i < count; i += 8) {
    __m256 v = load_rest(x, i, count);
    *unordered = _mm256_or_ps(*unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    most = _mm256_max_ps(v, most); /* of a NaN and another, `most` */
  }
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

/* Keep x[at] if it is among the `size` best so far, of which `*count` are there. */
INLINE void offer(entry *heap, long *count, long size, float value, long at) {
  if (*count < size) {
    heap[(*count)++] = (entry){value, (int32_t)at};
    if (*count == size)
      for (long i = size / 2 - 1; i >= 0; i--) sift_down(heap, size, i);
  } else if (value > heap[0].value) {
    heap[0] = (entry){value, (int32_t)at};
    sift_down(heap, size, 0);
  }
}

/* One pass finds the largest of every stripe. `size` stripes have one that reaches the size-th largest of those, so
 * nothing below it is wanted, and few stripes have to be looked at again. */
AVX2 float largest(const float *x, long n, entry *best, long size) {
  float peaks[MAX_STRIPES], most = -INFINITY, floor = -INFINITY;
  long width = (n + MAX_STRIPES - 1) / MAX_STRIPES, count = 0;
  if (width < STRIPE) width = STRIPE;
  long stripes = (n + width - 1) / width;
  __m256 unordered = _mm256_setzero_ps();
  for (long s = 0; s < stripes; s++) {
    peaks[s] = stripe_peak(x + s * width, end_of(s, width, n) - s * width, &unordered);
    most = peaks[s] > most ? peaks[s] : most;
  }
  if (_mm256_movemask_ps(unordered)) {
    for (long i = 0; i < size; i++) best[i] = (entry){NAN, 0};
    return NAN;
  }
  if (size == 0) return most;
  if (size <= stripes) {
    for (long s = 0; s < stripes; s++) offer(best, &count, size, peaks[s], s);
    floor = best[0].value;
    count = 0;
  }
  for (long s = 0; s < stripes; s++) {
    if (peaks[s] < floor) continue;
    long end = end_of(s, width, n);
    for (long i = s * width; i < end; i += 8) {
      __m256 enough = _mm256_cmp_ps(load_rest(x, i, end), _mm256_set1_ps(floor), _CMP_GE_OQ);
      for (int lanes = _mm256_movemask_ps(enough); lanes; lanes &= lanes - 1) {
        long at = i + __builtin_ctz(lanes);
        if (at < end) offer(best, &count, size, x[at], at); /* beyond the end it is -inf */
      }
    }
  }
  qsort(best, size, sizeof(entry), best_first);
  return most;
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
  entry *best = malloc((job->num_top + 1) * sizeof(entry));
  if (!best) { atomic_store(&job->failed, 1); return; }
  float most = largest(x, job->n, best, job->num_top), temperature = job->temperatures[row];
  job->totals[row] = most + (float)log(sum_exp(x, job->n, most, 1.0f, NULL));
  float slope = temperature > 0.0f ? 1.0f / temperature : 1.0f;
  job->tempered[row] = slope == 1.0f ? job->totals[row]
                                     : (float)(most * (double)slope + log(sum_exp(x, job->n, most, slope, NULL)));
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
  entry best;
  float most = job->values[row] = largest(x, job->n, &best, 1);
  if (job->shares) /* NaN as well where the largest is not finite */
    job->shares[row] = most - most == 0.0f ? 1.0f / (float)sum_exp(x, job->n, most, 1.0f, NULL) : __builtin_nanf("");
  job->ids[row] = best.id;
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

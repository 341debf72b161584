/* What sampling and capture need of rows over a whole vocabulary: each row is one item of the pool, so what comes out
 * for a row does not depend on the others. All of a row fits the second-level cache, so its passes cost arithmetic. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"
#include "vector.h"

enum { BLOCK = 512 }; /* floats that are summed in float32 before the sum goes on in float64 */

static const float LEAST = -87.0f; /* below it exp is 0 here */

/* -- the largest values of a row -------------------------------------------------------------------------------- */

typedef struct { float value; int32_t id; } entry;

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

/* The `size` largest of x, best first; of equal ones those with smaller ids. size <= n. */
AVX2 static void largest(const float *x, long n, entry *best, long size) {
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

/* -- sums of exponentials --------------------------------------------------------------------------------------- */

/* The largest of x; NaN if one of them is. */
INLINE float maximum(const float *x, long n) {
  __m256 most = _mm256_set1_ps(-INFINITY), unordered = _mm256_setzero_ps();
  long i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 v = _mm256_loadu_ps(x + i);
    most = _mm256_max_ps(most, v);
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  float lanes[8], result = -INFINITY;
  _mm256_storeu_ps(lanes, most);
  int is_nan = _mm256_movemask_ps(unordered);
  for (int lane = 0; lane < 8; lane++) result = lanes[lane] > result ? lanes[lane] : result;
  for (; i < n; i++) {
    is_nan |= x[i] != x[i];
    result = x[i] > result ? x[i] : result;
  }
  return is_nan ? NAN : result;
}

/* Eight of x from i on, as far as there are any; the rest is -inf. */
INLINE __m256 load_rest(const float *x, long i, long n) {
  if (i + 8 <= n) return _mm256_loadu_ps(x + i);
  float lanes[8];
  for (int lane = 0; lane < 8; lane++) lanes[lane] = i + lane < n ? x[i + lane] : -INFINITY;
  return _mm256_loadu_ps(lanes);
}

INLINE void store_rest(float *x, long i, long n, __m256 v) {
  if (i + 8 <= n) { _mm256_storeu_ps(x + i, v); return; }
  float lanes[8];
  _mm256_storeu_ps(lanes, v);
  memcpy(x + i, lanes, (n - i) * sizeof(float));
}

/* Sum of exp((x - most) * slope), float64; the terms also go to `terms` if it is given. */
INLINE double sum_exp(const float *x, long n, float most, float slope, float *terms) {
  __m256 shift = _mm256_set1_ps(most), factor = _mm256_set1_ps(slope), least = _mm256_set1_ps(LEAST);
  double total = 0.0;
  for (long start = 0; start < n; start += BLOCK) {
    long end = start + BLOCK < n ? start + BLOCK : n;
    __m256 sum = _mm256_setzero_ps();
    for (long i = start; i < end; i += 8) {
      __m256 v = _mm256_mul_ps(_mm256_sub_ps(load_rest(x, i, end), shift), factor);
      __m256 e = _mm256_and_ps(exp_negative(v), _mm256_cmp_ps(v, least, _CMP_GT_OQ));
      sum = _mm256_add_ps(sum, e);
      if (terms) store_rest(terms, i, end, e);
    }
    total += sum8(sum);
  }
  return total;
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

/* -- probabilities ----------------------------------------------------------------------------------------------- */

typedef struct {
  const float *scores;
  long n;
  const float *temperatures;
  const int32_t *top_k;
  const double *top_p;
  const float *min_p;
  float *probs;
  atomic_int failed;
} probability_job;

/* The smallest term that top-k and top-p keep, or -1 if memory ran out. `total` is the sum of all terms. */
AVX2 static float nucleus(const float *terms, long n, double total, long top_k, double top_p) {
  int has_top_k = top_k > 0 && top_k < n;
  if (!has_top_k && top_p >= 1.0) return 0.0f;
  for (long width = has_top_k ? top_k : 64;; width = width < 1024 ? 1024 : n) { /* a nucleus is nearly always small */
    if (width > n) width = n;
    entry *best = malloc(width * sizeof(entry));
    if (!best) return -1.0f;
    largest(terms, n, best, width);
    double left = total, mass = 0.0;
    long last = 0;
    if (has_top_k) { /* top-p is of what top-k left */
      left = 0.0;
      for (long i = 0; i < width; i++) left += best[i].value;
    }
    while (last < width && (mass += best[last].value) < top_p * left) last++;
    int is_found = last < width || width == n || has_top_k;
    float least = best[top_p < 1.0 && last < width ? last : width - 1].value;
    free(best);
    if (is_found) return least;
  }
}

AVX2 static void probability_item(void *arg, long row) {
  probability_job *job = arg;
  long n = job->n;
  const float *x = job->scores + row * n;
  float *probs = job->probs + row * n, most = maximum(x, n);
  if (!isfinite(most)) { /* no distribution */
    for (long i = 0; i < n; i++) probs[i] = NAN;
    return;
  }
  /* below 1e-30 float32 itself would make 0 * inf of the largest */
  double total = sum_exp(x, n, most, 1.0f / fmaxf(job->temperatures[row], 1e-30f), probs);
  float least = nucleus(probs, n, total, job->top_k[row], job->top_p[row]);
  if (least < 0.0f) { atomic_store(&job->failed, 1); return; }
  least = fmaxf(least, job->min_p[row]); /* the largest term is 1 */
  if (least > 0.0f) {
    __m256 floor = _mm256_set1_ps(least);
    total = 0.0;
    for (long start = 0; start < n; start += BLOCK) {
      long end = start + BLOCK < n ? start + BLOCK : n;
      __m256 sum = _mm256_setzero_ps();
      for (long i = start; i < end; i += 8) {
        __m256 v = load_rest(probs, i, end);
        v = _mm256_and_ps(v, _mm256_cmp_ps(v, floor, _CMP_GE_OQ));
        sum = _mm256_add_ps(sum, v);
        store_rest(probs, i, end, v);
      }
      total += sum8(sum);
    }
  }
  __m256 divisor = _mm256_set1_ps((float)total);
  long i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(probs + i, _mm256_div_ps(_mm256_loadu_ps(probs + i), divisor));
  for (; i < n; i++) probs[i] /= (float)total;
}

/* Rows of softmax(scores / temperature), cut by top-k (0: not), top-p of what that left (1: not) and min-p (0: not),
 * renormalised; NaN throughout where the largest score is not finite. Returns 0, or -1 if memory ran out. */
int redraft_probabilities(const float *scores, long rows, long n, const float *temperatures, const int32_t *top_k,
                          const double *top_p, const float *min_p, float *probs) {
  probability_job job = {scores, n, temperatures, top_k, top_p, min_p, probs, 0};
  pool_enter();
  pool_run(probability_item, &job, rows);
  pool_leave();
  return atomic_load(&job.failed) ? -1 : 0;
}

/* -- the exponential race ---------------------------------------------------------------------------------------- */

typedef struct {
  const float *probs;
  long n;
  const uint64_t *bits;
  int32_t *winners;
} race_job;

/* MurmurHash3's finaliser */
INLINE __m256i mix32(__m256i v) {
  v = _mm256_xor_si256(v, _mm256_srli_epi32(v, 16));
  v = _mm256_mullo_epi32(v, _mm256_set1_epi32((int)0x85EBCA6Bu));
  v = _mm256_xor_si256(v, _mm256_srli_epi32(v, 13));
  v = _mm256_mullo_epi32(v, _mm256_set1_epi32((int)0xC2B2AE35u));
  return _mm256_xor_si256(v, _mm256_srli_epi32(v, 16));
}

/* u of eight ids from `first` on, as redraft.sampling.randomness.exponentials has it before the logarithm */
INLINE __m256 uniforms(int32_t first, uint64_t bits) {
  __m256i id = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256i counter = _mm256_mullo_epi32(id, _mm256_set1_epi32((int)0x9E3779B1u));
  __m256i mixed = mix32(_mm256_add_epi32(counter, _mm256_set1_epi32((int)(uint32_t)bits)));
  mixed = mix32(_mm256_xor_si256(mixed, _mm256_set1_epi32((int)(uint32_t)(bits >> 32))));
  __m256 negative = _mm256_castsi256_ps(_mm256_srai_epi32(mixed, 31));
  __m256 whole = _mm256_add_ps(_mm256_cvtepi32_ps(mixed), _mm256_and_ps(negative, _mm256_set1_ps(4294967296.0f)));
  return _mm256_mul_ps(_mm256_add_ps(whole, _mm256_set1_ps(0.5f)), _mm256_set1_ps(1.0f / 4294967296.0f));
}

AVX2 static void race_item(void *arg, long row) {
  race_job *job = arg;
  const float *probs = job->probs + row * job->n;
  float best = INFINITY;
  int32_t winner = 0;
  for (long i = 0; i < job->n; i += 8) {
    __m256 p = load_rest(probs, i, job->n);
    __m256 possible = _mm256_cmp_ps(p, _mm256_setzero_ps(), _CMP_GT_OQ);
    if (!_mm256_movemask_ps(possible)) continue;
    __m256 u = uniforms((int32_t)i, job->bits[row]);
    /* -log(1 - u) >= u, up to rounding: few can still win, and only they need the logarithm */
    __m256 close = _mm256_cmp_ps(u, _mm256_mul_ps(_mm256_set1_ps(best * 1.000001f), p), _CMP_LE_OQ);
    int lanes = _mm256_movemask_ps(_mm256_and_ps(possible, close));
    float each_u[8], each_p[8];
    if (!lanes) continue;
    _mm256_storeu_ps(each_u, u);
    _mm256_storeu_ps(each_p, p);
    for (; lanes; lanes &= lanes - 1) {
      int lane = __builtin_ctz(lanes);
      float time = fminf(-log1pf(-each_u[lane]), 32.0f) / each_p[lane];
      if (time < best) { best = time; winner = (int32_t)(i + lane); }
    }
  }
  job->winners[row] = winner;
}

/* argmin over the ids of E / p, E from 64 random bits a row; the first id where nothing has a probability. */
void redraft_race(const float *probs, long rows, long n, const uint64_t *bits, int32_t *winners) {
  race_job job = {probs, n, bits, winners};
  pool_enter();
  pool_run(race_item, &job, rows);
  pool_leave();
}

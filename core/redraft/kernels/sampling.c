/* From scores to tokens: distributions, draws from them, and the exponential race. Row by row, as in vocabulary.c. */

#include <stdatomic.h>
#include <stdlib.h>

#include "vocabulary.h"

enum { CERTAIN = -1, NOTHING_REJECTED = -2 }; /* instead of a row of q */

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

static int descending(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x < y) - (x > y);
}

/* The value at which the sum of `terms`, taken from the largest on, reaches `wanted`; reorders them. Quickselect, by
 * mass instead of by rank: a nucleus of thousands must not cost a sort of the vocabulary. */
static float reaches(float *terms, long count, double wanted) {
  double above = 0.0; /* mass of what is larger than all of `terms` */
  while (count > 64) {
    float a = terms[0], b = terms[count / 2], c = terms[count - 1];
    float pivot = fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
    long larger = 0, end = count; /* larger ones, equal ones, what was not looked at, smaller ones */
    double mass = 0.0, equal = 0.0;
    for (long i = 0; i < end;) {
      float term = terms[i];
      if (term > pivot) {
        terms[i++] = terms[larger];
        terms[larger++] = term;
        mass += term;
      } else if (term < pivot) {
        terms[i] = terms[--end];
        terms[end] = term;
      } else {
        equal += pivot;
        i++;
      }
    }
    if (above + mass >= wanted) { count = larger; continue; }
    above += mass + equal;
    if (above >= wanted || end == count) return pivot;
    terms += end, count -= end;
  }
  qsort(terms, count, sizeof(float), descending);
  long last = 0;
  while (last < count - 1 && (above += terms[last]) < wanted) last++;
  return terms[last];
}

/* The smallest term that top-k and top-p keep, or -1 if memory ran out. `total` is the sum of all terms. */
AVX2 static float nucleus(const float *terms, long n, double total, long top_k, double top_p) {
  int has_top_k = top_k > 0 && top_k < n;
  if (!has_top_k && top_p >= 1.0) return 0.0f;
  float least = -1.0f;
  if (has_top_k) { /* top-p is of what top-k left */
    entry *best = malloc(top_k * sizeof(entry));
    if (!best) return least;
    largest(terms, n, best, top_k);
    double left = 0.0, mass = 0.0;
    long last = 0;
    for (long i = 0; i < top_k; i++) left += best[i].value;
    while (top_p < 1.0 && last < top_k && (mass += best[last].value) < top_p * left) last++;
    least = best[top_p < 1.0 && last < top_k ? last : top_k - 1].value;
    free(best);
    return least;
  }
  float *candidates = malloc(n * sizeof(float));
  if (!candidates) return least;
  /* all that are smaller than this have less than 1 - top_p together */
  float floor = (float)((1.0 - top_p) * total / n * 0.999);
  long count = 0;
  for (long i = 0; i < n; i += 8) {
    int lanes = _mm256_movemask_ps(_mm256_cmp_ps(load_rest(terms, i, n), _mm256_set1_ps(floor), _CMP_GE_OQ));
    for (; lanes; lanes &= lanes - 1) candidates[count++] = terms[i + __builtin_ctz(lanes)];
  }
  least = reaches(candidates, count, top_p * total);
  free(candidates);
  return least;
}

AVX2 static void probability_item(void *arg, long row) {
  probability_job *job = arg;
  long n = job->n;
  const float *x = job->scores + row * n;
  float *probs = job->probs + row * n, most = largest(x, n, NULL, 0);
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
    __m256d sum = _mm256_setzero_pd();
    for (long i = 0; i < n; i += 8) {
      __m256 v = load_rest(probs, i, n);
      v = _mm256_and_ps(v, _mm256_cmp_ps(v, floor, _CMP_GE_OQ));
      sum = add_wide(sum, v);
      store_rest(probs, i, n, v);
    }
    total = sum4(sum);
  }
  __m256 divisor = _mm256_set1_ps((float)total);
  for (long i = 0; i < n; i += 8) store_rest(probs, i, n, _mm256_div_ps(load_rest(probs, i, n), divisor));
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

/* -- draws ------------------------------------------------------------------------------------------------------- */

typedef struct {
  const float *weights;
  long n;
  const double *uniforms;
  int64_t *ids;
} draw_job;

/* Of the block of x [n] that begins at `start`. */
INLINE double block_sum(const float *x, long start, long n) {
  long end = smaller(start + BLOCK, n);
  __m256d sum = _mm256_setzero_pd();
  long i = start;
  for (; i + 8 <= end; i += 8) sum = add_wide(sum, _mm256_loadu_ps(x + i));
  double total = sum4(sum);
  for (; i < end; i++) total += x[i];
  return total;
}

INLINE int64_t draw_from(const float *x, long n, double uniform) {
  double total = 0.0, mass = 0.0, before = 0.0;
  for (long start = 0; start < n; start += BLOCK) total += block_sum(x, start, n);
  double target = uniform * total;
  long block = 0; /* where the target is passed; the last with any weight, if rounding brings it beyond them all */
  for (long start = 0; start < n && mass <= target; start += BLOCK) {
    double own = block_sum(x, start, n);
    if (!(own > 0.0)) continue;
    block = start;
    before = mass;
    mass += own;
  }
  int64_t chosen = 0;
  for (long i = block; i < block + BLOCK && i < n; i++) {
    if (!(x[i] > 0.0f)) continue;
    chosen = i;
    if ((before += x[i]) > target) break;
  }
  return chosen;
}

AVX2 static void draw_item(void *arg, long row) {
  draw_job *job = arg;
  job->ids[row] = draw_from(job->weights + row * job->n, job->n, job->uniforms[row]);
}

/* The id at which the cumulative sum of a row's weights passes uniform * total; never one of weight 0, unless all are.
 * Any id where the weights are NaN. */
void redraft_draw(const float *weights, long rows, long n, const double *uniforms, int64_t *ids) {
  draw_job job = {weights, n, uniforms, ids};
  pool_enter();
  pool_run(draw_item, &job, rows);
  pool_leave();
}

typedef struct {
  const float *p;
  const int64_t *p_rows;
  const float *q;
  const int64_t *q_rows, *drafted;
  long n;
  const double *uniforms;
  int64_t *ids;
  atomic_int failed;
} recovery_job;

AVX2 static void recovery_item(void *arg, long item) {
  recovery_job *job = arg;
  long n = job->n, q_row = job->q_rows[item];
  const float *p = job->p + job->p_rows[item] * n, *weights = p;
  float *rest = NULL;
  if (q_row > NOTHING_REJECTED) {
    rest = malloc(n * sizeof(float));
    if (!rest) { atomic_store(&job->failed, 1); return; }
    int is_empty = 1;
    if (q_row == CERTAIN) { /* q is 1 at the drafted token */
      memcpy(rest, p, n * sizeof(float));
      rest[job->drafted[item]] = 0.0f;
      for (long i = 0; i < n && is_empty; i++) is_empty = !(rest[i] > 0.0f);
    } else {
      const float *q = job->q + q_row * n;
      __m256 any = _mm256_setzero_ps();
      for (long i = 0; i < n; i += 8) {
        __m256 more = _mm256_max_ps(_mm256_sub_ps(load_rest(p, i, n), load_rest(q, i, n)), _mm256_setzero_ps());
        any = _mm256_or_ps(any, more);
        store_rest(rest, i, n, more);
      }
      is_empty = !_mm256_movemask_ps(_mm256_cmp_ps(any, _mm256_setzero_ps(), _CMP_GT_OQ));
    }
    /* p equal to q up to rounding: a rejection has probability ~1e-7 and p itself is the limit of the residual */
    if (!is_empty) weights = rest;
  }
  job->ids[item] = draw_from(weights, n, job->uniforms[item]);
  free(rest);
}

/* Draws from p[p_rows] where nothing was rejected (q_rows -2), else from max(p - q, 0), q being q[q_rows] or, for -1,
 * all at the drafted token. Returns 0, or -1 if memory ran out. */
int redraft_recover(const float *p, const int64_t *p_rows, const float *q, const int64_t *q_rows,
                    const int64_t *drafted, long items, long n, const double *uniforms, int64_t *ids) {
  recovery_job job = {p, p_rows, q, q_rows, drafted, n, uniforms, ids, 0};
  pool_enter();
  pool_run(recovery_item, &job, items);
  pool_leave();
  return atomic_load(&job.failed) ? -1 : 0;
}

/* -- the exponential race ---------------------------------------------------------------------------------------- */

INLINE uint64_t mix64(uint64_t v) {
  v = (v ^ v >> 30) * 0xBF58476D1CE4E5B9u;
  v = (v ^ v >> 27) * 0x94D049BB133111EBu;
  return v ^ v >> 31;
}

INLINE uint64_t bits_of(uint64_t key, uint64_t position, uint64_t purpose) {
  return mix64(mix64(key + (position + 1) * 0x9E3779B97F4A7C15u) + purpose * 0xD1B54A32D192ED03u);
}

/* redraft.sampling.randomness.row_bits */
AVX2 void redraft_row_bits(const uint64_t *keys, const uint64_t *positions, long rows, uint64_t purpose,
                           uint64_t *bits) {
  for (long row = 0; row < rows; row++) bits[row] = bits_of(keys[row], positions[row], purpose);
}

/* redraft.sampling.randomness.uniforms */
AVX2 void redraft_uniforms(const uint64_t *keys, const uint64_t *positions, long rows, uint64_t purpose,
                           double *uniforms) {
  for (long row = 0; row < rows; row++)
    uniforms[row] = ((double)(bits_of(keys[row], positions[row], purpose) >> 12) + 0.5) * 0x1p-52;
}

typedef struct {
  const float *probs;
  long n;
  const uint64_t *bits;
  int64_t *winners;
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
  int64_t winner = 0;
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
      if (time < best) { best = time; winner = i + lane; }
    }
  }
  job->winners[row] = winner;
}

/* argmin over the ids of E / p, E from 64 random bits a row; the first id where nothing has a probability. */
void redraft_race(const float *probs, long rows, long n, const uint64_t *bits, int64_t *winners) {
  race_job job = {probs, n, bits, winners};
  pool_enter();
  pool_run(race_item, &job, rows);
  pool_leave();
}

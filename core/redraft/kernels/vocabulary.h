/* Passes over one row of a vocabulary that several files need. */
#ifndef REDRAFT_VOCABULARY_H
#define REDRAFT_VOCABULARY_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "pool.h"
#include "vector.h"

enum { BLOCK = 512 }; /* floats whose sum is known while one looks for a place in a row */

typedef struct { float value; int32_t id; } entry;

/* The `size` largest of x, best first; of equal ones those with smaller ids. size <= n. Returns the largest: NaN if one
 * of x is NaN, and then `best` is (NaN, 0) throughout. */
INTERNAL float largest(const float *x, long n, entry *best, long size);

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

/* Adds eight floats in float64: distributions must sum to 1 as closely as float32 can say. */
INLINE __m256d add_wide(__m256d sum, __m256 v) {
  sum = _mm256_add_pd(sum, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  return _mm256_add_pd(sum, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
}

INLINE double sum4(__m256d v) {
  double lanes[4];
  _mm256_storeu_pd(lanes, v);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

/* exp((x - most) * slope); below exp(-87) it is 0. */
INLINE __m256 exp_scaled(__m256 x, __m256 most, __m256 slope) {
  __m256 v = _mm256_mul_ps(_mm256_sub_ps(x, most), slope);
  return _mm256_and_ps(exp_negative(v), _mm256_cmp_ps(v, _mm256_set1_ps(-87.0f), _CMP_GT_OQ));
}

/* Sum of exp((x - most) * slope), as far as float32 can say; the terms also go to `terms` if it is given. */
INLINE double sum_exp(const float *x, long n, float most, float slope, float *terms) {
  __m256 shift = _mm256_set1_ps(most), factor = _mm256_set1_ps(slope);
  __m256d sum = _mm256_setzero_pd();
  long i = 0;
  for (; i + 32 <= n; i += 32) { /* four at once: their latencies overlap, and only one in four is widened */
    __m256 e[4];
    for (int j = 0; j < 4; j++) {
      e[j] = exp_scaled(_mm256_loadu_ps(x + i + 8 * j), shift, factor);
      if (terms) _mm256_storeu_ps(terms + i + 8 * j, e[j]);
    }
    sum = add_wide(sum, _mm256_add_ps(_mm256_add_ps(e[0], e[1]), _mm256_add_ps(e[2], e[3])));
  }
  for (; i < n; i += 8) {
    __m256 e = exp_scaled(load_rest(x, i, n), shift, factor);
    sum = add_wide(sum, e);
    if (terms) store_rest(terms, i, n, e);
  }
  return sum4(sum);
}

#endif

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

/* The `size` largest of x, best first; of equal ones those with smaller ids. size <= n. */
INTERNAL void largest(const float *x, long n, entry *best, long size);

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

/* Sum of exp((x - most) * slope), float64, terms below exp(-87) as 0; the terms also go to `terms` if it is given. */
INLINE double sum_exp(const float *x, long n, float most, float slope, float *terms) {
  __m256 shift = _mm256_set1_ps(most), factor = _mm256_set1_ps(slope), least = _mm256_set1_ps(-87.0f);
  __m256d sum = _mm256_setzero_pd();
  for (long i = 0; i < n; i += 8) {
    __m256 v = _mm256_mul_ps(_mm256_sub_ps(load_rest(x, i, n), shift), factor);
    __m256 e = _mm256_and_ps(exp_negative(v), _mm256_cmp_ps(v, least, _CMP_GT_OQ));
    sum = add_wide(sum, e);
    if (terms) store_rest(terms, i, n, e);
  }
  return sum4(sum);
}

#endif

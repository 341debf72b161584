/* The kernels of linear.c with AVX-512: two neighbouring panels make one vector of 16 outputs.
 *
 * An output's sum has the same terms in the same order as there, so the two give bitwise the same. Twice the arithmetic
 * per instruction, and registers for 12 rows at once: reading the weights is what up to that many rows cost.
 */
#include "wide.h"

#include <immintrin.h>

enum { LANES = 16, PANEL = 8 };
enum { K_BLOCK = 64, AHEAD = 512, REGISTERS = 24, STEP_BYTES = 4 * PANEL };

#define KERNEL __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define INLINED static inline __attribute__((always_inline)) KERNEL

typedef struct {
  __m512 at[REGISTERS]; /* [rows][pairs] */
} sums;

typedef struct {
  long first, steps;
} span; /* of k */

typedef struct {
  long ahead, pace; /* bytes from the weights in hand to those to fetch, at the start; how far those move in a step */
} fetching;

INLINED __m512 two(const float *low, const float *high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(low)), _mm256_load_ps(high), 1);
}

/* One step of k: x packed [rows], the weights of each pair of panels. */
INLINED void add_step(sums *sum, const float *x, const __m512 *w, const int rows, const int pairs) {
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) {
    __m512 value = _mm512_set1_ps(x[r]);
#pragma GCC unroll 2
    for (int p = 0; p < pairs; p++) sum->at[r * pairs + p] = _mm512_fmadd_ps(value, w[p], sum->at[r * pairs + p]);
  }
}

INLINED void add_fp32(sums *sum, const float *w, long stride, const float *x, long steps, fetching fetch, const int rows,
                      const int pairs) {
  for (long i = 0; i < steps; i++, w += PANEL, x += rows, fetch.ahead += fetch.pace - STEP_BYTES) {
    __m512 wide[2];
#pragma GCC unroll 2
    for (int p = 0; p < pairs; p++) {
      const float *low = w + 2 * p * stride, *high = low + stride;
      wide[p] = two(low, high);
      _mm_prefetch((const char *)low + fetch.ahead, _MM_HINT_T0);
      _mm_prefetch((const char *)high + fetch.ahead, _MM_HINT_T0);
    }
    add_step(sum, x, wide, rows, pairs);
  }
}

/* Rows of x times a span of k of `pairs` pairs of panels from `output` on. */
INLINED void block(const linear_layer *layer, const float *x, long output, span at, fetching fetch, float *y,
                   const int rows, const int pairs) {
  const float *w = (const float *)layer->panels + output * layer->k;
  const float *bias = layer->bias ? layer->bias + output : NULL;
  sums sum;
#pragma GCC unroll 24
  for (int i = 0; i < rows * pairs; i++) {
    long column = i % pairs * LANES;
    sum.at[i] = at.first  ? _mm512_loadu_ps(y + i / pairs * layer->n + output + column)
                : bias    ? _mm512_loadu_ps(bias + column)
                          : _mm512_setzero_ps();
  }
  add_fp32(&sum, w + at.first * PANEL, layer->k * PANEL, x + at.first * rows, at.steps, fetch, rows, pairs);
#pragma GCC unroll 24
  for (int i = 0; i < rows * pairs; i++)
    _mm512_storeu_ps(y + i / pairs * layer->n + output + i % pairs * LANES, sum.at[i]);
}

KERNEL static void rows_block(const linear_layer *layer, long rows, const float *x, long output, span at,
                              fetching fetch, float *y, int pairs) {
  switch (2 * rows + pairs) {
#define ROWS(R)                                                             \
  case 2 * R + 1: block(layer, x, output, at, fetch, y, R, 1); break;       \
  case 2 * R + 2: block(layer, x, output, at, fetch, y, R, 2); break;
    ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
  }
}

KERNEL void wide_item(void *arg, long item) {
  const linear_job *job = arg;
  const linear_layer *layer = job->layer;
  long pair = item * job->pairs_per_item, end = pair + job->pairs_per_item, k = layer->k;
  if (end > layer->n / LANES) end = layer->n / LANES;
  long passes = (job->m + WIDE_ROWS - 1) / WIDE_ROWS;
  /* several passes: as much of k at a time as stays in the first-level cache, and each pass fetches its share of what
   * comes next */
  long most = passes > 1 ? K_BLOCK : k, pace = STEP_BYTES / passes;
  for (int pairs; pair < end; pair += pairs) {
    pairs = pair + 1 < end ? 2 : 1;
    for (long first = 0, steps; first < k; first += steps) {
      steps = smaller(k - first, most);
      fetching fetch = {passes > 1 ? STEP_BYTES * steps : AHEAD, pace};
      for (long row = 0, rows; row < job->m; row += rows, fetch.ahead += pace * steps) {
        rows = next_rows(WIDE_ROWS, job->m - row);
        span at = {first, steps};
        rows_block(layer, rows, job->x + row * k, LANES * pair, at, fetch, job->y + row * layer->n, pairs);
      }
    }
  }
}

int wide_is_supported(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

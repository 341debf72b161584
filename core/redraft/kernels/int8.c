/* Linear layers with int8 weights and one fp32 scale per output: y[m, n] = scale[n] * (x[m, k] w[n, k]^T) + bias.
 *
 * Activations stay fp32 and every weight is widened as it is read, so the sums are those of the fp32 kernel over the
 * numbers w, in the same order, whatever the batch. A quarter of the bytes: what a few rows cost is reading the weights.
 * Weights come in panels of 16 outputs, [n / 16][k][16]. See pool.h for what all kernels promise.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#include "linear.h"

enum { PREFETCH_BYTES = 1024 };

typedef struct {
  const float *x;
  const int8_t *panels;
  const float *scale, *bias;
  float *y;
  long m, k, n, panels_per_item;
} int8_job;

/* Eight weights as floats. */
INLINE __m256 widen(const int8_t *w) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
}

/* The finished output of eight sums, at outputs `column` and on. */
INLINE __m256 finish(const int8_job *job, __m256 sum, long column) {
  __m256 bias = job->bias ? _mm256_loadu_ps(job->bias + column) : _mm256_setzero_ps();
  return _mm256_fmadd_ps(sum, _mm256_loadu_ps(job->scale + column), bias);
}

/* k steps of x, packed [k][rows], added to the sums in y (`resume`) or to zero; `last`: then scaled. One sum in order
 * of k, however it is cut. Written out row by row because compilers keep an array of accumulators in memory. */
#define START(r)                                                                  \
  __m256 low##r = resume ? _mm256_loadu_ps(y + r * job->n) : _mm256_setzero_ps(); \
  __m256 high##r = resume ? _mm256_loadu_ps(y + r * job->n + 8) : _mm256_setzero_ps();
#define STORE(r)                                                                          \
  _mm256_storeu_ps(y + r * job->n, last ? finish(job, low##r, column) : low##r);          \
  _mm256_storeu_ps(y + r * job->n + 8, last ? finish(job, high##r, column + 8) : high##r);
#define DEFINE_PANEL(ROWS)                                                                                           \
  AVX2 static void panel_##ROWS(const int8_job *job, const float *restrict x, const int8_t *restrict w, long steps,  \
                                float *y, long column, int resume, int last) {                                      \
    ROWS_##ROWS(START)                                                                                               \
    for (long i = 0; i < steps; i++, w += PANEL, x += ROWS) {                                                        \
      __m256 w_low = widen(w), w_high = widen(w + 8);                                                                \
      _mm_prefetch((const char *)(w + PREFETCH_BYTES), _MM_HINT_T0);                                                 \
      ROWS_##ROWS(STEP)                                                                                              \
    }                                                                                                                \
    ROWS_##ROWS(STORE)                                                                                               \
  }
EACH_BLOCK(DEFINE_PANEL)

/* One row over two panels at once: a single one leaves the multipliers waiting for their own sums. */
AVX2 static void two_panels_1(const int8_job *job, long p) {
  const float *x = job->x;
  const int8_t *first = job->panels + p * job->k * PANEL, *second = first + job->k * PANEL;
  __m256 low0 = _mm256_setzero_ps(), high0 = low0, low1 = low0, high1 = low0;
  for (long i = 0; i < job->k; i++, first += PANEL, second += PANEL) {
    __m256 value = _mm256_broadcast_ss(x + i);
    _mm_prefetch((const char *)(first + PREFETCH_BYTES), _MM_HINT_T0);
    _mm_prefetch((const char *)(second + PREFETCH_BYTES), _MM_HINT_T0);
    low0 = _mm256_fmadd_ps(value, widen(first), low0);
    high0 = _mm256_fmadd_ps(value, widen(first + 8), high0);
    low1 = _mm256_fmadd_ps(value, widen(second), low1);
    high1 = _mm256_fmadd_ps(value, widen(second + 8), high1);
  }
  long column = p * PANEL;
  _mm256_storeu_ps(job->y + column, finish(job, low0, column));
  _mm256_storeu_ps(job->y + column + 8, finish(job, high0, column + 8));
  _mm256_storeu_ps(job->y + column + 16, finish(job, low1, column + 16));
  _mm256_storeu_ps(job->y + column + 24, finish(job, high1, column + 24));
}

static void one_panel(const int8_job *job, long p) {
  long k_block = job->m <= 6 ? job->k : K_BLOCK, column = p * PANEL;
  for (long k = 0; k < job->k; k += k_block) {
    const int8_t *w = job->panels + (p * job->k + k) * PANEL;
    long steps = job->k - k < k_block ? job->k - k : k_block;
    int resume = k > 0, last = k + steps == job->k;
    for (long row = 0, rows; row < job->m; row += rows) {
      rows = next_rows(job->m - row);
      const float *x = job->x + row * job->k + k * rows;
      float *y = job->y + row * job->n + column;
      switch (rows) {
        case 1: panel_1(job, x, w, steps, y, column, resume, last); break;
        case 2: panel_2(job, x, w, steps, y, column, resume, last); break;
        case 3: panel_3(job, x, w, steps, y, column, resume, last); break;
        case 4: panel_4(job, x, w, steps, y, column, resume, last); break;
        case 5: panel_5(job, x, w, steps, y, column, resume, last); break;
        default: panel_6(job, x, w, steps, y, column, resume, last);
      }
    }
  }
}

static void int8_item(void *arg, long item) {
  const int8_job *job = arg;
  long p = item * job->panels_per_item, end = p + job->panels_per_item;
  if (end > job->n / PANEL) end = job->n / PANEL;
  for (; job->m == 1 && p + 1 < end; p += 2) two_panels_1(job, p);
  for (; p < end; p++) one_panel(job, p);
}

int linear_run_int8(const linear_layer *layer, const float *x, float *y, long m) {
  const float *packed = pack_rows(x, m, layer->k);
  if (!packed) return -1;
  long num_panels = layer->n / PANEL, items = 4 * pool_size();
  int8_job job = {packed, layer->panels, layer->scale, layer->bias, y, m, layer->k, layer->n,
                  (num_panels + items - 1) / items};
  pool_run(int8_item, &job, (num_panels + job.panels_per_item - 1) / job.panels_per_item);
  return 0;
}

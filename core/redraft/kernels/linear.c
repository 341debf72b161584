/* Linear layers in fp32, and the way to those of other kinds; see pool.h for what all kernels promise.
 *
 * y[m, n] = x[m, k] w[n, k]^T + bias. Weights come packed in panels of 16 outputs, [n / 16][k][16]; a panel is read from
 * memory once and serves up to 6 rows of x from registers, further rows from the first-level cache, which holds K_BLOCK
 * steps of it.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#include "linear.h"

enum { PREFETCH_FLOATS = 256 };

typedef struct {
  const float *x, *panels, *bias;
  float *y;
  long m, k, n, panels_per_item;
} linear_job;

/* k steps of x, packed [k][rows], added to y (or to the bias, at the start): one sum in order of k, however it is cut.
 * Written out row by row because compilers keep an array of accumulators in memory. */
#define START(r)                                                                          \
  __m256 low##r = start ? _mm256_loadu_ps(start + r * stride) : _mm256_setzero_ps();      \
  __m256 high##r = start ? _mm256_loadu_ps(start + r * stride + 8) : _mm256_setzero_ps();
#define STORE(r)                            \
  _mm256_storeu_ps(y + r * n, low##r);      \
  _mm256_storeu_ps(y + r * n + 8, high##r);
#define DEFINE_PANEL(ROWS)                                                                                        \
  AVX2 static void panel_##ROWS(const float *restrict x, const float *restrict w, long k, float *y, long n,       \
                                const float *start, long stride) {                                                \
    ROWS_##ROWS(START)                                                                                            \
    for (long i = 0; i < k; i++, w += PANEL, x += ROWS) {                                                         \
      __m256 w_low = _mm256_load_ps(w), w_high = _mm256_load_ps(w + 8);                                           \
      _mm_prefetch((const char *)(w + PREFETCH_FLOATS), _MM_HINT_T0);                                             \
      ROWS_##ROWS(STEP)                                                                                           \
    }                                                                                                             \
    ROWS_##ROWS(STORE)                                                                                            \
  }
EACH_BLOCK(DEFINE_PANEL)

static void linear_item(void *arg, long item) {
  const linear_job *job = arg;
  long first = item * job->panels_per_item, last = first + job->panels_per_item;
  if (last > job->n / PANEL) last = job->n / PANEL;
  for (long p = first; p < last; p++) {
    const float *bias = job->bias ? job->bias + p * PANEL : NULL;
    long n = job->n, k_block = job->m <= 6 ? job->k : K_BLOCK;
    for (long k = 0; k < job->k; k += k_block) {
      const float *w = job->panels + (p * job->k + k) * PANEL;
      long steps = job->k - k < k_block ? job->k - k : k_block;
      for (long row = 0, rows; row < job->m; row += rows) {
        rows = next_rows(job->m - row);
        const float *x = job->x + row * job->k + k * rows;
        float *y = job->y + row * n + p * PANEL;
        const float *start = k ? y : bias;
        long stride = k ? n : 0;
        switch (rows) {
          case 1: panel_1(x, w, steps, y, n, start, stride); break;
          case 2: panel_2(x, w, steps, y, n, start, stride); break;
          case 3: panel_3(x, w, steps, y, n, start, stride); break;
          case 4: panel_4(x, w, steps, y, n, start, stride); break;
          case 5: panel_5(x, w, steps, y, n, start, stride); break;
          default: panel_6(x, w, steps, y, n, start, stride);
        }
      }
    }
  }
}

static int run_fp32(const linear_layer *layer, const float *x, float *y, long m) {
  const float *packed = pack_rows(x, m, layer->k);
  if (!packed) return -1;
  long num_panels = layer->n / PANEL, items = 4 * pool_size();
  linear_job job = {packed, layer->panels, layer->bias, y, m, layer->k, layer->n, (num_panels + items - 1) / items};
  pool_run(linear_item, &job, (num_panels + job.panels_per_item - 1) / job.panels_per_item);
  return 0;
}

int linear_run(const linear_layer *layer, const float *x, float *y, long m) {
  switch (layer->kind) {
    case LINEAR_FP32: return run_fp32(layer, x, y, m);
    case LINEAR_INT8: return linear_run_int8(layer, x, y, m);
    default: abort();
  }
}

static int run_alone(linear_layer layer, const float *x, float *y, long m) {
  pool_enter();
  int status = linear_run(&layer, x, y, m);
  pool_leave();
  return status;
}

/* n must be a multiple of 16, panels 32-byte aligned; bias may be NULL. Returns 0, or -1 if memory ran out. */
int redraft_linear(const float *x, const float *panels, const float *bias, float *y, long m, long k, long n) {
  return run_alone((linear_layer){LINEAR_FP32, panels, NULL, bias, k, n}, x, y, m);
}

int redraft_linear_int8(const float *x, const int8_t *panels, const float *scale, const float *bias, float *y, long m,
                        long k, long n) {
  return run_alone((linear_layer){LINEAR_INT8, panels, scale, bias, k, n}, x, y, m);
}

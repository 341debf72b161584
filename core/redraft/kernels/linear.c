/* Linear layers: y[m, n] = x[m, k] w[n, k]^T + bias; see pool.h for what all kernels promise.
 *
 * Float32 weights are packed in panels of 8 outputs, [n / 8][k][8], 64-byte aligned; quantised ones are integer.c's.
 *
 * What few rows cost is reading the weights, so they are read once: up to 3 rows take four panels at a time, up to
 * 6 two, 7 to 12 one. More rows take several passes over blocks of k that stay in the first-level cache, and each pass
 * fetches its share of the next block. Processors with AVX-512 do the same with wider vectors (wide.c).
 */
#include "linear.h"

#include <immintrin.h>

#include "integer.h"
#include "wide.h"

enum { WIDTH = 8, K_BLOCK = 192, ONE_PASS = 12, PAIR_ROWS = 6, QUAD_ROWS = 3, STEP_BYTES = 4 * WIDTH };
/* bytes to fetch ahead; tried from 0 to 8192, and as pairs do it, the panels that follow */
enum { AHEAD_QUAD = 512, AHEAD_SINGLE = 4096 };

/* ---- k steps of x, packed [k][rows], added to y (or to the bias, or to zero, at the start): one sum in order of k,
 * however it is cut. Written out row by row because compilers keep an array of accumulators in memory ---- */

typedef struct {
  const float *from; /* where the sums start: y itself, the bias, or NULL for zero */
  long stride;       /* of `from`, per row */
  float *y;
  long n;
} sums_at;

#define ROWS_1(DO) DO(0)
#define ROWS_2(DO) ROWS_1(DO) DO(1)
#define ROWS_3(DO) ROWS_2(DO) DO(2)
#define ROWS_4(DO) ROWS_3(DO) DO(3)
#define ROWS_5(DO) ROWS_4(DO) DO(4)
#define ROWS_6(DO) ROWS_5(DO) DO(5)
#define ROWS_7(DO) ROWS_6(DO) DO(6)
#define ROWS_8(DO) ROWS_7(DO) DO(7)
#define ROWS_9(DO) ROWS_8(DO) DO(8)
#define ROWS_10(DO) ROWS_9(DO) DO(9)
#define ROWS_11(DO) ROWS_10(DO) DO(10)
#define ROWS_12(DO) ROWS_11(DO) DO(11)

#define LOAD(r, offset) (at.from ? _mm256_loadu_ps(at.from + (r) * at.stride + (offset)) : _mm256_setzero_ps())
#define START_LOW(r) __m256 low##r = LOAD(r, 0);
#define START_BOTH(r) __m256 low##r = LOAD(r, 0), high##r = LOAD(r, WIDTH);
#define STEP_LOW(r) low##r = _mm256_fmadd_ps(_mm256_broadcast_ss(x + r), w_low, low##r);
#define STEP_BOTH(r)                                     \
  {                                                      \
    __m256 value = _mm256_broadcast_ss(x + r);           \
    low##r = _mm256_fmadd_ps(value, w_low, low##r);      \
    high##r = _mm256_fmadd_ps(value, w_high, high##r);   \
  }
#define STORE_LOW(r) _mm256_storeu_ps(at.y + r * at.n, low##r);
#define STORE_BOTH(r) STORE_LOW(r) _mm256_storeu_ps(at.y + r * at.n + WIDTH, high##r);

/* `ahead` of each panel is fetched meanwhile, `pace` bytes a step */
#define DEFINE_PAIR(ROWS)                                                                                              \
  AVX2 static void pair_##ROWS(const float *restrict x, const float *restrict low, const float *restrict high,         \
                               long steps, sums_at at, const char *ahead_low, const char *ahead_high, long pace) {     \
    ROWS_##ROWS(START_BOTH)                                                                                            \
    for (long i = 0; i < steps; i++, low += WIDTH, high += WIDTH, x += ROWS) {                                         \
      __m256 w_low = _mm256_load_ps(low), w_high = _mm256_load_ps(high);                                               \
      _mm_prefetch(ahead_low, _MM_HINT_T1);                                                                            \
      _mm_prefetch(ahead_high, _MM_HINT_T1);                                                                           \
      ahead_low += pace, ahead_high += pace;                                                                           \
      ROWS_##ROWS(STEP_BOTH)                                                                                           \
    }                                                                                                                  \
    ROWS_##ROWS(STORE_BOTH)                                                                                            \
  }
#define DEFINE_SINGLE(ROWS)                                                                                    \
  AVX2 static void single_##ROWS(const float *restrict x, const float *restrict w, long steps, sums_at at) {   \
    ROWS_##ROWS(START_LOW)                                                                                     \
    for (long i = 0; i < steps; i++, w += WIDTH, x += ROWS) {                                                  \
      __m256 w_low = _mm256_load_ps(w);                                                                        \
      _mm_prefetch((const char *)w + AHEAD_SINGLE, _MM_HINT_T0);                                               \
      ROWS_##ROWS(STEP_LOW)                                                                                    \
    }                                                                                                          \
    ROWS_##ROWS(STORE_LOW)                                                                                     \
  }
DEFINE_PAIR(1) DEFINE_PAIR(2) DEFINE_PAIR(3) DEFINE_PAIR(4) DEFINE_PAIR(5) DEFINE_PAIR(6)
DEFINE_SINGLE(7) DEFINE_SINGLE(8) DEFINE_SINGLE(9) DEFINE_SINGLE(10) DEFINE_SINGLE(11) DEFINE_SINGLE(12)

/* Up to three rows over four panels: as many streams are read a tenth faster than two. */
#define QUAD_START(r)                                                                                    \
  __m256 a##r = LOAD(r, 0), b##r = LOAD(r, WIDTH), c##r = LOAD(r, 2 * WIDTH), d##r = LOAD(r, 3 * WIDTH);
#define QUAD_STEP(r)                                \
  {                                                 \
    __m256 value = _mm256_broadcast_ss(x + r);      \
    a##r = _mm256_fmadd_ps(value, w_a, a##r);       \
    b##r = _mm256_fmadd_ps(value, w_b, b##r);       \
    c##r = _mm256_fmadd_ps(value, w_c, c##r);       \
    d##r = _mm256_fmadd_ps(value, w_d, d##r);       \
  }
#define QUAD_STORE(r)                                      \
  _mm256_storeu_ps(at.y + r * at.n, a##r);                 \
  _mm256_storeu_ps(at.y + r * at.n + WIDTH, b##r);         \
  _mm256_storeu_ps(at.y + r * at.n + 2 * WIDTH, c##r);     \
  _mm256_storeu_ps(at.y + r * at.n + 3 * WIDTH, d##r);
#define QUAD_PANEL(p)                                                                   \
  __m256 w_##p = _mm256_load_ps(p);                                                     \
  _mm_prefetch((const char *)p + AHEAD_QUAD, _MM_HINT_T0);                              \
  p += WIDTH;
#define DEFINE_QUAD(ROWS)                                                                                  \
  AVX2 static void quad_##ROWS(const float *restrict x, const float *restrict a, long k, sums_at at) {     \
    const float *b = a + k * WIDTH, *c = b + k * WIDTH, *d = c + k * WIDTH;                                \
    ROWS_##ROWS(QUAD_START)                                                                                \
    for (long i = 0; i < k; i++, x += ROWS) {                                                              \
      QUAD_PANEL(a) QUAD_PANEL(b) QUAD_PANEL(c) QUAD_PANEL(d)                                              \
      ROWS_##ROWS(QUAD_STEP)                                                                               \
    }                                                                                                      \
    ROWS_##ROWS(QUAD_STORE)                                                                                \
  }
DEFINE_QUAD(1) DEFINE_QUAD(2) DEFINE_QUAD(3)

/* ---- blocks of rows and of k ---- */

static int is_wide_used;

/* Most rows of m in a block: one panel's sums of 12 rows fit the registers, or two panels' of 6. */
static inline long most_rows(long m) {
  if (is_wide_used) return WIDE_ROWS;
  return m <= ONE_PASS ? ONE_PASS : PAIR_ROWS;
}

/* x [m][k] with each block of rows transposed to [k][rows]. NULL: memory ran out. */
static const float *pack_rows(const float *x, long m, long k, long most) {
  static scratch held;
  if (m == 1) return x;
  float *buffer = scratch_take(&held, m * k * sizeof(float));
  if (!buffer) return NULL;
  for (long row = 0, rows; row < m; row += rows) {
    rows = next_rows(most, m - row);
    float *out = buffer + row * k;
    for (long r = 0; r < rows; r++)
      for (long i = 0; i < k; i++) out[i * rows + r] = x[(row + r) * k + i];
  }
  return buffer;
}

/* A block of rows times `steps` of two panels. */
static void rows_block(long rows, const float *x, const float *low, const float *high, long steps, sums_at at,
                       const char *ahead_low, const char *ahead_high, long pace) {
  sums_at second = {at.from ? at.from + WIDTH : NULL, at.stride, at.y + WIDTH, at.n};
  switch (rows) {
#define PAIR(ROWS) \
  case ROWS: pair_##ROWS(x, low, high, steps, at, ahead_low, ahead_high, pace); break;
#define SINGLE(ROWS) \
  case ROWS: single_##ROWS(x, low, steps, at); single_##ROWS(x, high, steps, second); break;
    PAIR(1) PAIR(2) PAIR(3) PAIR(4) PAIR(5) PAIR(6)
    SINGLE(7) SINGLE(8) SINGLE(9) SINGLE(10) SINGLE(11) SINGLE(12)
  }
}

/* Two neighbouring panels, from output 16 * pair on, for all rows. */
static void one_pair(const linear_job *job, long pair) {
  const linear_layer *layer = job->layer;
  long k = layer->k, n = layer->n, m = job->m, panel = 2 * pair, most = most_rows(m), in_one_pass = m <= most;
  const float *bias = layer->bias ? layer->bias + panel * WIDTH : NULL;
  const float *low = (const float *)layer->panels + panel * k * WIDTH, *high = low + k * WIDTH;
  long block = in_one_pass ? k : K_BLOCK;
  /* fetch the next two panels, or the next block in as many shares as there are passes */
  long pace = in_one_pass ? STEP_BYTES : STEP_BYTES / ((m + most - 1) / most);
  for (long first = 0, steps; first < k; first += steps, low += steps * WIDTH, high += steps * WIDTH) {
    steps = smaller(k - first, block);
    long ahead = (in_one_pass ? 2 * k : steps) * STEP_BYTES;
    for (long row = 0, rows; row < m; row += rows, ahead += pace * steps) {
      rows = next_rows(most, m - row);
      float *y = job->y + row * n + panel * WIDTH;
      sums_at at = {first ? y : bias, first ? n : 0, y, n};
      rows_block(rows, job->x + row * k + first * rows, low, high, steps, at, (const char *)low + ahead,
                 (const char *)high + ahead, pace);
    }
  }
}

static void linear_item(void *arg, long item) {
  const linear_job *job = arg;
  const linear_layer *layer = job->layer;
  long pair = item * job->pairs_per_item, end = pair + job->pairs_per_item;
  if (end > layer->n / (2 * WIDTH)) end = layer->n / (2 * WIDTH);
  for (; job->m <= QUAD_ROWS && pair + 1 < end; pair += 2) {
    long output = 2 * WIDTH * pair;
    sums_at at = {layer->bias ? layer->bias + output : NULL, 0, job->y + output, layer->n};
    const float *panels = (const float *)layer->panels + output * layer->k;
    if (job->m == 1) quad_1(job->x, panels, layer->k, at);
    else if (job->m == 2) quad_2(job->x, panels, layer->k, at);
    else quad_3(job->x, panels, layer->k, at);
  }
  for (; pair < end; pair++) one_pair(job, pair);
}

int linear_run(const linear_layer *layer, const float *x, float *y, long m) {
  if (m == 0) return 0; /* a head, when nobody wants logits */
  if (layer->kind != LINEAR_FP32) return integer_run(layer, x, y, m);
  const float *packed = pack_rows(x, m, layer->k, most_rows(m));
  if (!packed) return -1;
  long pairs = layer->n / (2 * WIDTH), items = 4 * pool_threads();
  long each = (pairs + items - 1) / items;
  each += each % 2; /* two pairs are taken at a time */
  linear_job job = {layer, packed, y, m, each};
  pool_run(is_wide_used ? wide_item : linear_item, &job, (pairs + each - 1) / each);
  return 0;
}

/* As linear_run, for callers outside the pool. */
int redraft_linear(const linear_layer *layer, const float *x, float *y, long m) {
  pool_enter();
  int status = linear_run(layer, x, y, m);
  pool_leave();
  return status;
}

/* Use AVX-512 where the processor has it, or not. Returns whether it is used; not while another call runs. */
int redraft_use_wide(int wanted) {
  is_wide_used = wanted && wide_is_supported();
  return is_wide_used;
}

int redraft_supported(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

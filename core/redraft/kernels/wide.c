/* The kernels of linear.c and widen.c with AVX-512: two neighbouring panels make one vector of 16 outputs.
 *
 * An output's sum has the same terms in the same order as there, so the two give bitwise the same. Twice the arithmetic
 * per instruction, and registers for 12 rows at once: reading the weights is what up to that many rows cost.
 */
#include "wide.h"

#include <immintrin.h>
#include <stdint.h>

enum { LANES = 16, PANEL = 8 };
enum { K_BLOCK = 64, AHEAD = 512, REGISTERS = 24, STEP_BYTES = 4 * PANEL };

#define KERNEL __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")))
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

INLINED __m512 halves(const char *low, const char *high) {
  __m256i both = _mm256_set_m128i(_mm_loadu_si128((const __m128i *)high), _mm_loadu_si128((const __m128i *)low));
  return _mm512_cvtph_ps(both);
}

INLINED __m512 bytes(const char *low, const char *high) {
  __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)low), _mm_loadl_epi64((const __m128i *)high));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(both));
}

INLINED __m512i words(const char *low, const char *high) {
  __m256i first = _mm256_load_si256((const __m256i *)low), second = _mm256_load_si256((const __m256i *)high);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
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

INLINED void add_int4(sums *sum, const char *w, long stride, const float *x, long k, const int rows, const int pairs) {
  /* a permutation looks at the low four bits of an index only: it is the mask and the conversion in one */
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (long i = 0; i < k; i += GROUP, w += INT4_BYTES) {
    __m512 scale[2], minimum[2];
#pragma GCC unroll 2
    for (int p = 0; p < pairs; p++) {
      const char *low = w + 2 * p * stride, *high = low + stride;
      scale[p] = halves(low, high), minimum[p] = halves(low + 16, high + 16);
      for (int line = 0; line < INT4_BYTES; line += 64) {
        _mm_prefetch(low + 2 * pairs * stride + line, _MM_HINT_T1);
        _mm_prefetch(high + 2 * pairs * stride + line, _MM_HINT_T1);
      }
    }
    for (int j = 0; j < 4; j++) {
      __m512i packed[2];
#pragma GCC unroll 2
      for (int p = 0; p < pairs; p++) {
        const char *low = w + 2 * p * stride + 32 + 32 * j;
        packed[p] = words(low, low + stride);
      }
#pragma GCC unroll 8
      for (int s = 0; s < 8; s++, x += rows) {
        __m512 wide[2];
#pragma GCC unroll 2
        for (int p = 0; p < pairs; p++) {
          __m512 q = _mm512_permutexvar_ps(_mm512_srli_epi32(packed[p], 4 * s), numbers);
          wide[p] = _mm512_fmadd_ps(q, scale[p], minimum[p]);
        }
        add_step(sum, x, wide, rows, pairs);
      }
    }
  }
}

INLINED void add_int8(sums *sum, const char *w, long stride, const float *x, long k, const int rows, const int pairs,
                      const int grouped) {
  const long group = grouped ? GROUP : 8, head = grouped ? 16 : 0;
  for (long i = 0; i < k; i += group, w += head + PANEL * group) {
    __m512 scale[2];
#pragma GCC unroll 2
    for (int p = 0; grouped && p < pairs; p++) scale[p] = halves(w + 2 * p * stride, w + (2 * p + 1) * stride);
    const char *q = w + head;
    long steps = k - i < group ? k - i : group;
    for (long s = 0; s < steps; s++, q += PANEL, x += rows) {
      __m512 wide[2];
#pragma GCC unroll 2
      for (int p = 0; p < pairs; p++) {
        const char *low = q + 2 * p * stride, *high = low + stride;
        if (s % 8 == 0) {
          _mm_prefetch(low + 2 * pairs * stride, _MM_HINT_T1);
          _mm_prefetch(high + 2 * pairs * stride, _MM_HINT_T1);
        }
        wide[p] = bytes(low, high);
        if (grouped) wide[p] = _mm512_mul_ps(wide[p], scale[p]);
      }
      add_step(sum, x, wide, rows, pairs);
    }
  }
}

INLINED __m512 finished_int8(const linear_layer *layer, long output, __m512 sum) {
  __m512 bias = layer->bias ? _mm512_loadu_ps(layer->bias + output) : _mm512_setzero_ps();
  return _mm512_fmadd_ps(sum, _mm512_loadu_ps(layer->scale + output), bias);
}

/* Rows of x times a span of k (quantised: all of it) of `pairs` pairs of panels from `output` on. */
INLINED void block(const linear_layer *layer, const float *x, long output, span at, fetching fetch, float *y,
                   const int rows, const int pairs) {
  long size = panel_bytes(layer);
  const char *w = (const char *)layer->panels + output / PANEL * size;
  const float *bias = layer->bias && layer->kind != LINEAR_INT8 ? layer->bias + output : NULL;
  sums sum;
#pragma GCC unroll 24
  for (int i = 0; i < rows * pairs; i++) {
    long column = i % pairs * LANES;
    sum.at[i] = at.first  ? _mm512_loadu_ps(y + i / pairs * layer->n + output + column)
                : bias    ? _mm512_loadu_ps(bias + column)
                          : _mm512_setzero_ps();
  }
  switch (layer->kind) {
    case LINEAR_INT4: add_int4(&sum, w, size, x, layer->k, rows, pairs); break;
    case LINEAR_INT8_GROUPS: add_int8(&sum, w, size, x, layer->k, rows, pairs, 1); break;
    case LINEAR_INT8: add_int8(&sum, w, size, x, layer->k, rows, pairs, 0); break;
    default:
      add_fp32(&sum, (const float *)w + at.first * PANEL, layer->k * PANEL, x + at.first * rows, at.steps, fetch, rows,
               pairs);
  }
#pragma GCC unroll 24
  for (int i = 0; i < rows * pairs; i++) {
    long to = output + i % pairs * LANES;
    __m512 result = layer->kind == LINEAR_INT8 ? finished_int8(layer, to, sum.at[i]) : sum.at[i];
    _mm512_storeu_ps(y + i / pairs * layer->n + to, result);
  }
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
  /* several passes over float32: as much of k at a time as stays in the first-level cache, and each pass fetches its
   * share of what comes next; quantised weights stay there as they are */
  int in_blocks = layer->kind == LINEAR_FP32 && passes > 1;
  long most = in_blocks ? K_BLOCK : k, pace = in_blocks ? STEP_BYTES / passes : STEP_BYTES;
  for (int pairs; pair < end; pair += pairs) {
    pairs = pair + 1 < end ? 2 : 1;
    for (long first = 0, steps; first < k; first += steps) {
      steps = k - first < most ? k - first : most;
      fetching fetch = {in_blocks ? STEP_BYTES * steps : AHEAD, pace};
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

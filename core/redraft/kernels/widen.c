/* Quantised weights: widened as they are read for one row, into the first-level cache for several.
 *
 * A group's weight is d * q + m in fp32, as the file formats define it: d and m are fp16 and q has 4 bits (8 and no m),
 * so d * q is exact and the fused multiply-add rounds as the two operations do.
 */
#include "widen.h"

#include <immintrin.h>
#include <stdint.h>

#define FETCH _MM_HINT_T1 /* the same place of the panels that come next: they are short, and end before a fixed lead */
#define KERNEL __attribute__((target("avx2,fma,f16c")))
#define INLINED static inline __attribute__((always_inline)) KERNEL

INLINED __m256 halves(const void *eight) { return _mm256_cvtph_ps(_mm_loadu_si128(eight)); }

INLINED __m256 bytes(const void *eight) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(eight))); }

/* Weights of step s of the eight that a word per output holds. */
INLINED __m256 nibbles(__m256i words, int s, __m256 scale, __m256 minimum) {
  __m256i q = _mm256_and_si256(_mm256_srli_epi32(words, 4 * s), _mm256_set1_epi32(15));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(q), scale, minimum);
}

KERNEL static void widen_int4(const char *groups, long size, long steps, float *out) {
  for (; steps > 0; steps -= GROUP, groups += INT4_BYTES) {
    __m256 scale = halves(groups), minimum = halves(groups + 16);
    for (int line = 0; line < INT4_BYTES; line += 64) _mm_prefetch(groups + 2 * size + line, FETCH);
    for (int i = 0; i < 4; i++) {
      __m256i words = _mm256_load_si256((const __m256i *)(groups + 32) + i);
#pragma GCC unroll 8
      for (int s = 0; s < 8; s++, out += 8) _mm256_store_ps(out, nibbles(words, s, scale, minimum));
    }
  }
}

KERNEL static void widen_int8_groups(const char *groups, long size, long steps, float *out) {
  for (; steps > 0; steps -= GROUP, groups += INT8_BYTES) {
    __m256 scale = halves(groups);
#pragma GCC unroll 8
    for (int s = 0; s < GROUP; s++, out += 8) {
      if (s % 8 == 0) _mm_prefetch(groups + 2 * size + 8 * s, FETCH);
      _mm256_store_ps(out, _mm256_mul_ps(bytes(groups + 16 + 8 * s), scale));
    }
  }
}

void widen_panel(const linear_layer *layer, long panel, long k, long steps, float *out) {
  long size = panel_bytes(layer);
  const char *w = (const char *)layer->panels + panel * size;
  if (layer->kind == LINEAR_INT4)
    widen_int4(w + k / GROUP * INT4_BYTES, size, steps, out);
  else
    widen_int8_groups(w + k / GROUP * INT8_BYTES, size, steps, out);
}

INLINED void finish_int8(const linear_layer *layer, long panel, float *y) {
  __m256 bias = layer->bias ? _mm256_loadu_ps(layer->bias + panel * 8) : _mm256_setzero_ps();
  _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_loadu_ps(y), _mm256_loadu_ps(layer->scale + panel * 8), bias));
}

/* ---- few rows: every weight is widened in a register. `rows` and `panels` are constants wherever these are inlined,
 * and their product is at most 12; several panels at once, since one would leave the multipliers waiting ---- */

typedef struct {
  __m256 at[12];
} sums;

/* One step: x packed [rows], the weights of each panel. */
INLINED void add_step(sums *sum, const float *x, const __m256 *w, const int rows, const int panels) {
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    __m256 value = _mm256_broadcast_ss(x + r);
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) sum->at[r * panels + p] = _mm256_fmadd_ps(value, w[p], sum->at[r * panels + p]);
  }
}

INLINED void rows_int4(const char *w, long size, const float *x, long k, sums *sum, const int rows, const int panels) {
  for (long i = 0; i < k; i += GROUP, w += INT4_BYTES) {
    __m256 scale[4], minimum[4];
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) {
      const char *group = w + p * size;
      scale[p] = halves(group), minimum[p] = halves(group + 16);
      for (int line = 0; line < INT4_BYTES; line += 64) _mm_prefetch(group + panels * size + line, FETCH);
    }
    for (int j = 0; j < 4; j++) {
      __m256i words[4];
#pragma GCC unroll 4
      for (int p = 0; p < panels; p++) words[p] = _mm256_load_si256((const __m256i *)(w + p * size + 32) + j);
#pragma GCC unroll 8
      for (int s = 0; s < 8; s++, x += rows) {
        __m256 wide[4];
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) wide[p] = nibbles(words[p], s, scale[p], minimum[p]);
        add_step(sum, x, wide, rows, panels);
      }
    }
  }
}

INLINED void rows_int8(const char *w, long size, const float *x, long k, sums *sum, const int rows, const int panels,
                       const int grouped) {
  const long group = grouped ? GROUP : 8, head = grouped ? 16 : 0;
  for (long i = 0; i < k; i += group, w += head + 8 * group) {
    __m256 scale[4];
#pragma GCC unroll 4
    for (int p = 0; grouped && p < panels; p++) scale[p] = halves(w + p * size);
    const char *q = w + head;
    long steps = k - i < group ? k - i : group;
    for (long s = 0; s < steps; s++, q += 8, x += rows) {
      __m256 wide[4];
#pragma GCC unroll 4
      for (int p = 0; p < panels; p++) {
        if (s % 8 == 0) _mm_prefetch(q + (p + panels) * size, FETCH);
        wide[p] = bytes(q + p * size);
        if (grouped) wide[p] = _mm256_mul_ps(wide[p], scale[p]);
      }
      add_step(sum, x, wide, rows, panels);
    }
  }
}

INLINED void block(const linear_layer *layer, const float *x, long first, float *y, const int rows, const int panels) {
  long size = panel_bytes(layer);
  const char *w = (const char *)layer->panels + first * size;
  const float *bias = layer->bias && layer->kind != LINEAR_INT8 ? layer->bias + first * 8 : NULL;
  sums sum;
#pragma GCC unroll 12
  for (int i = 0; i < rows * panels; i++)
    sum.at[i] = bias ? _mm256_loadu_ps(bias + i % panels * 8) : _mm256_setzero_ps();
  switch (layer->kind) {
    case LINEAR_INT4: rows_int4(w, size, x, layer->k, &sum, rows, panels); break;
    case LINEAR_INT8_GROUPS: rows_int8(w, size, x, layer->k, &sum, rows, panels, 1); break;
    default: rows_int8(w, size, x, layer->k, &sum, rows, panels, 0);
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows * panels; i++) {
    float *out = y + i / panels * layer->n + (first + i % panels) * 8;
    _mm256_storeu_ps(out, sum.at[i]);
    if (layer->kind == LINEAR_INT8) finish_int8(layer, first + i % panels, out);
  }
}

/* With 4 bits, more rows leave no registers for taking them apart. */
long rows_in_registers(const linear_layer *layer) { return layer->kind == LINEAR_INT4 ? 3 : 6; }

KERNEL void few_rows(const linear_layer *layer, const float *x, long rows, long first, long count, float *y) {
  for (; rows == 1 && count >= 4; count -= 4, first += 4) block(layer, x, first, y, 1, 4);
  for (; count > 0; count -= 2, first += 2) {
    switch (rows) {
      case 1: block(layer, x, first, y, 1, 2); break;
      case 2: block(layer, x, first, y, 2, 2); break;
      case 3: block(layer, x, first, y, 3, 2); break;
      case 4: block(layer, x, first, y, 4, 2); break;
      case 5: block(layer, x, first, y, 5, 2); break;
      default: block(layer, x, first, y, 6, 2);
    }
  }
}

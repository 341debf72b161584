/* Quantised weights: widened as they are read for one row, into the first-level cache for several.
 *
 * A group's weight is d * q + m in fp32, as the file formats define it: d and m are fp16 and q has 4 bits (8 and no m), so
 * d * q is exact and the fused multiply-add rounds as the two operations do.
 */
#include "widen.h"

#include <immintrin.h>
#include <stdint.h>

enum { GROUP = 32, INT4_BYTES = 32 + GROUP * 4, INT8_BYTES = 16 + GROUP * 8, AHEAD = 1024 };

#define KERNEL __attribute__((target("avx2,fma,f16c")))
#define INLINED static inline __attribute__((always_inline)) KERNEL

INLINED __m256 halves(const void *eight) { return _mm256_cvtph_ps(_mm_loadu_si128(eight)); }

INLINED __m256 bytes(const void *eight) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(eight))); }

/* Weights of step s of the eight that a word per output holds. */
INLINED __m256 nibbles(__m256i words, int s, __m256 scale, __m256 minimum) {
  __m256i q = _mm256_and_si256(_mm256_srli_epi32(words, 4 * s), _mm256_set1_epi32(15));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(q), scale, minimum);
}

KERNEL static void widen_int4(const char *groups, long steps, float *out) {
  for (; steps > 0; steps -= GROUP, groups += INT4_BYTES) {
    __m256 scale = halves(groups), minimum = halves(groups + 16);
    for (int line = 0; line < INT4_BYTES; line += 64) _mm_prefetch(groups + AHEAD + line, _MM_HINT_T0);
    for (int i = 0; i < 4; i++) {
      __m256i words = _mm256_load_si256((const __m256i *)(groups + 32) + i);
#pragma GCC unroll 8
      for (int s = 0; s < 8; s++, out += 8) _mm256_store_ps(out, nibbles(words, s, scale, minimum));
    }
  }
}

KERNEL static void widen_int8_groups(const char *groups, long steps, float *out) {
  for (; steps > 0; steps -= GROUP, groups += INT8_BYTES) {
    __m256 scale = halves(groups);
#pragma GCC unroll 8
    for (int s = 0; s < GROUP; s++, out += 8) {
      if (s % 8 == 0) _mm_prefetch(groups + AHEAD + 8 * s, _MM_HINT_T0);
      _mm256_store_ps(out, _mm256_mul_ps(bytes(groups + 16 + 8 * s), scale));
    }
  }
}

KERNEL static void widen_int8(const char *w, long steps, float *out) {
  for (long i = 0; i < steps; i++, w += 8, out += 8) {
    _mm_prefetch(w + AHEAD, _MM_HINT_T0);
    _mm256_store_ps(out, bytes(w));
  }
}

static long panel_bytes(const linear_layer *layer) {
  switch (layer->kind) {
    case LINEAR_INT4: return layer->k / GROUP * INT4_BYTES;
    case LINEAR_INT8_GROUPS: return layer->k / GROUP * INT8_BYTES;
    default: return layer->k * 8;
  }
}

void widen_panel(const linear_layer *layer, long panel, long k, long steps, float *out) {
  const char *w = (const char *)layer->panels + panel * panel_bytes(layer);
  switch (layer->kind) {
    case LINEAR_INT4: widen_int4(w + k / GROUP * INT4_BYTES, steps, out); break;
    case LINEAR_INT8_GROUPS: widen_int8_groups(w + k / GROUP * INT8_BYTES, steps, out); break;
    default: widen_int8(w + k * 8, steps, out);
  }
}

KERNEL void finish_int8(const linear_layer *layer, long panel, float *y) {
  __m256 bias = layer->bias ? _mm256_loadu_ps(layer->bias + panel * 8) : _mm256_setzero_ps();
  _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_loadu_ps(y), _mm256_loadu_ps(layer->scale + panel * 8), bias));
}

/* ---- one row, over several panels at once: a single one would wait for its own sum ---- */

INLINED void row_int4(const char *w, long size, const float *x, long k, __m256 *sums, const int panels) {
  for (long i = 0; i < k; i += GROUP, w += INT4_BYTES, x += GROUP) {
    __m256 scale[4], minimum[4];
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) {
      const char *group = w + p * size;
      scale[p] = halves(group), minimum[p] = halves(group + 16);
      for (int line = 0; line < INT4_BYTES; line += 64) _mm_prefetch(group + AHEAD + line, _MM_HINT_T0);
    }
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
      for (int p = 0; p < panels; p++) {
        __m256i words = _mm256_load_si256((const __m256i *)(w + p * size + 32) + j);
#pragma GCC unroll 8
        for (int s = 0; s < 8; s++)
          sums[p] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + 8 * j + s), nibbles(words, s, scale[p], minimum[p]), sums[p]);
      }
  }
}

INLINED void row_int8_groups(const char *w, long size, const float *x, long k, __m256 *sums, const int panels) {
  for (long i = 0; i < k; i += GROUP, w += INT8_BYTES, x += GROUP) {
    __m256 scale[4];
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) scale[p] = halves(w + p * size);
#pragma GCC unroll 8
    for (int s = 0; s < GROUP; s++) {
      __m256 value = _mm256_broadcast_ss(x + s);
#pragma GCC unroll 4
      for (int p = 0; p < panels; p++) {
        const char *group = w + p * size;
        if (s % 8 == 0) _mm_prefetch(group + AHEAD + 8 * s, _MM_HINT_T0);
        sums[p] = _mm256_fmadd_ps(value, _mm256_mul_ps(bytes(group + 16 + 8 * s), scale[p]), sums[p]);
      }
    }
  }
}

INLINED void row_int8(const char *w, long size, const float *x, long k, __m256 *sums, const int panels) {
  for (long i = 0; i < k; i++, w += 8) {
    __m256 value = _mm256_broadcast_ss(x + i);
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) {
      _mm_prefetch(w + p * size + AHEAD, _MM_HINT_T0);
      sums[p] = _mm256_fmadd_ps(value, bytes(w + p * size), sums[p]);
    }
  }
}

INLINED void row_panels(const linear_layer *layer, const float *x, long first, float *y, const int panels) {
  long size = panel_bytes(layer);
  const char *w = (const char *)layer->panels + first * size;
  const float *bias = layer->kind == LINEAR_INT8 ? NULL : layer->bias;
  __m256 sums[4];
#pragma GCC unroll 4
  for (int p = 0; p < panels; p++) sums[p] = bias ? _mm256_loadu_ps(bias + (first + p) * 8) : _mm256_setzero_ps();
  switch (layer->kind) {
    case LINEAR_INT4: row_int4(w, size, x, layer->k, sums, panels); break;
    case LINEAR_INT8_GROUPS: row_int8_groups(w, size, x, layer->k, sums, panels); break;
    default: row_int8(w, size, x, layer->k, sums, panels);
  }
#pragma GCC unroll 4
  for (int p = 0; p < panels; p++) {
    _mm256_storeu_ps(y + (first + p) * 8, sums[p]);
    if (layer->kind == LINEAR_INT8) finish_int8(layer, first + p, y + (first + p) * 8);
  }
}

KERNEL void one_row(const linear_layer *layer, const float *x, long first, long count, float *y) {
  for (; count >= 4; count -= 4, first += 4) row_panels(layer, x, first, y, 4);
  if (count) row_panels(layer, x, first, y, 2);
}

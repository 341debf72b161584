/* Linear layers over quantised weights, multiplied as integers; see pool.h for what all kernels promise.
 *
 * A group is 32 inputs. A row's activations are rounded to 16 bits group by group: x = e * a with e = max|x| / 32767
 * and integers |a| <= 32767, at the group's largest 128 times finer than bfloat16. A weight is d * q + m: a group adds
 *     sum (d q + m) e a  =  e (d sum q a  +  m sum a)
 * where the sums are exact in 32 bits: 32 * 127 * 32767 < 2^31. Nothing is widened to float32 but one sum per group,
 * and an instruction multiplies 16 pairs. Groups are added in their order, so a row does not depend on its company.
 *
 * Weights are packed in panels of 8 outputs, 64-byte aligned; inputs are filled up to whole groups with zeros:
 *   INT8         groups of [16][8][2] int8; the sums are scaled once finished
 *   INT8_GROUPS  groups of: 8 fp16 scales, [16][8][2] int8
 *   INT4         groups of: 8 fp16 scales, 8 fp16 minima, [4][8][2] words of 4 pairs' nibbles, 16 bits
 * where [8][2] is a pair of inputs of every output, as the instruction takes them.
 */
#include "integer.h"

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* Two panels by four rows are what the registers hold. */
enum { GROUP = 32, PAIRS = GROUP / 2, PANEL = 8, PANELS = 2, MOST_ROWS = 4, LEVELS = 32767, ROWS_PER_ITEM = 16 };
#define KERNEL __attribute__((target("avx2,fma,f16c")))
#define INLINED static inline __attribute__((always_inline)) KERNEL

/* Groups of inputs, the last of which may be filled up. */
static inline long num_groups(const linear_layer *layer) { return (layer->k + GROUP - 1) / GROUP; }

/* Bytes of a group in a panel: what comes before its weights, and all of it. */
static inline long head_bytes(long kind) { return kind == LINEAR_INT4 ? 32 : kind == LINEAR_INT8_GROUPS ? 16 : 0; }
static inline long group_bytes(long kind) {
  return head_bytes(kind) + PANEL * (kind == LINEAR_INT4 ? GROUP / 2 : GROUP);
}

static inline long panel_bytes(const linear_layer *layer) { return num_groups(layer) * group_bytes(layer->kind); }

/* ---- activations ---- */

typedef struct {
  const float *x; /* [m][k] */
  long m, k, groups;
  int16_t *a;         /* [m][groups][32] */
  float *unit, *sums; /* [m][groups]: e, and e * sum a */
} rounded_rows;

KERNEL static void round_group(const float *x, int16_t *a, float *unit, float *sum) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 largest = _mm256_setzero_ps(), strange = largest;
  for (int i = 0; i < GROUP; i += 8) {
    __m256 values = _mm256_loadu_ps(x + i);
    largest = _mm256_max_ps(largest, _mm256_and_ps(values, magnitude));
    strange = _mm256_or_ps(strange, _mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  }
  float each[8], most = 0;
  _mm256_storeu_ps(each, largest);
  for (int i = 0; i < 8; i++) most = each[i] > most ? each[i] : most;
  /* below this, its inverse would overflow; a product with a weight would be lost beside any other anyway */
  int is_nothing = most < 1e-30f;
  __m256 scale = _mm256_set1_ps(is_nothing ? 0 : LEVELS / most);
  __m256i total = _mm256_setzero_si256();
  for (int i = 0; i < GROUP; i += 16) {
    __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), scale));
    __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), scale));
    __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm256_storeu_si256((__m256i *)(a + i), both);
    total = _mm256_add_epi32(total, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
  }
  int32_t counts[8], count = 0;
  _mm256_storeu_si256((__m256i *)counts, total);
  for (int i = 0; i < 8; i++) count += counts[i];
  *unit = _mm256_movemask_ps(strange) ? __builtin_nanf("") : is_nothing ? 0 : most / LEVELS;
  *sum = *unit * (float)count;
}

static void round_rows(void *arg, long item) {
  const rounded_rows *rows = arg;
  long row = item * ROWS_PER_ITEM, end = smaller(row + ROWS_PER_ITEM, rows->m);
  for (; row < end; row++)
    for (long g = 0; g < rows->groups; g++) {
      long left = rows->k - g * GROUP, at = row * rows->groups + g;
      const float *x = rows->x + row * rows->k + g * GROUP;
      float filled[GROUP] = {0};
      if (left < GROUP) x = memcpy(filled, x, left * sizeof(float));
      round_group(x, rows->a + at * GROUP, rows->unit + at, rows->sums + at);
    }
}

/* 0, or -1: memory ran out. */
static int round_activations(rounded_rows *rows) {
  static scratch held;
  long groups = rows->m * rows->groups;
  rows->a = scratch_take(&held, groups * (GROUP * sizeof(int16_t) + 2 * sizeof(float)));
  if (!rows->a) return -1;
  rows->unit = (float *)(rows->a + groups * GROUP);
  rows->sums = rows->unit + groups;
  pool_run(round_rows, rows, (rows->m + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM);
  return 0;
}

/* ---- products. `kind` and `rows` are constants wherever these are inlined ---- */

INLINED __m256 halves(const void *eight) { return _mm256_cvtph_ps(_mm_loadu_si128(eight)); }

/* Pair `i` of a group's inputs, for 8 outputs. */
INLINED __m256i weights(const char *group, int i, const int kind) {
  if (kind != LINEAR_INT4) return _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i *)group + i));
  __m256i words = _mm256_load_si256((const __m256i *)group + i / 4);
  return _mm256_and_si256(_mm256_srli_epi16(words, i % 4 * 4), _mm256_set1_epi16(15));
}

INLINED __m256i pair_of(const int16_t *a) {
  int32_t both;
  memcpy(&both, a, sizeof both);
  return _mm256_set1_epi32(both);
}

typedef struct {
  const linear_layer *layer;
  const rounded_rows *x;
  float *y;
  long pairs_per_item;
} integer_job;

/* Weights to fetch meanwhile: from where on in each panel, and how many bytes a group. */
typedef struct {
  const char *from;
  long pace;
} fetching;

/* Exact sums of a group's products: dot[r][panel][output] of `rows` rows, `stride` apart, and two panels. */
INLINED void dot_group(const char *group, long size, const int16_t *a, long stride, __m256i *dot, const int kind,
                       const int rows) {
  const int four_bytes = kind == LINEAR_INT4 ? 32 : 64;
#pragma GCC unroll 8
  for (int i = 0; i < rows * PANELS; i++) dot[i] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int four = 0; four < PAIRS / 4; four++, group += four_bytes, a += 8)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      __m256i low = weights(group, i, kind), high = weights(group + size, i, kind);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        __m256i values = pair_of(a + r * stride + 2 * i), *sum = dot + r * PANELS;
        sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(low, values));
        sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(high, values));
        /* or GCC reorders the additions, with more of them in flight than there are registers */
        __asm__("" : "+x"(sum[0]), "+x"(sum[1]));
      }
    }
}

/* `rows` rows from `row` on, times two panels from `first` on. */
INLINED void block(const integer_job *job, long row, long first, fetching fetch, const int kind, const int rows) {
  const linear_layer *layer = job->layer;
  const rounded_rows *x = job->x;
  const long size = panel_bytes(layer), stride = x->groups * GROUP;
  const float *bias = layer->bias && kind != LINEAR_INT8 ? layer->bias + first * PANEL : NULL;
  const char *w = (const char *)layer->panels + first * size;
  const int16_t *a = x->a + row * stride;
  const float *unit = x->unit + row * x->groups, *sums = x->sums + row * x->groups;
  __m256 total[MOST_ROWS * PANELS];
#pragma GCC unroll 8
  for (int i = 0; i < rows * PANELS; i++)
    total[i] = bias ? _mm256_loadu_ps(bias + i % PANELS * PANEL) : _mm256_setzero_ps();
  for (long g = 0; g < x->groups; g++, w += group_bytes(kind), a += GROUP, fetch.from += fetch.pace) {
    __m256i dot[MOST_ROWS * PANELS];
    for (long line = 0; line < fetch.pace; line += 64) {
      _mm_prefetch(fetch.from + line, _MM_HINT_T1);
      _mm_prefetch(fetch.from + size + line, _MM_HINT_T1);
    }
    dot_group(w + head_bytes(kind), size, a, stride, dot, kind, rows);
#pragma GCC unroll 8
    for (int i = 0; i < rows * PANELS; i++) {
      const char *scales = w + i % PANELS * size;
      const long at = i / PANELS * x->groups + g;
      __m256 sum = _mm256_cvtepi32_ps(dot[i]);
      if (kind != LINEAR_INT8) sum = _mm256_mul_ps(sum, halves(scales));
      total[i] = _mm256_fmadd_ps(sum, _mm256_broadcast_ss(unit + at), total[i]);
      if (kind == LINEAR_INT4)
        total[i] = _mm256_fmadd_ps(halves(scales + 16), _mm256_broadcast_ss(sums + at), total[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows * PANELS; i++) {
    long output = (first + i % PANELS) * PANEL;
    if (kind == LINEAR_INT8) {
      __m256 added = layer->bias ? _mm256_loadu_ps(layer->bias + output) : _mm256_setzero_ps();
      total[i] = _mm256_fmadd_ps(total[i], _mm256_loadu_ps(layer->scale + output), added);
    }
    _mm256_storeu_ps(job->y + (row + i / PANELS) * layer->n + output, total[i]);
  }
}

/* All rows times two panels. Reading the weights is what few rows cost: each pass fetches its share of the next two. */
INLINED void all_rows(const integer_job *job, long first, const int kind) {
  const rounded_rows *x = job->x;
  long pace = group_bytes(kind) / ((x->m + MOST_ROWS - 1) / MOST_ROWS);
  fetching fetch = {(const char *)job->layer->panels + (first + PANELS) * panel_bytes(job->layer), pace};
  for (long row = 0, rows; row < x->m; row += rows, fetch.from += pace * x->groups) {
    rows = next_rows(MOST_ROWS, x->m - row);
    switch (rows) {
      case 1: block(job, row, first, fetch, kind, 1); break;
      case 2: block(job, row, first, fetch, kind, 2); break;
      case 3: block(job, row, first, fetch, kind, 3); break;
      default: block(job, row, first, fetch, kind, 4);
    }
  }
}

KERNEL static void integer_item(void *arg, long item) {
  const integer_job *job = arg;
  long pairs = job->layer->n / (PANEL * PANELS), pair = item * job->pairs_per_item, end = pair + job->pairs_per_item;
  if (end > pairs) end = pairs;
  for (; pair < end; pair++) switch (job->layer->kind) {
      case LINEAR_INT4: all_rows(job, PANELS * pair, LINEAR_INT4); break;
      case LINEAR_INT8_GROUPS: all_rows(job, PANELS * pair, LINEAR_INT8_GROUPS); break;
      default: all_rows(job, PANELS * pair, LINEAR_INT8);
    }
}

int integer_run(const linear_layer *layer, const float *x, float *y, long m) {
  rounded_rows rows = {.x = x, .m = m, .k = layer->k, .groups = num_groups(layer)};
  if (round_activations(&rows)) return -1;
  long items = 4 * pool_threads(), pairs = layer->n / (PANEL * PANELS), each = (pairs + items - 1) / items;
  integer_job job = {layer, &rows, y, each};
  pool_run(integer_item, &job, (pairs + each - 1) / each);
  return 0;
}

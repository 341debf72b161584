/* CPU kernels of redraft: linear layers and paged attention in fp32, and the thread pool that runs them.
 *
 * Every output row is computed by the same operations in the same order whatever else is in the batch, so a token's
 * logits do not depend, not even in their last bit, on how many tokens are verified with it or who its neighbours are.
 *
 * x86-64 with AVX2 and FMA. Called from Python through ctypes; one call at a time (`run` takes a lock).
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX2

int redraft_supported(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

/* ---- thread pool: bounded spinning, then sleep; items are taken one by one, so a thread that loses its core delays
 * the others by one item at most ---- */

enum { MAX_THREADS = 64, SPINS_BEFORE_SLEEP = 8000, SPINS_BEFORE_YIELD = 20000 };
typedef void (*item_fn)(void *arg, long item);

static struct {
  pthread_mutex_t caller, sleep;
  pthread_cond_t wake;
  atomic_flag busy; /* guards function, arg, num_items, next_item */
  item_fn function;
  void *arg;
  long num_items, next_item;
  atomic_long done, generation, sleepers;
  int num_threads;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER,
          .busy = ATOMIC_FLAG_INIT, .num_threads = 1};

static void lock_items(void) {
  for (int spins = 0; atomic_flag_test_and_set_explicit(&pool.busy, memory_order_acquire);)
    if (++spins < SPINS_BEFORE_YIELD) _mm_pause(); else sched_yield();
}

static void unlock_items(void) { atomic_flag_clear_explicit(&pool.busy, memory_order_release); }

static void take_items(void) {
  for (;;) {
    lock_items();
    item_fn function = pool.function;
    void *arg = pool.arg;
    long item = pool.next_item < pool.num_items ? pool.next_item++ : -1;
    unlock_items();
    if (item < 0) return;
    function(arg, item);
    atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
  }
}

static void *worker(void *unused) {
  (void)unused;
  for (long seen = 0;;) {
    for (int spins = 0; atomic_load(&pool.generation) == seen;) {
      if (++spins < SPINS_BEFORE_SLEEP) { _mm_pause(); continue; }
      pthread_mutex_lock(&pool.sleep);
      atomic_fetch_add(&pool.sleepers, 1);
      while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
      atomic_fetch_sub(&pool.sleepers, 1);
      pthread_mutex_unlock(&pool.sleep);
    }
    seen = atomic_load(&pool.generation);
    take_items();
  }
  return NULL;
}

/* Grow the pool to `num_threads`, the calling thread included. Never shrinks. Returns the size it has. */
int redraft_start_pool(int num_threads) {
  pthread_mutex_lock(&pool.caller);
  while (pool.num_threads < num_threads && pool.num_threads < MAX_THREADS) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, NULL) != 0) break;
    pthread_detach(thread);
    pool.num_threads++;
  }
  int size = pool.num_threads;
  pthread_mutex_unlock(&pool.caller);
  return size;
}

/* Run function(arg, 0 .. num_items - 1); the caller holds pool.caller. */
static void run(item_fn function, void *arg, long num_items) {
  if (pool.num_threads == 1 || num_items == 1) {
    for (long item = 0; item < num_items; item++) function(arg, item);
    return;
  }
  lock_items();
  pool.function = function;
  pool.arg = arg;
  pool.num_items = num_items;
  pool.next_item = 0;
  atomic_store(&pool.done, 0);
  unlock_items();
  atomic_fetch_add(&pool.generation, 1);
  if (atomic_load(&pool.sleepers) > 0) {
    pthread_mutex_lock(&pool.sleep);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.sleep);
  }
  take_items();
  for (int spins = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < num_items;)
    if (++spins < SPINS_BEFORE_YIELD) _mm_pause(); else sched_yield();
}

/* ---- linear: y[m, n] = x[m, k] w[n, k]^T + bias. Weights come packed in panels of 16 outputs, [n / 16][k][16]; a panel
 * is read from memory once and serves up to 6 rows of x from registers, further rows from the first-level cache, which
 * holds K_BLOCK steps of it ---- */

enum { PANEL = 16, PREFETCH_FLOATS = 256, K_BLOCK = 256 };

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
#define STEP(r)                                                   \
  {                                                               \
    __m256 value = _mm256_broadcast_ss(x + r);                    \
    low##r = _mm256_fmadd_ps(value, w_low, low##r);               \
    high##r = _mm256_fmadd_ps(value, w_high, high##r);            \
  }
#define STORE(r)                            \
  _mm256_storeu_ps(y + r * n, low##r);      \
  _mm256_storeu_ps(y + r * n + 8, high##r);
#define ROWS_1(DO) DO(0)
#define ROWS_2(DO) ROWS_1(DO) DO(1)
#define ROWS_3(DO) ROWS_2(DO) DO(2)
#define ROWS_4(DO) ROWS_3(DO) DO(3)
#define ROWS_5(DO) ROWS_4(DO) DO(4)
#define ROWS_6(DO) ROWS_5(DO) DO(5)
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
DEFINE_PANEL(1)
DEFINE_PANEL(2)
DEFINE_PANEL(3)
DEFINE_PANEL(4)
DEFINE_PANEL(5)
DEFINE_PANEL(6)

/* Rows to take next when `left` remain: as few and as even blocks as possible. */
static long next_rows(long left) { return left <= 6 ? left : left <= 8 ? 4 : left <= 10 ? 5 : 6; }

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

/* Transpose each block of rows to [k][rows], into a buffer that only grows; the caller holds pool.caller. */
static const float *pack_rows(const float *x, long m, long k) {
  static float *buffer;
  static long capacity;
  if (m == 1) return x;
  if (capacity < m * k) {
    free(buffer);
    buffer = malloc(m * k * sizeof(float));
    capacity = buffer ? m * k : 0;
    if (!buffer) return NULL;
  }
  for (long row = 0, rows; row < m; row += rows) {
    rows = next_rows(m - row);
    float *out = buffer + row * k;
    for (long r = 0; r < rows; r++)
      for (long i = 0; i < k; i++) out[i * rows + r] = x[(row + r) * k + i];
  }
  return buffer;
}

/* n must be a multiple of 16, panels 32-byte aligned. Returns 0, or -1 if memory ran out. */
int redraft_linear(const float *x, const float *panels, const float *bias, float *y, long m, long k, long n) {
  pthread_mutex_lock(&pool.caller);
  const float *packed = pack_rows(x, m, k);
  if (packed) {
    long num_panels = n / PANEL, items = 4 * pool.num_threads;
    linear_job job = {packed, panels, bias, y, m, k, n, (num_panels + items - 1) / items};
    run(linear_item, &job, (num_panels + job.panels_per_item - 1) / job.panels_per_item);
  }
  pthread_mutex_unlock(&pool.caller);
  return packed ? 0 : -1;
}

/* ---- paged attention: reads keys and values where they lie ---- */

enum { QUERIES_PER_ITEM = 8 };

typedef struct {
  const float *query;           /* [tokens, heads, head_dim] */
  const float *keys, *values;   /* [kv_heads, num_slots, head_dim] of this layer */
  float *output;                /* [tokens, heads, head_dim] */
  const int32_t *items;         /* [num_items / kv_heads][4]: first token, queries, first query's position, table row */
  const int32_t *blocks;        /* [segments, table_width] block ids */
  long heads, kv_heads, head_dim, num_slots, block_size, table_width, window; /* window 0: none */
  float scale, softcap;                                                       /* softcap 0: none */
  atomic_int failed;
} attention_job;

/* exp(x) for x <= 0, relative error < 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf) */
INLINE __m256 exp_negative(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
  __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

INLINE float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* One query row over `count` keys from position `first`: scores, softmax, weighted values. */
INLINE void attend_row(const attention_job *job, const float *q, const float *keys, const float *values,
                       const int32_t *table, long first, long count, float *scores, float *out, int dim) {
  float highest = -__builtin_inff();
  for (long j = 0; j < count; j++) {
    long position = first + j;
    const float *key = keys + (table[position / job->block_size] * job->block_size + position % job->block_size) * dim;
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    int d = 0;
    for (; d + 16 <= dim; d += 16) {
      even = _mm256_fmadd_ps(_mm256_loadu_ps(q + d), _mm256_loadu_ps(key + d), even);
      odd = _mm256_fmadd_ps(_mm256_loadu_ps(q + d + 8), _mm256_loadu_ps(key + d + 8), odd);
    }
    if (d < dim) even = _mm256_fmadd_ps(_mm256_loadu_ps(q + d), _mm256_loadu_ps(key + d), even);
    float score = sum8(_mm256_add_ps(even, odd)) * job->scale;
    if (job->softcap > 0.0f) score = __builtin_tanhf(score / job->softcap) * job->softcap;
    scores[j] = score;
    if (score > highest) highest = score;
  }
  long padded = (count + 7) / 8 * 8;
  for (long j = count; j < padded; j++) scores[j] = -__builtin_inff();
  __m256 total = _mm256_setzero_ps();
  for (long j = 0; j < padded; j += 8) {
    __m256 e = exp_negative(_mm256_sub_ps(_mm256_loadu_ps(scores + j), _mm256_set1_ps(highest)));
    _mm256_storeu_ps(scores + j, e);
    total = _mm256_add_ps(total, e);
  }
  /* the padding's exp(-87) is 1e-38 each: below the resolution of a sum that is at least 1 */
  float inverse = 1.0f / sum8(total);
  __m256 mixed[32];
  for (int v = 0; v < dim / 8; v++) mixed[v] = _mm256_setzero_ps();
  for (long j = 0; j < count; j++) {
    long position = first + j;
    const float *value = values + (table[position / job->block_size] * job->block_size + position % job->block_size) * dim;
    __m256 weight = _mm256_set1_ps(scores[j]);
    for (int v = 0; v < dim / 8; v++) mixed[v] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(value + 8 * v), mixed[v]);
  }
  for (int v = 0; v < dim / 8; v++) _mm256_storeu_ps(out + 8 * v, _mm256_mul_ps(mixed[v], _mm256_set1_ps(inverse)));
}

INLINE void attend_item(attention_job *job, long item, int dim) {
  const int32_t *work = job->items + item / job->kv_heads * 4;
  long kv_head = item % job->kv_heads, group = job->heads / job->kv_heads;
  long first_token = work[0], queries = work[1], start = work[2];
  const int32_t *table = job->blocks + work[3] * job->table_width;
  const float *keys = job->keys + kv_head * job->num_slots * dim, *values = job->values + kv_head * job->num_slots * dim;
  float *scores = malloc((start + queries + 8) * sizeof(float));
  if (!scores) { atomic_store(&job->failed, 1); return; }
  for (long t = 0; t < queries; t++) {
    long end = start + t + 1, first = job->window > 0 && end > job->window ? end - job->window : 0;
    for (long g = 0; g < group; g++) {
      long row = ((first_token + t) * job->heads + kv_head * group + g) * dim;
      attend_row(job, job->query + row, keys, values, table, first, end - first, scores, job->output + row, dim);
    }
  }
  free(scores);
}

/* a constant head_dim lets the compiler keep a row of values in registers */
AVX2 static void attention_item(void *arg, long item) {
  attention_job *job = arg;
  switch (job->head_dim) {
    case 64: attend_item(job, item, 64); break;
    case 128: attend_item(job, item, 128); break;
    default: attend_item(job, item, (int)job->head_dim);
  }
}

/* head_dim: a multiple of 8, at most 256. Returns 0, or -1 if memory ran out. */
int redraft_attention(const float *query, const float *keys, const float *values, float *output, const int32_t *items,
                      long num_items, const int32_t *blocks, long table_width, long heads, long kv_heads,
                      long head_dim, long num_slots, long block_size, long window, float scale, float softcap) {
  attention_job job = {query, keys, values, output, items, blocks, heads, kv_heads, head_dim, num_slots,
                       block_size, table_width, window, scale, softcap, 0};
  pthread_mutex_lock(&pool.caller);
  run(attention_item, &job, num_items * kv_heads);
  pthread_mutex_unlock(&pool.caller);
  return atomic_load(&job.failed) ? -1 : 0;
}

/* What the kernels' files share: the thread pool, and the layout of rows that linear layers read.
 *
 * Every output row is computed by the same operations in the same order whatever else is in the batch, so a token's
 * logits do not depend, not even in their last bit, on how many tokens are verified with it or who its neighbours are.
 *
 * x86-64 with AVX2 and FMA. Called from Python through ctypes; one call at a time (`pool_enter` takes a lock).
 */
#ifndef REDRAFT_POOL_H
#define REDRAFT_POOL_H

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX2
#define INTERNAL __attribute__((visibility("hidden")))

enum { PANEL = 16, K_BLOCK = 256 };
typedef void (*item_fn)(void *arg, long item);

/* Wait for the pool; the caller has it to itself until `pool_leave`. Returns its number of threads. */
INTERNAL int pool_enter(void);
INTERNAL void pool_leave(void);
INTERNAL int pool_size(void); /* the same number; the caller has entered the pool */
/* Run function(arg, 0 .. num_items - 1); the caller has entered the pool. */
INTERNAL void pool_run(item_fn function, void *arg, long num_items);

/* Rows to take next when `left` remain: as few and as even blocks as possible. */
static inline long next_rows(long left) { return left <= 6 ? left : left <= 8 ? 4 : left <= 10 ? 5 : 6; }
/* x [m][k] with each block of rows transposed to [k][rows]; the caller has entered the pool. NULL: memory ran out. */
INTERNAL const float *pack_rows(const float *x, long m, long k);

/* The inner loops of linear layers, written out row by row because compilers keep an array of accumulators in memory:
 * DO for rows 0 .. n - 1 of a block; the step of row r, for the weights w_low and w_high of 16 outputs, into the sums
 * low##r and high##r; DEFINE for every size of block. */
#define ROWS_1(DO) DO(0)
#define ROWS_2(DO) ROWS_1(DO) DO(1)
#define ROWS_3(DO) ROWS_2(DO) DO(2)
#define ROWS_4(DO) ROWS_3(DO) DO(3)
#define ROWS_5(DO) ROWS_4(DO) DO(4)
#define ROWS_6(DO) ROWS_5(DO) DO(5)
#define STEP(r)                                        \
  {                                                    \
    __m256 value = _mm256_broadcast_ss(x + r);         \
    low##r = _mm256_fmadd_ps(value, w_low, low##r);    \
    high##r = _mm256_fmadd_ps(value, w_high, high##r); \
  }
#define EACH_BLOCK(DEFINE) DEFINE(1) DEFINE(2) DEFINE(3) DEFINE(4) DEFINE(5) DEFINE(6)

#endif

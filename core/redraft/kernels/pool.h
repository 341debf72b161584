/* What the kernels' files share: the thread pool.
 *
 * Every output row is computed by the same operations in the same order whatever else is in the batch, so a token's
 * logits do not depend, not even in their last bit, on how many tokens are verified with it or who its neighbours are.
 *
 * x86-64 with AVX2 and FMA. Called from Python through ctypes; one call at a time (`pool_enter` takes a lock).
 */
#ifndef REDRAFT_POOL_H
#define REDRAFT_POOL_H

#include <stddef.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX2
#define INTERNAL __attribute__((visibility("hidden")))

typedef void (*item_fn)(void *arg, long item);

static inline long smaller(long a, long b) { return a < b ? a : b; }
static inline long larger(long a, long b) { return a > b ? a : b; }

/* Wait for the pool; the caller has it to itself until `pool_leave`. Returns its number of threads. */
INTERNAL int pool_enter(void);
INTERNAL void pool_leave(void);
/* The number of threads; the caller has entered the pool. */
INTERNAL int pool_threads(void);
/* Run function(arg, 0 .. num_items - 1); the caller has entered the pool. */
INTERNAL void pool_run(item_fn function, void *arg, long num_items);

/* Working memory that only grows, aligned to a cache line. Static ones begin empty. */
typedef struct {
  void *memory;
  size_t size;
} scratch;
/* At least `size` bytes of any contents, valid until the next call; the caller has entered the pool. NULL: none left. */
INTERNAL void *scratch_take(scratch *held, size_t size);

#endif

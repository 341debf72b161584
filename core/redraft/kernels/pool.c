/* The thread pool: bounded spinning, then sleep; items are taken one by one, so a thread that loses its core delays
 * the others by one item at most. */

#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "pool.h"

enum { MAX_THREADS = 64, SPINS_BEFORE_SLEEP = 8000, SPINS_BEFORE_YIELD = 20000, CACHE_LINE = 64 };

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

int pool_enter(void) {
  pthread_mutex_lock(&pool.caller);
  return pool.num_threads;
}

int pool_threads(void) { return pool.num_threads; }

void pool_leave(void) { pthread_mutex_unlock(&pool.caller); }

void pool_run(item_fn function, void *arg, long num_items) {
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

void *scratch_take(scratch *held, size_t size) {
  if (held->size < size) {
    free(held->memory);
    held->size = (size + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    held->memory = aligned_alloc(CACHE_LINE, held->size);
    if (!held->memory) held->size = 0;
  }
  return held->memory;
}

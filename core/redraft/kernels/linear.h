/* Linear layers over packed weights, for the kernels' other files; the layouts are in linear.c. */
#ifndef REDRAFT_LINEAR_H
#define REDRAFT_LINEAR_H

#include "pool.h"

/* INT8: one scale per output. INT4 and INT8_GROUPS: a scale (INT4: and a minimum) per output and 32 inputs. */
enum { LINEAR_FP32 = 0, LINEAR_INT8 = 1, LINEAR_INT4 = 2, LINEAR_INT8_GROUPS = 3 };

typedef struct {
  long kind;            /* LINEAR_* */
  const void *panels;   /* packed weights: linear.c, integer.c */
  const float *scale;   /* per output, INT8 only */
  const float *bias;    /* per output or NULL; n entries */
  long k, n;            /* inputs; outputs, a multiple of 16 */
} linear_layer;

/* A product that the pool shares out: an item is `pairs_per_item` pairs of panels. */
typedef struct {
  const linear_layer *layer;
  const float *x; /* each block of rows packed [k][rows] */
  float *y;
  long m, pairs_per_item;
} linear_job;

/* Rows to take next when `left` remain: as few and as even blocks as possible. */
static inline long next_rows(long most, long left) {
  long blocks = (left + most - 1) / most;
  return (left + blocks - 1) / blocks;
}

/* y[m, n] = x[m, k] w^T (+ bias); the caller has entered the pool. 0, or -1: memory ran out. */
INTERNAL int linear_run(const linear_layer *layer, const float *x, float *y, long m);

#endif

/* Linear layers over packed weights, for the kernels' other files; the layouts are in linear.c. */
#ifndef REDRAFT_LINEAR_H
#define REDRAFT_LINEAR_H

#include "pool.h"

/* INT8: one scale per output. INT4 and INT8_GROUPS: a scale (INT4: and a minimum) per output and 32 inputs. */
enum { LINEAR_FP32 = 0, LINEAR_INT8 = 1, LINEAR_INT4 = 2, LINEAR_INT8_GROUPS = 3 };

/* inputs of a group, and the bytes of one for a panel of 8 outputs */
enum { GROUP = 32, INT4_BYTES = 32 + GROUP * 4, INT8_BYTES = 16 + GROUP * 8 };

typedef struct {
  long kind;            /* LINEAR_* */
  const void *panels;   /* packed weights, see linear.c */
  const float *scale;   /* per output, int8 only */
  const float *bias;    /* per output or NULL; n entries */
  long k, n;            /* inputs; outputs, a multiple of 16 */
} linear_layer;

/* Of a panel of 8 outputs. */
static inline long panel_bytes(const linear_layer *layer) {
  switch (layer->kind) {
    case LINEAR_INT4: return layer->k / GROUP * INT4_BYTES;
    case LINEAR_INT8_GROUPS: return layer->k / GROUP * INT8_BYTES;
    case LINEAR_INT8: return layer->k * 8;
    default: return layer->k * 8 * (long)sizeof(float);
  }
}

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

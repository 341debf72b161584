/* Linear layers over packed weights, for the kernels' other files; the layouts are in linear.c. */
#ifndef REDRAFT_LINEAR_H
#define REDRAFT_LINEAR_H

#include "pool.h"

/* INT8: one scale per output. INT4 and INT8_GROUPS: a scale (INT4: and a minimum) per output and 32 inputs. */
enum { LINEAR_FP32 = 0, LINEAR_INT8 = 1, LINEAR_INT4 = 2, LINEAR_INT8_GROUPS = 3 };

typedef struct {
  long kind;            /* LINEAR_* */
  const void *panels;   /* packed weights, see linear.c */
  const float *scale;   /* per output, int8 only */
  const float *bias;    /* per output or NULL; n entries */
  long k, n;            /* inputs; outputs, a multiple of 16 */
} linear_layer;

/* y[m, n] = x[m, k] w^T (+ bias); the caller has entered the pool. 0, or -1: memory ran out. */
INTERNAL int linear_run(const linear_layer *layer, const float *x, float *y, long m);

#endif

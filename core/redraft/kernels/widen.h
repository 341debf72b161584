/* Quantised weights as the numbers that they stand for; see linear.c for the layouts. */
#ifndef REDRAFT_WIDEN_H
#define REDRAFT_WIDEN_H

#include "linear.h"

/* Steps k .. k + steps - 1 of a panel into out [steps][8]; k and, but for the last steps, `steps` a multiple of 32. */
INTERNAL void widen_panel(const linear_layer *layer, long panel, long k, long steps, float *out);
/* One row times `count` panels, an even number, from `first` on; y as of output 0. Bitwise what the widened panels give. */
INTERNAL void one_row(const linear_layer *layer, const float *x, long first, long count, float *y);
/* Turn the finished sums of 8 outputs of an INT8 layer into its results. */
INTERNAL void finish_int8(const linear_layer *layer, long panel, float *y);

#endif

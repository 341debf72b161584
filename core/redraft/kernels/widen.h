/* Quantised weights as the numbers that they stand for; see linear.c for the layouts. */
#ifndef REDRAFT_WIDEN_H
#define REDRAFT_WIDEN_H

#include "linear.h"

/* How many rows are best multiplied by `few_rows` at once; more by `widen_panel`, unless it is INT8. */
INTERNAL long rows_in_registers(const linear_layer *layer);
/* 1 to 6 rows of x, packed [k][rows], times `count` panels, an even number, from `first` on, into y [rows][n]. Bitwise
 * what the FP32 kernel gives over the widened panels. */
INTERNAL void few_rows(const linear_layer *layer, const float *x, long rows, long first, long count, float *y);
/* Steps k .. k + steps - 1 of a panel in groups into out [steps][8]; k and `steps` are multiples of 32. */
INTERNAL void widen_panel(const linear_layer *layer, long panel, long k, long steps, float *out);

#endif

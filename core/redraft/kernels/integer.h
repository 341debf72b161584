/* Linear layers over quantised weights, for linear.c. */
#ifndef REDRAFT_INTEGER_H
#define REDRAFT_INTEGER_H

#include "linear.h"

/* As linear_run, for any kind but LINEAR_FP32. */
INTERNAL int integer_run(const linear_layer *layer, const float *x, float *y, long m);

#endif

/* Linear layers with AVX-512; see linear.c for the layouts. */
#ifndef REDRAFT_WIDE_H
#define REDRAFT_WIDE_H

#include "linear.h"

enum { WIDE_ROWS = 12 }; /* most rows of x that `wide_item` takes together, packed [k][rows] */

/* Whether this processor has what the kernels here need. */
INTERNAL int wide_is_supported(void);
/* An item of a `linear_job`; bitwise what `linear_item` gives. */
INTERNAL void wide_item(void *job, long item);

#endif

"""The table of a call's queries: what the kernels of the dense sweep read of each query.

`queries_kernel` (:mod:`memokern.backends.triton.posterior.queries`) writes it, [TABLE, B] float64.
With <x, u> the product of a query's terms and a row as it enters products
(:mod:`memokern.backends.triton.core.operands`),

    t = A1 <x, u> - A2 |yc|^2  (+ INV_T bias, where the mode is SOFT)

is l / T + COMMON, up to an error of at most E0 + E1 |yc| + E2 |yc|^2 + E3 |bias|. In the modes HARD
and LOG, t lacks the bias and stands for the distance: r^2 = 2 (COMMON - t). <xc, yc> is
DOT <x, u> + XO. OO is how far the rows' center is from the row that enters products as 0.
"""

from __future__ import annotations

import triton.language as tl

A1, A2, INV_T, COMMON, E0, E1, E2, E3, MODE, DOT, XO, OO = (tl.constexpr(i) for i in range(12))
TABLE = 12  # rows of the table
# How a query weighs the rows. SOFT: by its sigma. HARD: the nearest rows share all weight, because
# sigma is 0, or so small that r^2 / sigma^2 nearly overflows. LOG: by the weighting "log". LOST:
# not at all, because the query, its sigma or its temperature is not a number of their range.
SOFT, HARD, LOG, LOST = (tl.constexpr(i) for i in range(4))

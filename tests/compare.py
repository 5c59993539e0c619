"""How far a backend may be from the oracle: every tolerance, in one place.

`unit` is the type that the sweep accumulates in: float64 in the reference and wherever the queries
or the rows are float64, else float32. The contract of float32 (docs, "Numerics"): weights to 1e-4,
the mean to 1e-5 of the largest row. In float64: 2^10 sums of 2^-53. The mean is also rounded to x's
type. The oracle is rounded as well: it subtracts logits, whose last place counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memokern.calls import Gradients, Query, Rows, Sums
from tests import oracle

F32, F64 = torch.float32, torch.float64
MEAN = {F32: 1e-5, F64: 1e-12}  # of the largest |y|
RESIDUAL = {F32: 1e-5, F64: 1e-12}  # of the distances that matter
STATS = {F32: 1e-4, F64: 1e-9}  # of 1 + |value|
GRADIENT = {F32: 1e-4, F64: 1e-9}  # of the largest gradient of its kind
LISTED, LISTED_GRADIENT = 1e-12, 1e-10  # float64 whatever the types are
ROUNDED = {F32: 6e-8, F64: 0.0}  # to x's type


def unit(backend: str, query: Query, rows: Rows) -> torch.dtype:
    """What a backend accumulates these in."""
    return F64 if backend == "reference" or query.computes_in_float64(rows) else F32


def _within(got: Tensor, want: Tensor, tol: float | Tensor, what: object) -> None:
    off = (got.to(F64) - want).abs()
    share = torch.where(got.to(F64) == want, 0.0, off) / tol  # -inf is right where it is -inf
    if not bool((share <= 1).all()):
        raise AssertionError(f"{what}: off by {share.max().item():.3g} of what is allowed")


def sums(got: Sums, want: Sums, query: Query, rows: Rows, kind: torch.dtype, what: object) -> None:
    """Sums of a dense sweep, finite but for log_z and mean_logit of a query at sigma = 0 that is no
    row."""
    check_types(got, query)
    for a, e in zip(got, want, strict=True):
        assert torch.equal(torch.isfinite(a), torch.isfinite(e)), what
    share, least = MEAN[kind], 0.0
    if kind == F64:
        share, least = share + ROUNDED[query.x.dtype], 1e-12
    largest = max(oracle.values(rows).abs().max().item(), 1e-30)
    _within(got.mean, want.mean, share * largest + least, (what, "mean"))
    for name, a, e in zip(Sums._fields[1:5], got[1:5], want[1:5], strict=True):
        _within(a, e, STATS[kind] * (1 + e.abs()), (what, name))
    residuals(got, want, query, rows, kind, what)


def residuals(
    got: Sums, want: Sums, query: Query, rows: Rows, kind: torch.dtype, what: object
) -> None:
    """Relative to the distances that matter and to the noise, however far from the origin."""
    width = query.sigma * query.temperature.sqrt() if query.weighting == "gaussian" else 0.0
    reach = oracle.reach(query, rows).nan_to_num(0.0)  # of a query that is lost, or has no row
    tol = RESIDUAL[kind] * (reach + width) + 1e-300
    tol = tol[:, None] + max(ROUNDED[query.x.dtype], 2.3e-16) * want.residual.abs()
    _within(got.residual, want.residual, tol, (what, "residual"))


def check_types(got: Sums, query: Query) -> None:
    """Mean and residual in x's type and shape, the others [B] float64."""
    for value in (got.mean, got.residual):
        assert value.dtype == query.x.dtype and value.shape == query.x.shape
    assert all(v.dtype == F64 and v.shape == query.sigma.shape for v in got[1:5])


def contract(got: Sums, want: Sums, what: object = None) -> None:
    """The numerics contract for float32 as the documents state it."""
    assert (got.mean - want.mean).norm() <= 1e-5 * want.mean.norm(), what
    torch.testing.assert_close(got.weight_sq, want.weight_sq, rtol=2e-4, atol=0)
    torch.testing.assert_close(got.log_z, want.log_z, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(got.mean_logit, want.mean_logit, rtol=1e-6, atol=1e-4)


def _last_place(sums: Sums) -> float:
    """4 units in the last place of the oracle's logits."""
    return 4 * 2.2e-16 * sums.mean_logit.abs().max().item()


def gradients(
    got: Gradients, want: Gradients, sums: Sums, query: Query, kind: torch.dtype, what: object
) -> None:
    """Of a dense sweep for the query."""
    check_gradient_types(got, query)
    for name, a, e in zip(Gradients._fields, got, want, strict=True):
        if e.numel() == 0:
            continue
        tol = GRADIENT[kind] * (e.abs().max().item() + 1e-2) + _last_place(sums)
        if name == "x":
            tol += ROUNDED[query.x.dtype] * e.abs().max().item()
        _within(a, e, tol, (what, name))


def check_gradient_types(got: Gradients, query: Query) -> None:
    """Those of x in its type, the others float64; none for what the query has not."""
    assert got.x.dtype == query.x.dtype and got.x.shape == query.x.shape
    assert all(v.dtype == F64 for v in got[1:])
    for value, of in zip(got[4:], query.tensors[4:], strict=True):
        assert value.shape == ((0,) if of is None else of.shape)


def row_gradient(got: Tensor, want: Tensor, rows: Rows, kind: torch.dtype, what: object) -> None:
    """For the rows: as for the query, and what a row's own type rounds."""
    assert got.dtype == rows.data.dtype and got.shape == rows.data.shape
    info = torch.finfo(rows.data.dtype)
    tol = GRADIENT[kind] * want.abs().max() + info.eps * want.abs()
    if kind == F64:  # down to numbers that the rows' type has no more digits for
        tol = tol + info.eps * info.smallest_normal
    _within(got, want, tol, what)


def listed(got: Sums, want: Sums, query: Query, what: object) -> None:
    """Sums over lists of rows."""
    check_types(got, query)
    for name, a, e in zip(Sums._fields, got, want, strict=True):
        rounded = ROUNDED[query.x.dtype] if name in ("mean", "residual") else 0
        tol = LISTED + _last_place(want) + rounded
        _within(a, e, tol * (1 + e.abs().max().item()), (what, name))


def listed_gradients(
    got: Gradients, want: Gradients, sums: Sums, query: Query, what: object
) -> None:
    """Of sums over lists of rows, for the query."""
    check_gradient_types(got, query)
    for name, a, e in zip(Gradients._fields, got, want, strict=True):
        if e.numel() == 0:
            continue
        tol = LISTED_GRADIENT + _last_place(sums) + (ROUNDED[query.x.dtype] if name == "x" else 0)
        _within(a, e, tol * (1 + e.abs().max().item()), (what, name))


def second_derivatives(
    got: Sequence[Tensor], want: Sequence[Tensor], kind: torch.dtype, what: object
) -> None:
    """As for the first ones: a share of the largest of the kind."""
    for i, (a, e) in enumerate(zip(got, want, strict=True)):
        if e.numel():
            _within(a, e, GRADIENT[kind] * (e.abs().max().item() + 1e-2), (what, i))


def equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """To the bit; NaN is NaN."""
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def close(got: Sequence[Tensor], want: Sequence[Tensor], rtol: float, atol: float) -> None:
    """Sums that were taken in another order."""
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol)

"""Every kernel run from Triton's own intermediate code, watched: an access outside of a tensor, two
programs that touch the same element, an operation without a result stop it at the kernel's line.

`make sanitize` installs ttsem, which is experimental and optional, and runs this by it. Sizes are
ragged, so that a mask that is missing would show; results are compared with the reference too.
"""

from __future__ import annotations

import sys

import torch

from memokern.backends.reference import BACKEND as REFERENCE
from memokern.backends.triton import BACKEND
from memokern.backends.triton.core import machine
from memokern.backends.triton.core import rows as stored
from memokern.backends.triton.core.state import merge_states
from memokern.calls import LogitBounds, Query, RowLists, Rows, merge, to_sums

F32, F64 = torch.float32, torch.float64
TYPES = (F32, torch.bfloat16, torch.float16, torch.uint8)


def problem(b: int, n: int, d: int, dtype: torch.dtype, biased: bool) -> tuple[Query, Rows]:
    torch.manual_seed(0)
    scale, shift = (2 / 255, -1.0) if dtype == torch.uint8 else (1.0, 0.0)
    values = torch.rand(n, d) * 255 if dtype == torch.uint8 else torch.randn(n, d)
    data = values.to(dtype)
    y = Rows(data, scale, shift).values(slice(None))
    x = (y[torch.arange(b) % n] + 0.5 * torch.randn(b, d, dtype=F64)).to(F32)
    columns = [torch.full((b,), v, dtype=F64) for v in (0.7, 0.9, 1.3)]
    center, bias = y.mean(0), torch.randn(n, dtype=F64)
    rows = Rows(data, scale, shift, center, (y - center).square().sum(1))
    return Query(x, *columns, bias if biased else None), rows


def close(got, want, tol: float = 1e-4) -> None:
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), e.to(F64), rtol=tol, atol=tol)


def check_sweep(query: Query, rows: Rows, rows_tol: float) -> None:
    """The dense sweep, its state and its gradients."""
    out, want = BACKEND.posterior(query, rows), REFERENCE.posterior(query, rows)
    close(out, want)
    state = BACKEND.posterior_state(query, rows)
    close(to_sums(state, query), want)
    close(merge_states(state, state)[:6], merge(state, state)[:6], 1e-12)
    ones = type(out)(*(torch.ones_like(v) for v in out))
    got = BACKEND.posterior_backward(query, rows, out, ones)
    want = REFERENCE.posterior_backward(query, rows, out, ones)
    # The reference's gradient for the temperature is NaN where logits are infinite.
    kept = [i for i in range(5) if i != 3 or bool((query.sigma > 0).all())]
    close([got[i] for i in kept], [want[i] for i in kept], 1e-3)
    if rows.data.dtype != torch.uint8:
        got, want = (v.posterior_backward_rows(query, rows, ones) for v in (BACKEND, REFERENCE))
        close([got], [want], rows_tol)


def sweep(dtype: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    check_sweep(*problem(b, n, d, dtype, biased), 1e-3 if dtype == F32 else 1e-2)


def described(dtype: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    """A sweep as Hopper reads it: its stride is a multiple of 16 bytes."""
    knows, stored.has_descriptors = stored.has_descriptors, lambda device: True
    try:
        rows = problem(b, n, d, dtype, biased)[1]
        assert stored.KernelRows(rows.data, rows.sq_norms, None).described
        sweep(dtype, b, n, d, biased)
    finally:
        stored.has_descriptors = knows


def zero_sigma(dtype: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    """sigma = 0 and queries that hit two rows each."""
    query, rows = problem(b, n, d, dtype, biased)
    rows.data[n // 2 :] = rows.data[: n - n // 2].clone()
    query = query._replace(x=rows.data[:b].to(F32))
    query.sigma.zero_()
    query.alpha.fill_(1.0)
    check_sweep(query, rows, 1e-3)


def select(dtype: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    query, rows = problem(b, n, d, dtype, biased)
    close(BACKEND.nearest(query.x, rows, 3), REFERENCE.nearest(query.x, rows, 3), 1e-9)
    start = torch.tensor([0, *(7 + i for i in range(b))]).cumsum(0)
    index = torch.cat([torch.randperm(n)[: 7 + i].sort().values for i in range(b)])
    lists = RowLists(start, index)
    out = BACKEND.posterior_listed(query, rows, lists)
    close(out, REFERENCE.posterior_listed(query, rows, lists), 1e-6)
    ones = type(out)(*(torch.ones_like(v) for v in out))
    args = (query, rows, lists, out, ones)
    close(
        BACKEND.posterior_listed_backward(*args), REFERENCE.posterior_listed_backward(*args), 1e-6
    )


def scan(half: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    """The index is the rows themselves: coordinates, bands of two and the rest, exact levels."""
    query, rows = problem(b, n, d, F32, biased)
    yc = rows.data.to(F64) - rows.center
    xc = query.x.to(F64) - query.alpha[:, None] * rows.center
    k0, k1 = 5, 9

    def norms(v: torch.Tensor) -> list[torch.Tensor]:
        return [v[:, k0:k1].norm(dim=1, keepdim=True), v[:, k1:].norm(dim=1, keepdim=True)]

    up = 1 + 1e-6
    fine = yc[:, k0:k1].to(half)
    pad = (fine.to(F64) - yc[:, k0:k1]).norm(dim=1, keepdim=True) + 1e-6
    coarse = torch.cat([yc[:, :k0], *(v * up for v in norms(yc)), pad], 1).to(F32)
    size = xc.norm(dim=1, keepdim=True)
    bands = torch.cat([*norms(xc), size], 1) * up
    margin = 1e-4 * size[:, 0] * yc.norm(dim=1).max()
    query.sigma.fill_(0.1)
    bounds = LogitBounds(
        coarse, fine, xc[:, :k1].to(F32), bands.to(F32), margin, size[:, 0].square(), (k0, k1),
        (0, 1), 1e-6, n,
    )  # fmt: skip
    found = BACKEND.bound_scan(query, rows, bounds)
    r2 = torch.stack([(q - a * rows.data.to(F64)).square().sum(1) for q, a in
                      zip(query.x.to(F64), query.alpha, strict=True)])  # fmt: skip
    bias = query.bias if biased else 0.0
    t = (-r2 / (2 * query.sigma[:, None] ** 2) + bias) / query.temperature[:, None]
    start, index = found.lists
    for i in range(b):
        left = torch.ones(n, dtype=torch.bool)
        left[index[start[i] : start[i + 1]]] = False
        assert (t[i][left] <= found.threshold[i]).all()


CASES = [
    *(("sweep, one pass", sweep, t, size, biased) for t in TYPES
      for size, biased in (((3, 70, 13), False), ((19, 70, 13), True))),
    *(("sweep, wide", sweep, t, size, biased) for t in TYPES
      for size, biased in (((2, 70, 150), True), ((19, 40, 150), False))),
    *(("sweep, in chunks", sweep, t, size, biased) for t in TYPES
      for size, biased in (((2, 70, 270), True), ((19, 40, 270), False))),
    ("by descriptors", described, torch.bfloat16, (3, 70, 288), True),
    ("at sigma = 0", zero_sigma, F32, (3, 70, 13), True),
    *(("nearest, lists", select, t, (3, 70, 37), i % 2 == 0) for i, t in enumerate(TYPES)),
    *(("scan", scan, t, (b, 70, 20), b == 3) for t in (F32, torch.float16) for b in (3, 19)),
]  # fmt: skip


def main() -> None:
    # Tensors say that they are on a GPU, which nothing else knows of.
    torch.cuda.is_current_stream_capturing = lambda: False
    machine.of = lambda device: machine.Machine(multiprocessors=2, l2_bytes=1 << 20)
    bad = 0
    for name, run, dtype, size, biased in CASES:
        try:
            run(dtype, *size, biased)
            said = "clean"
        except Exception as error:
            said, bad = f"{type(error).__name__}: {error}", bad + 1
        print(f"{name:<18} {str(dtype).removeprefix('torch.'):<9} {size}: {said}", flush=True)
    print(f"{len(CASES)} cases, {bad} with findings")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

"""Every kernel run from Triton's own intermediate code, watched: an access outside of a tensor, two
programs that touch the same element, an operation without a result stop it at the kernel's line.

`make sanitize` installs ttsem, which is experimental and optional, and runs this by it. Sizes are
ragged, so that a mask that is missing would show; results are compared with the reference too.
"""

from __future__ import annotations

import sys

import torch

from memokern.backends.reference import dense as reference
from memokern.backends.triton import dense as triton
from memokern.backends.triton.core import rows as stored
from memokern.backends.triton.listed import launch as triton_select
from memokern.backends.triton.posterior.planner import Machine
from memokern.backends.triton.scan import launch as triton_scan

F32, F64 = torch.float32, torch.float64
TYPES = (F32, torch.bfloat16, torch.float16, torch.uint8)


def problem(b: int, n: int, d: int, dtype: torch.dtype):
    torch.manual_seed(0)
    scale, shift = (2 / 255, -1.0) if dtype == torch.uint8 else (1.0, 0.0)
    values = torch.rand(n, d) * 255 if dtype == torch.uint8 else torch.randn(n, d)
    rows = values.to(dtype)
    y = rows.to(F64) * scale + shift
    x = (y[torch.arange(b) % n] + 0.5 * torch.randn(b, d, dtype=F64)).to(F32)
    columns = [torch.full((b,), v, dtype=F64) for v in (0.7, 0.9, 1.3)]
    center = y.mean(0)
    data = (center, (y - center).square().sum(1), scale, shift)
    return x, rows, columns, torch.randn(n, dtype=F64), data


def close(got, want, tol: float = 1e-4) -> None:
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(F64), e.to(F64), rtol=tol, atol=tol)


def sweep(dtype: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    x, rows, how, bias, data = problem(b, n, d, dtype)
    args = (x, rows, *how, bias if biased else None, *data, "gaussian")
    out, want = triton.posterior(*args), reference.posterior(*args)
    close(out, want)
    args = (*args[:8], *out, *(torch.ones_like(v) for v in out), *args[8:])
    close(triton.posterior_backward(*args), reference.posterior_backward(*args), 1e-3)
    if dtype != torch.uint8:
        args = (*args[:7], list(args[13:18]), *args[18:])
        got, wanted = (v.posterior_backward_rows(*args) for v in (triton, reference))
        close([got], [wanted], 1e-3 if dtype == F32 else 1e-2)


def described(dtype: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    """A sweep as Hopper reads it: its stride is a multiple of 16 bytes."""
    knows, stored.has_descriptors = stored.has_descriptors, lambda device: True
    try:
        rows = problem(b, n, d, dtype)[1]
        assert stored.Rows(rows, rows, None).described
        sweep(dtype, b, n, d, biased)
    finally:
        stored.has_descriptors = knows


def limit(dtype: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    """sigma = 0 and queries that hit two rows each."""
    _, rows, how, bias, data = problem(b, n, d, dtype)
    rows[n // 2 :] = rows[: n - n // 2].clone()
    x = rows[:b].to(F32)
    how[0].zero_()
    how[1].fill_(1.0)
    args = (x, rows, *how, bias if biased else None, *data, "gaussian")
    out, want = triton.posterior(*args), reference.posterior(*args)
    close(out, want)
    args = (*args[:8], *out, *(torch.ones_like(v) for v in out), *args[8:])
    got, want = triton.posterior_backward(*args), reference.posterior_backward(*args)
    # The reference's gradient for the temperature is NaN where logits are infinite.
    close([*got[:3], got[4]], [*want[:3], want[4]], 1e-3)
    args = (*args[:7], list(args[13:18]), *args[18:])
    close([triton.posterior_backward_rows(*args)], [reference.posterior_backward_rows(*args)], 1e-3)


def select(dtype: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    x, rows, how, bias, (center, sq_norms, scale, shift) = problem(b, n, d, dtype)
    near = (x, rows, 3, center, sq_norms, scale, shift)
    close(triton_select.nearest(*near), reference.nearest(*near), 1e-9)
    start = torch.tensor([0, *(7 + i for i in range(b))]).cumsum(0)
    index = torch.cat([torch.randperm(n)[: 7 + i].sort().values for i in range(b)])
    args = (x, rows, *how, bias if biased else None, start, index)
    out = triton_select.posterior_on_support(*args, scale, shift)
    close(out, reference.posterior_on_support(*args, scale, shift), 1e-6)
    args = (*args, *out, *(torch.ones_like(v) for v in out), scale, shift)
    close(
        triton_select.posterior_on_support_backward(*args),
        reference.posterior_on_support_backward(*args), 1e-6,
    )  # fmt: skip


def scan(half: torch.dtype, b: int, n: int, d: int, biased: bool) -> None:
    """The index is rows themselves: coordinates, bands of two and the rest, an exact ladder."""
    x, rows, how, bias, (center, sq_norms, scale, shift) = problem(b, n, d, F32)
    yc, xc = rows.to(F64) - center, x.to(F64) - how[1][:, None] * center
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
    how[0].fill_(0.1)
    found = triton_scan.bound_scan(
        x, rows, *how, bias if biased else None, center, sq_norms, scale, shift, coarse, fine,
        xc[:, :k1].to(F32), bands.to(F32), margin, size[:, 0].square(), [k0, k1], [0, 1], 1e-6, n,
    )  # fmt: skip
    r2 = torch.stack([(q - a * rows.to(F64)).square().sum(1) for q, a in
                      zip(x.to(F64), how[1], strict=True)])  # fmt: skip
    t = (-r2 / (2 * how[0][:, None] ** 2) + (bias if biased else 0.0)) / how[2][:, None]
    for i in range(b):
        left = torch.ones(n, dtype=torch.bool)
        left[found[1][found[0][i] : found[0][i + 1]]] = False
        assert (t[i][left] <= found[2][i]).all()


CASES = [
    *(("sweep, one pass", sweep, t, size, biased) for t in TYPES
      for size, biased in (((3, 70, 13), False), ((19, 70, 13), True))),
    *(("sweep, wide", sweep, t, size, biased) for t in TYPES
      for size, biased in (((2, 70, 150), True), ((19, 40, 150), False))),
    *(("sweep, in chunks", sweep, t, size, biased) for t in TYPES
      for size, biased in (((2, 70, 270), True), ((19, 40, 270), False))),
    ("by descriptors", described, torch.bfloat16, (3, 70, 288), True),
    ("at the limit", limit, F32, (3, 70, 13), True),
    *(("nearest, lists", select, t, (3, 70, 37), i % 2 == 0) for i, t in enumerate(TYPES)),
    *(("scan", scan, t, (b, 70, 20), b == 3) for t in (F32, torch.float16) for b in (3, 19)),
]  # fmt: skip


def main() -> None:
    # Tensors say that they are on a GPU, which nothing else knows of.
    torch.cuda.is_current_stream_capturing = lambda: False
    triton.machine = lambda device: Machine(multiprocessors=2, l2_bytes=1 << 20)
    triton_select.multiprocessors = lambda device: 2
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

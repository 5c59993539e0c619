"""What the Triton launchers ask of their arguments, and what they derive from them, on the device.

Nothing here waits for the device, so that what calls it can be captured into a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memokern.backends.cpu.native import check_fit, check_rows, check_stride, wide

_F32, _F64 = torch.float32, torch.float64
_ROWS = (_F32, torch.bfloat16, torch.float16, torch.uint8)


def refusal(x: Tensor, rows: Tensor) -> str | None:
    """Why the kernels cannot take these, in one line, or None: then the reference runs them."""
    if x.dtype != _F32:
        return f"queries are float32 on a GPU, not {_name(x.dtype)}"
    if rows.dtype not in _ROWS:
        known = ", ".join(_name(t) for t in _ROWS)
        return f"rows are one of {known} on a GPU, not {_name(rows.dtype)}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured there, which can wait for no value."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# Kernels keep up to 10 numbers for each query, addressed with 32 bits.
MOST_QUERIES = 1 << 27


def check_queries(b: int) -> None:
    """ValueError for more queries than the kernels can address at once."""
    if b > MOST_QUERIES:
        raise ValueError(
            f"expected at most {MOST_QUERIES:,} queries in a call on a GPU, got {b:,}: split the"
            " batch"
        )


def checked(x: Tensor, rows: Tensor) -> Tensor:
    """x, contiguous; ValueError unless the two fit."""
    check_fit(x, rows)
    if x.device != rows.device:
        raise ValueError(f"x and rows must be on one device, not {x.device} and {rows.device}")
    check_stride(rows)
    check_queries(x.shape[0])
    return x.detach().contiguous()


def numbers(scale: float, shift: float, device: torch.device) -> Tensor:
    """[2] float64: a kernel's own numbers are float32, and these are the rows' unit. Filled in on
    the device, since a copy would wait for it, and anew each time: what is kept between calls would
    belong to the memory of the CUDA graph that was captured first."""
    out = torch.empty(2, dtype=_F64, device=device)
    out[0].fill_(scale)
    out[1].fill_(shift)
    return out


class Centred(NamedTuple):
    """The rows about their centre, as the kernels compute them: scale (raw + offset).

    center [D], sq_norms [N] float64; offset [D], half_sq [N] float32; reach, pad: the largest |yc|
    and the length of what is added to every raw row, float64 scalars on the device.
    """

    center: Tensor
    sq_norms: Tensor
    offset: Tensor
    half_sq: Tensor
    reach: Tensor
    pad: Tensor


def center_of(
    rows: Tensor, center: Tensor | None, sq_norms: Tensor | None, scale: float, shift: float
) -> tuple[Tensor, Tensor]:
    """center [D] and |y - center|^2 [N] float64: what the rows' owner has cached, else from a pass
    over the rows."""
    check_rows(rows, center, sq_norms)
    center, sq_norms = wide(center), wide(sq_norms)
    if center is None or sq_norms is None:
        from memokern.backends.triton.posterior.finish import row_norms

        # The mean of a few rows centres well enough, and any center is right.
        step = max(1, rows.shape[0] // 64)
        center = rows[: 64 * step : step].to(_F64).mean(0) * scale + shift
        sq_norms = row_norms(rows, center, numbers(scale, shift, rows.device))
    return center, sq_norms


def centred(
    rows: Tensor, center: Tensor | None, sq_norms: Tensor | None, scale: float, shift: float
) -> Centred:
    """From what :func:`center_of` gives."""
    center, sq_norms = center_of(rows, center, sq_norms, scale, shift)
    moved = shift - center
    return Centred(
        center, sq_norms, (moved / scale).to(_F32), (0.5 * sq_norms).to(_F32),
        sq_norms.max().sqrt(), moved.square().sum().sqrt(),
    )  # fmt: skip


def multiprocessors(device: torch.device) -> int:
    """Of the device; where there is none, as many as an H100 has."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

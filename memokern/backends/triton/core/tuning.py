"""Configurations to choose from where a kernel's speed cannot be foreseen. The default is always
taken, unless MEMOKERN_AUTOTUNE=1 asks for whichever is fastest on this device, which is measured
once and remembered.

What a tile holds is no choice: the planner and the registers decide it. What cannot be foreseen
without the device is how far to load ahead. So choices differ in stages alone, and the grid, the
work space and what is computed stay the same.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from memokern.backends.triton.core.variant import Variant
from memokern.util import env, writing
from memokern.util.torch_internals import capturing


def choices(variant: Variant) -> tuple[Variant, ...]:
    """The configurations of a kernel, the default first. Each compiles without a spill."""
    kernel = variant.name.split()[0]
    if kernel not in ("sweep", "dot_products", "accumulate"):
        return (variant,)  # the others take little of the time
    if variant.num_stages == 1 or not variant.matrix or not variant.aligned:
        return (variant,)  # nothing can be loaded ahead, or it waits for arithmetic anyway
    if kernel == "sweep" and variant.constexprs["BLOCK_B"] > 16 and not _holds_terms(variant):
        return (variant,)  # its registers are full: another depth spills some
    many = variant.constexprs["BLOCK_B"] > 16
    if kernel == "dot_products" and many and variant.signature["rows"] == "*fp32":
        return (variant,)  # full too, with Triton 3.8
    # Loading far ahead hides the time that memory takes. A stage less leaves shared memory to other
    # blocks, which hide it too. More stages than the default would exceed an A100's shared memory.
    stages = variant.num_stages - 1
    other = variant._replace(
        name=f"{variant.name} S{stages}", num_stages=stages, registers=variant.registers or 255
    )
    return variant, other


def _holds_terms(variant: Variant) -> bool:
    """Whether the sweep holds its queries' terms in registers."""
    return bool(variant.constexprs["BLOCK_K"] == variant.constexprs["BLOCK_D"])


def launch(
    variant: Variant, grid: tuple[int, ...], device: torch.device, changes: tuple[str, ...] = (),
    **args: Any,
) -> None:  # fmt: skip
    """Launch the choice for this kernel. changes: the arguments that a launch both reads and
    writes; measuring changes copies of them instead."""
    if env.autotune() and 0 not in grid and variant.fits(args):
        variant = _chosen(variant, grid, device, changes, args)
    variant.launch(grid, device, **args)


def _chosen(
    variant: Variant, grid: tuple[int, ...], device: torch.device, changes: tuple[str, ...],
    args: dict[str, Any],
) -> Variant:  # fmt: skip
    options = {v.name: v for v in choices(variant)}
    if len(options) == 1 or not has_clock(device):
        return variant
    key = f"{device_name(device)}, Triton {triton.__version__}, {variant.name}"
    known = remembered(cache_file())
    if known.get(key) not in options:
        if _captures(device):
            return variant
        trial = {**args, **{name: args[name].clone() for name in changes}}
        times = {}
        for name, option in options.items():
            # A device may have less shared memory than those that kernels were compiled for.
            with contextlib.suppress(OutOfResources):
                times[name] = timer(functools.partial(option.launch, grid, device, **trial), device)
        if not times:
            return variant  # whose launch will say what is missing
        known[key] = min(times, key=lambda name: times[name])
        keep(cache_file(), key, known[key])
    return options[known[key]]


def has_clock(device: torch.device) -> bool:
    """Whether kernels can be timed, which they cannot where they are interpreted."""
    return device.type == "cuda"


def _captures(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the device, in which nothing can be measured."""
    with torch.cuda.device(device):
        return capturing(device)


def device_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device))


def timer(call: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of a call on the device's current stream: the fastest of a few rounds, each of
    calls enough to outlast what it costs to make them."""
    call()  # compiles
    rounds = []
    with torch.cuda.device(device):
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(8):
                call()
            end.record()
            end.synchronize()
            rounds.append(start.elapsed_time(end) / 8)
    return min(rounds)


# --- what is remembered --------------------------------------------------------------------------


def cache_file() -> Path:
    """The file in the user's cache folder: a JSON object of strings."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "memokern" / "triton-tuning.json"


def read(path: Path) -> dict[str, str]:
    """What the file says; nothing where it is missing or says something else, with a warning."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
        return found
    warnings.warn(f"{path} is not a table of Triton configurations: it is made anew", stacklevel=2)
    return {}


@functools.cache
def remembered(path: Path) -> dict[str, str]:
    """Choices by key; the file is read once in a process."""
    return read(path)


def keep(path: Path, key: str, choice: str) -> None:
    """Add to the file as it is now, since another process may have written meanwhile. Where it
    cannot be written, the choice lasts as long as the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when it was first read
            known = read(path)
        writing.write_json(path, {**known, key: choice})
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be written: {error}", stacklevel=2)

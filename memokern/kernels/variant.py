"""What a kernel is compiled with: launchers launch variants, and tests compile every one of them.

A module of kernels makes its variants in one function, which its launcher calls, and lists all that
the launcher can ask for in ``variants()``. What is compiled ahead of time, the table of resources
and the predictions of time all walk these lists, so none of them can forget a kernel.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch

# As Triton's signatures name them; [0] of a name is that of a pointer to it.
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# What the kernels read rows from; float64 rows go through the reference.
DESCRIBED = ("sm_90", "sm_100")  # targets that read through tensor descriptors
FLOAT_ROWS = (torch.float32, torch.bfloat16, torch.float16)  # which can have a gradient
ROW_TYPES = (*FLOAT_ROWS, torch.uint8)


class Variant(NamedTuple):
    """A kernel, with all that its machine code depends on.

    name: unique among all variants. signature: the Triton type of every argument that is not in
    constexprs, by name. aligned: the arguments that are divisible by 16 (pointers: their address),
    which Triton's launcher finds out by itself. matrix: whether its products must be on the tensor
    cores. registers: how many a thread may use on NVIDIA, where the assembler, left alone, would
    rather spill a few bytes than pass its next step of occupancy. targets: the only ones that it is
    launched on, of those it is compiled for ahead of time; empty: all.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    matrix: bool = False
    registers: int | None = None
    targets: tuple[str, ...] = ()

    def launch(self, grid: tuple[int, ...], device: torch.device, **args: Any) -> None:
        """Run on the device's current stream; nothing is compiled before the first launch."""
        if 0 in grid:
            return
        # Triton launches on the current device, which need not be the tensors'.
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        vendor = "hip" if torch.version.hip else "cuda"
        with guard:
            self.kernel[grid](**args, **self.on(vendor).constexprs, **self.options(vendor))

    def options(self, vendor: str) -> dict[str, int]:
        """How the compiler is called, for ``"cuda"`` or ``"hip"``."""
        # A multiply and an add as one instruction: the default, which Triton 3.10 changes.
        options = {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip
        if self.registers is not None and vendor == "cuda":
            options["maxnreg"] = self.registers
        return options

    def is_for(self, target: str) -> bool:
        """Whether a launcher can ask for it on that target."""
        return not self.targets or target in self.targets

    def on(self, vendor: str) -> Variant:
        """The variant as ``"cuda"`` or ``"hip"`` takes it: tf32x3 is NVIDIA's, and AMD's matrix
        cores multiply float32."""
        if vendor == "hip" and self.constexprs.get("PRECISION") == "tf32x3":
            return self._replace(constexprs={**self.constexprs, "PRECISION": "ieee"})
        return self


def row_name(dtype: torch.dtype) -> str:
    """``"float32"`` of torch.float32."""
    return str(dtype).removeprefix("torch.")

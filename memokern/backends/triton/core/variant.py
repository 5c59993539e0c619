"""What a kernel is compiled with: launchers launch variants, and tests compile every one of them.

A module of kernels makes its variants in one function, which its launcher calls, and lists all that
the launcher can ask for in ``variants()``. What is compiled ahead of time, the table of resources
and the predictions of time all walk these lists, so none of them can forget a kernel.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any, NamedTuple

import torch
import triton

# The names that Triton's signatures have for pointers to these types.
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
DESCRIBED = ("sm_90", "sm_100")  # the targets that read rows through tensor descriptors
FLOAT_ROWS = (torch.float32, torch.bfloat16, torch.float16)  # the row types that have a gradient
ROW_TYPES = (*FLOAT_ROWS, torch.uint8)


class Variant(NamedTuple):
    """A kernel, with all that its machine code depends on.

    name: unique among all variants. signature: the Triton type of every argument that is not in
    constexprs, by name. aligned: the arguments that are multiples of 16 (of a pointer, its
    address). A launch with an argument that is not is one of the variant `unaligned` instead, which
    loads numbers one by one; of all other arguments the machine code takes nothing for granted.
    unaligned_fields: the fields that differ there, because numbers that pass through registers take
    some. matrix: whether its products must run on the matrix cores. registers: how many a thread
    may use on NVIDIA, where the assembler, left alone, would rather spill a few bytes than pass its
    next step of occupancy. targets: the only ones that it is launched on, of those that it is
    compiled for ahead of time; empty: all of them.
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
    unaligned_fields: dict[str, Any] | None = None

    def launch(self, grid: tuple[int, ...], device: torch.device, **args: Any) -> None:
        """Run on the device's current stream; nothing is compiled before the first launch."""
        if 0 in grid:
            return
        variant = self if self.fits(args) else self.unaligned()
        # Triton launches on the current device, which may be another one than the tensors'.
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        vendor = "hip" if torch.version.hip else "cuda"
        with guard:
            kernel = _specialised(variant)
            kernel[grid](**args, **variant.on(vendor).constexprs, **variant.options(vendor))

    def fits(self, args: dict[str, Any]) -> bool:
        """Whether the arguments are aligned as the variant says."""
        return all(_is_aligned(args[name]) for name in self.aligned)

    def unaligned(self) -> Variant:
        """The variant for arguments of any alignment."""
        if not self.aligned:
            return self
        name = f"{self.name} unaligned"
        changed = self.unaligned_fields or {}
        return self._replace(name=name, aligned=(), unaligned_fields=None, **changed)

    def options(self, vendor: str) -> dict[str, int]:
        """How the compiler is called, for ``"cuda"`` or ``"hip"``."""
        # Triton 3.6 cannot compile four stages of bytes for AMD.
        stages = min(self.num_stages, 3) if vendor == "hip" else self.num_stages
        # A multiply and an add become one instruction: the default, which Triton 3.10 changes.
        options = {"num_warps": self.num_warps, "num_stages": stages, "enable_fp_fusion": True}
        if self.registers is not None and vendor == "cuda":
            options["maxnreg"] = self.registers
        return options

    def is_for(self, target: str) -> bool:
        """Whether a launcher can ask for it on that target."""
        return not self.targets or target in self.targets

    def on(self, vendor: str) -> Variant:
        """The variant as ``"cuda"`` or ``"hip"`` takes it: only NVIDIA has tf32x3, and AMD's matrix
        cores multiply float32."""
        if vendor == "hip" and self.constexprs.get("PRECISION") == "tf32x3":
            return self._replace(constexprs={**self.constexprs, "PRECISION": "ieee"})
        return self


def _is_aligned(value: Any) -> bool:
    if isinstance(value, int):
        return value % 16 == 0
    return bool(value.data_ptr() % 16 == 0)


# Kernels, by what Triton takes for granted of their arguments.
_KERNELS: dict[tuple[str, tuple[str, ...]], Any] = {}


def _specialised(variant: Variant) -> Any:
    """The kernel, made to know of its arguments what the variant says and nothing else: left alone,
    Triton compiles anew for each alignment, for an integer that is 1, and for 64-bit numbers that
    happen to be small, and then nothing that was compiled ahead of time is what runs."""
    if not isinstance(variant.kernel, triton.JITFunction):
        return variant.kernel  # interpreted
    key = (variant.name, variant.aligned)
    if key not in _KERNELS:
        plain = variant.kernel.fn
        fn = types.FunctionType(plain.__code__, plain.__globals__, plain.__name__)
        integers = {n: kind for n, kind in variant.signature.items() if kind in ("i32", "i64")}
        fn.__annotations__ = {**plain.__annotations__, **integers}
        other = [name for name in variant.signature if name not in variant.aligned]
        _KERNELS[key] = triton.jit(
            fn, do_not_specialize=[name for name in other if name in integers],
            do_not_specialize_on_alignment=other,
        )  # fmt: skip
    return _KERNELS[key]


def row_name(dtype: torch.dtype) -> str:
    """``"float32"`` of torch.float32."""
    return str(dtype).removeprefix("torch.")

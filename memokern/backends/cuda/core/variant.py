"""A program with all that its machine code depends on: launchers launch variants, and the checks
compile every one of them."""

from __future__ import annotations

from typing import NamedTuple

import torch

# The rows' types, and the codes that csrc/cuda/common/abi.h has for them.
ROW_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}


class Variant(NamedTuple):
    """A program and its macros.

    program: its file below :func:`sources.folder`. entries: the kernels in it. macros: (name,
    value), in the order in which they are given. threads: those of a block. cluster: the blocks of
    a cluster. matrix: the first words of the instructions that its machine code must have. targets:
    the only architectures that it is for; empty: all.
    """

    program: str
    entries: tuple[str, ...]
    macros: tuple[tuple[str, int], ...] = ()
    threads: int = 256
    cluster: int = 1
    matrix: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique among all variants.

        >>> Variant("sweep/finish.cu", ("f",), (("MK_QUERIES", 16),)).name
        'finish queries=16'
        """
        stem = self.program.rsplit("/", 1)[-1].removesuffix(".cu")
        return " ".join([stem, *(f"{n.removeprefix('MK_').lower()}={v}" for n, v in self.macros)])

    def is_for(self, arch: str) -> bool:
        """Whether a launcher can ask for it on that architecture."""
        return not self.targets or arch in self.targets

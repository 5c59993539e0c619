"""The Triton kernels: NVIDIA's and AMD's GPUs, and, for tests, Triton's interpreter on the CPU.

Nothing of Triton is imported before the first call, and nothing compiled before the first launch of
each kernel. No call but bound_scan reads a number back from the device, so that it can be captured
in a CUDA graph, after a first call outside of one.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from memokern.backends.protocol import Backend, Call

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
MOST_NEIGHBOURS = 64
# Kernels keep up to 10 numbers for each query, addressed with 32 bits.
MOST_QUERIES = 1 << 27
_REFERENCE_ONLY = {
    "posterior_double_backward": "second derivatives are taken in plain PyTorch",
    "posterior_listed_double_backward": "second derivatives are taken in plain PyTorch",
    "posterior_state": "not written yet",
}


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; Triton itself decides when it is imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class Triton(Backend):
    """Tensors on a GPU."""

    name = "triton"

    @functools.cache  # noqa: B019  # there is one
    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'memokern[triton]' on Linux"
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        if torch.cuda.is_available() or interpreted():
            return None
        return "PyTorch sees no GPU"

    def refuses(self, operation: str, call: Call) -> str | None:
        if call.device != ("cpu" if interpreted() else "cuda"):
            where = "CPU, by Triton's interpreter" if interpreted() else "GPU"
            return f"it runs tensors on the {where}, and these are on {call.device}"
        if call.transform:
            return "it has no torch.func transforms and no forward mode"
        if torch.float64 in (call.x, call.rows):
            return "it has no kernel for float64"
        if call.k > MOST_NEIGHBOURS:
            return f"it finds at most {MOST_NEIGHBOURS} neighbours, and {call.k} are asked for"
        return _REFERENCE_ONLY.get(operation)

    def detail(self) -> str:
        import triton

        where = "interpreted on the CPU" if interpreted() else torch.cuda.get_device_name()
        rest = f"float64, and more than {MOST_NEIGHBOURS} neighbours, go to the reference"
        return f"Triton {triton.__version__}, {where}; {rest}"


BACKEND = Triton()

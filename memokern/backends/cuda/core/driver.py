"""Loading machine code and launching it, through the driver's own interface.

A launch goes to the tensors' device and PyTorch's current stream there, waits for nothing, and can
be captured in a CUDA graph once its kernel is loaded. The driver is asked through
:mod:`cuda.bindings`, because :func:`cuda.core.launch` takes no structs, which every kernel here has
as its only argument.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from memokern.backends.cuda.core import cache
from memokern.backends.cuda.core.variant import Variant
from memokern.util.torch_internals import capturing

PORTABLE_CLUSTER = 8  # blocks of a cluster that every device with clusters has room for


class DriverError(RuntimeError):
    """A call of the driver failed; code: its name there."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@functools.cache
def api() -> Any:
    """The driver's functions and types, as :mod:`cuda.bindings.driver` has them."""
    from cuda.bindings import driver

    return driver


def call(name: str, *args: Any) -> Any:
    """What a function of the driver returns besides its status; DriverError where that is an
    error."""
    cu = api()
    status, *found = getattr(cu, name)(*args)
    if status != cu.CUresult.CUDA_SUCCESS:
        _, text = cu.cuGetErrorString(status)
        said = text.decode() if isinstance(text, bytes) else str(text)
        raise DriverError(str(status.name), f"the CUDA driver's {name} failed: {said}")
    return found[0] if len(found) == 1 else tuple(found)


def version() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows, (13, 0), or None where there is no driver."""
    try:
        found = int(call("cuDriverGetVersion"))
    except Exception:  # the loader of shared libraries has exceptions of its own
        return None
    return found // 1000, found % 1000 // 10


class Kernel(NamedTuple):
    """A kernel whose code is loaded; it runs on every device of its architecture."""

    variant: Variant
    entry: str
    arch: str
    handle: int  # a CUkernel


_LOCK = threading.Lock()
_LIBRARIES: dict[tuple[Variant, str], Any] = {}
_KERNELS: dict[tuple[Variant, str, str], Kernel] = {}
_PREPARED: dict[tuple[int, int], int] = {}  # shared memory allowed, by kernel and device


def kernel(variant: Variant, entry: str, arch: str, device: torch.device) -> Kernel:
    """The kernel of that name; its program is compiled or read from the cache at first use.

    Raises RuntimeError where it is not loaded yet and a CUDA graph is being captured.
    """
    found = _KERNELS.get((variant, entry, arch))
    if found is not None:
        return found
    if capturing(device):
        raise RuntimeError(
            "a CUDA kernel cannot be loaded while a CUDA graph is captured: make the same call once"
            " before the capture"
        )
    with _LOCK, on(device):
        library = _LIBRARIES.get((variant, arch))
        if library is None:
            code = cache.machine_code(variant, arch)
            library = call("cuLibraryLoadData", code, [], [], 0, [], [], 0)
            _LIBRARIES[(variant, arch)] = library
        handle = int(call("cuLibraryGetKernel", library, entry.encode()))
        found = Kernel(variant, entry, arch, handle)
        _KERNELS[(variant, entry, arch)] = found
    return found


def forget() -> None:
    """Nothing is loaded any more, as in a new process."""
    with _LOCK:
        for known in (_LIBRARIES, _KERNELS, _PREPARED):
            known.clear()
    api.cache_clear()
    active_clusters.cache_clear()


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """The device is the current one, and this thread has its context, which a thread that PyTorch
    has not used yet lacks."""
    if device.type != "cuda":  # in tests, where nothing runs
        yield
        return
    with torch.cuda.device(device):
        if int(call("cuCtxGetCurrent")) == 0:
            context = call("cuDevicePrimaryCtxRetain", _index(device))
            call("cuCtxSetCurrent", context)
        yield


def _index(device: torch.device) -> int:
    return int(device.index or 0) if device.type == "cuda" else 0


def stream_of(device: torch.device) -> int:
    """PyTorch's current stream on the device."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def prepare(found: Kernel, shared: int, device: torch.device) -> None:
    """Let the kernel use that much shared memory on the device, and clusters of any size."""
    key = (found.handle, _index(device))
    if _PREPARED.get(key, -1) >= shared:
        return
    attribute = api().CUfunction_attribute
    of_kernel = api().CUkernel(found.handle)
    wanted = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    call("cuKernelSetAttribute", wanted, shared, of_kernel, _index(device))
    if found.variant.cluster > PORTABLE_CLUSTER:
        wanted = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        call("cuKernelSetAttribute", wanted, 1, of_kernel, _index(device))
    _PREPARED[key] = shared


@functools.cache
def active_clusters(found: Kernel, shared: int, device: torch.device) -> int:
    """How many clusters of the kernel run at a time; 0 where the device has no room for one."""
    cu, size = api(), found.variant.cluster
    with on(device):
        prepare(found, shared, device)
        config, attribute = cu.CUlaunchConfig(), cu.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = size, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = found.variant.threads, 1, 1
        config.sharedMemBytes = shared
        attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        value = attribute.value
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = size, 1, 1
        attribute.value = value
        config.attrs, config.numAttrs = [attribute], 1
        try:
            return int(call("cuOccupancyMaxActiveClusters", cu.CUfunction(found.handle), config))
        except DriverError as error:
            if error.code in ("CUDA_ERROR_INVALID_CLUSTER_SIZE", "CUDA_ERROR_INVALID_VALUE"):
                return 0
            raise


def launch(
    found: Kernel, grid: tuple[int, int], shared: int, argument: ctypes.Structure,
    device: torch.device,
) -> None:  # fmt: skip
    """Run the kernel on the device's current stream. grid: blocks, in two dimensions, a multiple of
    the cluster in the first. argument: what the kernel takes, by value."""
    cu, threads = api(), found.variant.threads
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    with on(device):
        prepare(found, shared, device)
        call(
            "cuLaunchKernel", cu.CUfunction(found.handle), grid[0], grid[1], 1, threads, 1, 1,
            shared, stream_of(device), ctypes.addressof(pointers), 0,
        )  # fmt: skip

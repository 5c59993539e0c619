"""A driver that is not there: it has the functions of cuda.bindings.driver that memokern calls, and
writes down what it is asked. Machine code is whatever the tests say it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from memokern.backends.cuda import abi
from memokern.backends.cuda.core import cache, compiler, driver, machine
from memokern.backends.cuda.core.variant import Variant

STREAMS = {0: 1000, 1: 1001}
H100 = machine.Machine("sm_90a", 132, 227 << 10, 50 << 20)
ARGUMENTS = {
    "memokern_queries": abi.QueriesParams,
    "memokern_sweep": abi.SweepParams,
    "memokern_finish_state": abi.FinishParams,
    "memokern_finish_sums": abi.FinishParams,
    "memokern_sq_norms": abi.NormsParams,
    **dict.fromkeys(
        (
            "memokern_gradient",
            "memokern_gradient_terms",
            "memokern_gradient_ties",
            "memokern_gradient_bias",
            "memokern_gradient_finish",
        ),
        abi.GradientParams,
    ),
    **dict.fromkeys(
        (
            "memokern_scan_begin",
            "memokern_scan_bounds",
            "memokern_scan_settle_first",
            "memokern_scan_settle_next",
            "memokern_scan_count",
            "memokern_scan_list",
            "memokern_scan_refine",
            "memokern_scan_end",
            "memokern_scan_gather",
        ),
        abi.ScanParams,
    ),
    **dict.fromkeys(
        (
            "memokern_listed_pairs",
            "memokern_listed_weights",
            "memokern_listed_factors",
            "memokern_listed_sum",
            "memokern_listed_finish",
        ),
        abi.ListedParams,
    ),
    **dict.fromkeys(
        (
            "memokern_nearest_about",
            "memokern_nearest_bound",
            "memokern_nearest_exact",
            "memokern_nearest_join",
        ),
        abi.NearestParams,
    ),
    **dict.fromkeys(
        ("memokern_plane_sweep", "memokern_plane_state", "memokern_plane_sums"), abi.PlaneParams
    ),
}


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CLUSTER_SIZE = 912


class CUfunction_attribute(enum.IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
    CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14


class CUlaunchAttributeID(enum.IntEnum):
    CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4


class Launch(NamedTuple):
    """What reached the driver. argument: a copy of the struct that the kernel takes."""

    variant: Variant | None
    entry: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    device: int
    argument: Any


class Handle(int):
    """CUkernel and CUfunction, which are the same number."""


class Driver:
    """Two devices. launches: what was launched; calls: the names of all functions, in order;
    prepared: attributes of kernels, by (attribute, entry, device)."""

    CUresult, CUfunction_attribute = CUresult, CUfunction_attribute
    CUlaunchAttributeID = CUlaunchAttributeID
    CUkernel = CUfunction = Handle

    def __init__(self, largest_cluster: int = 16) -> None:
        self.largest_cluster, self.device, self.context = largest_cluster, 0, 1
        self.launches: list[Launch] = []
        self.calls: list[str] = []
        self.prepared: dict[tuple[str, str, int], int] = {}
        self.loaded: list[bytes] = []
        self.entries: dict[int, str] = {}
        self.fails: dict[str, CUresult] = {}
        self.variants: dict[bytes, Variant] = {}  # by their machine code
        self.run: Callable[[Launch], None] | None = None

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found

        def asked(*args: Any) -> Any:
            self.calls.append(name)
            return (self.fails[name],) if name in self.fails else found(*args)

        return asked

    @staticmethod
    def CUlaunchConfig() -> Any:
        return types.SimpleNamespace()

    @staticmethod
    def CUlaunchAttribute() -> Any:
        return types.SimpleNamespace(
            value=types.SimpleNamespace(clusterDim=types.SimpleNamespace())
        )

    def cuGetErrorString(self, status: CUresult) -> tuple[CUresult, bytes]:
        return CUresult.CUDA_SUCCESS, CUresult(status).name.lower().encode()

    def cuDriverGetVersion(self) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, 13020

    def cuCtxGetCurrent(self) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, self.context

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, 100 + device

    def cuCtxSetCurrent(self, context: int) -> tuple[CUresult]:
        self.context = context
        return (CUresult.CUDA_SUCCESS,)

    def cuLibraryLoadData(self, code: bytes, *_: Any) -> tuple[CUresult, int]:
        self.loaded.append(code)
        return CUresult.CUDA_SUCCESS, len(self.loaded)

    def cuLibraryGetKernel(self, library: int, name: bytes) -> tuple[CUresult, int]:
        handle = 1000 * library + len(self.entries)
        self.entries[handle] = name.decode()
        return CUresult.CUDA_SUCCESS, handle

    def cuKernelSetAttribute(
        self, attribute: CUfunction_attribute, value: int, kernel: int, device: int
    ) -> tuple[CUresult]:
        name = CUfunction_attribute(attribute).name
        self.prepared[name, self.entries[kernel], device] = value
        return (CUresult.CUDA_SUCCESS,)

    def cuOccupancyMaxActiveClusters(self, kernel: int, config: Any) -> tuple[CUresult, int]:
        cluster = config.attrs[0].value.clusterDim.x
        assert config.gridDimX % cluster == 0 and config.numAttrs == 1
        if cluster > self.largest_cluster:
            return CUresult.CUDA_ERROR_INVALID_CLUSTER_SIZE, 0
        resident = re.search(rb"resident=(\d)", self.loaded[kernel // 1000 - 1])
        assert resident is not None
        return CUresult.CUDA_SUCCESS, H100.multiprocessors * int(resident[1]) // cluster

    def cuLaunchKernel(self, kernel: int, *args: Any) -> tuple[CUresult]:
        x, y, z, threads, ty, tz, shared, stream, arguments, extra = args
        assert (z, ty, tz, extra) == (1, 1, 1, 0)
        entry = self.entries[kernel]
        kind = ARGUMENTS[entry]
        pointer = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        argument = kind.from_buffer_copy(ctypes.string_at(pointer, ctypes.sizeof(kind)))
        variant = self.variants.get(self.loaded[kernel // 1000 - 1])
        launch = Launch(variant, entry, (x, y), threads, shared, stream, self.device, argument)
        self.launches.append(launch)
        if self.run is not None:
            self.run(launch)
        return (CUresult.CUDA_SUCCESS,)

    @contextlib.contextmanager
    def guard(self, device: torch.device) -> Iterator[None]:
        """In place of torch.cuda.device."""
        before, self.device = self.device, device.index or 0
        try:
            yield
        finally:
            self.device = before


@contextlib.contextmanager
def installed(largest_cluster: int = 16, folder: Any = None) -> Iterator[Driver]:
    """The driver in place of the real one, an H100 in place of every device, and a compiler whose
    machine code is the variant's name."""
    fake = Driver(largest_cluster)

    def named(variant: Variant, arch: str) -> compiler.Compiled:
        code = f"{variant.name} {arch}".encode()
        fake.variants[code] = variant
        return compiler.Compiled(code, "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "api", _cached(fake))
        patch.setattr(machine, "of", lambda device: H100)
        patch.setattr(torch.cuda, "device", fake.guard)
        patch.setattr(
            torch.cuda, "current_stream",
            lambda device: types.SimpleNamespace(cuda_stream=STREAMS[device.index or 0]),
        )  # fmt: skip
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 of a test")
        if folder is None:
            patch.setattr(cache, "machine_code", lambda variant, arch: named(variant, arch).code)
        else:
            patch.setenv("MEMOKERN_CUDA_CACHE", str(folder))
            patch.setattr(compiler, "version", lambda: "13.0")
            patch.setattr(compiler, "compile_variant", named)
        driver.forget()
        try:
            yield fake
        finally:
            driver.forget()


def _cached(fake: Driver) -> Any:
    """Called as the function that it stands for, which remembers."""
    found = lambda: fake  # noqa: E731
    found.cache_clear = lambda: None  # type: ignore[attr-defined]
    return found

"""The launches of the dense sweep: three for each block of queries, on one stream.

The first splits the queries into terms and makes their table. The second sweeps: each cluster goes
through its share of the tiles of rows and leaves a part. The third joins the parts.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memokern.backends.cuda import abi
from memokern.backends.cuda.core import driver, machine
from memokern.backends.cuda.core.machine import Machine
from memokern.backends.cuda.core.variant import ROW_CODES, Variant
from memokern.backends.cuda.posterior import planner, variants
from memokern.backends.cuda.posterior.tiles import Tile, shared_bytes, terms_of
from memokern.calls import Query, Rows, State, Sums
from memokern.calls.checks import check_fit, check_rows, contiguous64, name_of, prepared
from memokern.calls.stored import sample_center, sharp

_F32, _F64 = torch.float32, torch.float64


def posterior(query: Query, rows: Rows) -> Sums:
    """The dense sweep, normalised."""
    call = _Call(query, rows)
    b, d = call.query.x.shape
    columns = [call.new(b, dtype=_F64) for _ in range(4)]
    # Apart: results of an operation may not share memory.
    out = Sums._make([call.new(b, d), *columns, call.new(b, d)])
    call.sweep("memokern_finish_sums", out._asdict())
    return out


def posterior_state(query: Query, rows: Rows) -> State:
    """The dense sweep, not normalised."""
    call = _Call(query, rows)
    b, d = call.query.x.shape
    columns = [call.new(b, dtype=_F64) for _ in range(6)]
    out = State._make([*columns, call.new(b, d), call.new(b, d), call.center])
    fields = {name: value for name, value in out._asdict().items() if name not in ("acc", "center")}
    call.sweep("memokern_finish_state", {**fields, "sum": out.acc})
    return out


class _Plan(NamedTuple):
    """A tile, and how many clusters sweep at a time."""

    tile: Tile
    sweep: driver.Kernel
    clusters: int


class _Call:
    """The queries and rows of a call as the kernels take them."""

    def __init__(self, query: Query, rows: Rows) -> None:
        check_fit(query.x, rows.data)
        check_rows(rows)
        if query.x.dtype != _F32 or rows.data.dtype not in ROW_CODES:
            known = ", ".join(name_of(t) for t in ROW_CODES)
            raise TypeError(
                f"the CUDA kernels take float32 queries and rows of {known}, not"
                f" {name_of(query.x.dtype)} and {name_of(rows.data.dtype)}"
            )
        self.query, self.rows = prepared(query, rows), sharp(rows)
        self.device, data = query.x.device, self.rows.data
        self.machine: Machine = machine.of(self.device)
        self.stride = data.stride(0) if data.shape[0] > 1 else data.shape[1]
        if self.rows.center is not None and self.rows.sq_norms is not None:
            self.center = contiguous64(self.rows.center)
            self.sq_norms = contiguous64(self.rows.sq_norms)
        else:
            self.center = sample_center(self.rows)
            self.sq_norms = self._norms()

    def new(self, *shape: int, dtype: torch.dtype = _F32) -> Tensor:
        """Memory on the device, of PyTorch's allocator."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _launch(
        self, variant: Variant, entry: str, grid: tuple[int, int], argument: ctypes.Structure,
        shared: int = 0,
    ) -> None:  # fmt: skip
        found = driver.kernel(variant, entry, self.machine.arch, self.device)
        driver.launch(found, grid, shared, argument, self.device)

    def _norms(self) -> Tensor:
        """|y - center|^2 [N] float64."""
        rows, out = self.rows, self.new(self.rows.n, dtype=_F64)
        argument = abi.filled(
            abi.NormsParams, rows=rows.data, center=self.center, sq_norms=out, scale=rows.scale,
            shift=rows.shift, n=rows.n, d=rows.dim, stride=self.stride,
        )  # fmt: skip
        variant = variants.norms_variant(rows.data.dtype)
        self._launch(
            variant, variant.entries[0], (-(-rows.n // variants.ROWS_OF_NORMS), 1), argument
        )
        return out

    def _bulk(self) -> bool:
        """Whether the copy engine takes the rows, which wants multiples of 16 bytes."""
        data, size = self.rows.data, self.rows.data.element_size()
        return not (data.data_ptr() % 16 or self.stride * size % 16 or self.rows.dim * size % 16)

    def _planned(self) -> _Plan:
        """The tile that the planner asks for, or the next where the device has no room for a
        cluster of 16."""
        kind, n, d = self.rows.data.dtype, self.rows.n, self.rows.dim
        log, bulk = self.query.weighting == "log", self._bulk()
        for most in (planner.MOST_CLUSTER, driver.PORTABLE_CLUSTER):
            b, rare = len(self.query.x), variants.is_rare(bulk, log)
            tile = planner.plan(b, n, d, kind, self.machine, most, rare)
            if tile is None:
                continue
            variant = variants.sweep_variant(kind, tile, bulk, log)
            found = driver.kernel(variant, variant.entries[0], self.machine.arch, self.device)
            room = driver.active_clusters(found, shared_bytes(kind, tile), self.device)
            if room > 0:
                return _Plan(tile, found, min(room, -(-n // tile.rows)))
        raise RuntimeError(
            f"{torch.cuda.get_device_name(self.device)} has no room for a cluster that holds rows"
            f" of {d:,} features now; MEMOKERN_BACKEND=triton sweeps without clusters"
        )

    def sweep(self, entry: str, out: dict[str, Tensor]) -> None:
        """All blocks of queries, into arrays of all queries by their names in FinishParams."""
        query, rows = self.query, self.rows
        b, d = query.x.shape
        if b == 0:
            return
        kind, plan = rows.data.dtype, self._planned()
        tile, clusters = plan.tile, plan.clusters
        q, dp = tile.queries, tile.cluster * tile.features
        terms = self.new(terms_of(kind) * q * dp, dtype=torch.int16)
        table = self.new(abi.TABLE_ROWS * q, dtype=_F64)
        states = self.new(clusters * abi.STATE_ROWS * q, dtype=_F64)
        acc, near = self.new(clusters * q * dp), self.new(clusters * q * dp)
        split, join = variants.queries_variant(kind), variants.finish_variant()
        # The value of a row that enters products as 0.
        zero = rows.shift + (128.0 * rows.scale if kind == torch.uint8 else 0.0)
        for b0 in range(0, b, q):
            part = slice(b0, min(b0 + q, b))
            some = query.take(part)
            each: dict[str, Any] = {
                "x": some.x, "sigma": some.sigma, "alpha": some.alpha, "table": table,
                "scale": rows.scale, "b": len(some.x), "d": d,
            }  # fmt: skip
            asked = abi.filled(
                abi.QueriesParams, **each, shift=rows.shift, temperature=some.temperature,
                center=self.center, terms=terms, dp=dp, queries=q, depth=tile.features,
                log=int(query.weighting == "log"),
            )  # fmt: skip
            swept = abi.filled(
                abi.SweepParams, **each, shift=rows.shift, rows=rows.data, sq_norms=self.sq_norms,
                bias=query.bias, terms=terms, states=states, acc=acc, near=near, n=rows.n,
                stride=self.stride,
            )  # fmt: skip
            joined = abi.filled(
                abi.FinishParams, **each, **{name: v[part] for name, v in out.items()}, zero=zero,
                states=states, acc=acc, near=near, temperature=some.temperature,
                center=self.center, dp=dp, parts=clusters, queries=q,
                log_threshold=float("-inf"),
            )  # fmt: skip
            self._launch(split, split.entries[0], (q, 1), asked, variants.SHARED_OF_QUERIES)
            blocks = (clusters * tile.cluster, 1)
            driver.launch(plan.sweep, blocks, shared_bytes(kind, tile), swept, self.device)
            self._launch(join, entry, (len(some.x), -(-d // variants.FINISH_FEATURES)), joined)

"""What the launches of a sweep have in common, forward and backward: the queries and rows as
kernels take them, memory, and the plan."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memokern.backends.cuda import abi
from memokern.backends.cuda.core import driver
from memokern.backends.cuda.core.call import DeviceCall, check_types, stride_of
from memokern.backends.cuda.posterior import planner, variants
from memokern.backends.cuda.posterior.tiles import Tile, shared_bytes, terms_of
from memokern.calls import Query, Rows
from memokern.calls.checks import check_fit, contiguous64, prepared
from memokern.calls.stored import lost_with_a_row, sample_center, sharp

_F32, _F64 = torch.float32, torch.float64


class Plan(NamedTuple):
    """A tile, and how many clusters sweep at a time."""

    tile: Tile
    sweep: driver.Kernel
    clusters: int


class SweepCall(DeviceCall):
    """The queries and rows of a call as the kernels take them."""

    def __init__(self, query: Query, rows: Rows) -> None:
        check_fit(query.x, rows.data)
        check_types(query.x, rows)
        super().__init__(query.x.device)
        self.query, self.rows = prepared(query, rows), sharp(rows)
        self.stride = stride_of(self.rows.data)
        if self.rows.center is not None and self.rows.sq_norms is not None:
            self.center = contiguous64(self.rows.center)
            self.sq_norms = contiguous64(self.rows.sq_norms)
        else:
            center = sample_center(self.rows)
            self.sq_norms = self._norms(center)
            self.center = lost_with_a_row(center, self.sq_norms)

    def _norms(self, center: Tensor) -> Tensor:
        """|y - center|^2 [N] float64."""
        rows, out = self.rows, self.new(self.rows.n, dtype=_F64)
        argument = abi.filled(
            abi.NormsParams, rows=rows.data, center=center, sq_norms=out, scale=rows.scale,
            shift=rows.shift, n=rows.n, d=rows.dim, stride=self.stride,
        )  # fmt: skip
        variant = variants.norms_variant(rows.data.dtype)
        self.launch(
            variant, variant.entries[0], (-(-rows.n // variants.ROWS_OF_NORMS), 1), argument
        )
        return out

    def _bulk(self) -> bool:
        """Whether the copy engine takes the rows, which wants multiples of 16 bytes."""
        data, size = self.rows.data, self.rows.data.element_size()
        return not (data.data_ptr() % 16 or self.stride * size % 16 or self.rows.dim * size % 16)

    def planned(self, backward: bool = False) -> Plan:
        """The tile that the planner asks for, or the next where the device has no room for a
        cluster of 16."""
        kind, n, d = self.rows.data.dtype, self.rows.n, self.rows.dim
        log, bulk = self.query.weighting == "log", self._bulk()
        for most in (planner.MOST_CLUSTER, driver.PORTABLE_CLUSTER):
            b, rare = len(self.query.x), variants.is_rare(bulk, log)
            tile = planner.plan(b, n, d, kind, self.machine, most, rare, backward)
            if tile is None:
                continue
            variant = variants.sweep_variant(kind, tile, bulk, log)
            found = driver.kernel(variant, variant.entries[0], self.machine.arch, self.device)
            room = driver.active_clusters(found, shared_bytes(kind, tile), self.device)
            if room > 0:
                return Plan(tile, found, min(room, -(-n // tile.rows)))
        raise RuntimeError(
            f"{torch.cuda.get_device_name(self.device)} has no room for a cluster that holds rows"
            f" of {d:,} features now; MEMOKERN_BACKEND=triton sweeps without clusters"
        )

    @property
    def zero(self) -> float:
        """The value of a row that enters products as 0."""
        uint8 = self.rows.data.dtype == torch.uint8
        return self.rows.shift + (128.0 * self.rows.scale if uint8 else 0.0)


class Space(NamedTuple):
    """Memory of a plan, for one block of queries after the other. terms, table: what is known of
    the queries. acc, near: the parts' sums."""

    terms: Tensor
    table: Tensor
    acc: Tensor
    near: Tensor


def space_of(call: SweepCall, plan: Plan) -> Space:
    """The memory, of which nothing is written yet."""
    tile, parts = plan.tile, plan.clusters
    q, dp = tile.queries, tile.cluster * tile.features
    terms = call.new(terms_of(call.rows.data.dtype) * q * dp, dtype=torch.int16)
    table = call.new(abi.TABLE_ROWS * q, dtype=_F64)
    return Space(terms, table, call.new(parts * q * dp), call.new(parts * q * dp))


def split_queries(call: SweepCall, plan: Plan, space: Space, some: Query) -> dict[str, Any]:
    """The first launch of every sweep: the terms of some queries, and their table. Returns the
    fields that the later kernels take as well."""
    tile, rows = plan.tile, call.rows
    split = variants.queries_variant(rows.data.dtype)
    each: dict[str, Any] = {
        "x": some.x, "sigma": some.sigma, "alpha": some.alpha, "table": space.table,
        "scale": rows.scale, "b": len(some.x), "d": rows.dim,
    }  # fmt: skip
    asked = abi.filled(
        abi.QueriesParams, **each, shift=rows.shift, temperature=some.temperature,
        center=call.center, terms=space.terms, dp=tile.cluster * tile.features,
        queries=tile.queries, depth=tile.features, log=int(some.weighting == "log"),
    )  # fmt: skip
    call.launch(split, split.entries[0], (tile.queries, 1), asked, variants.SHARED_OF_QUERIES)
    return each


def sweep(call: SweepCall, plan: Plan, argument: ctypes.Structure) -> None:
    """The launch that reads the rows."""
    tile, kind = plan.tile, call.rows.data.dtype
    blocks = (plan.clusters * tile.cluster, 1)
    driver.launch(plan.sweep, blocks, shared_bytes(kind, tile), argument, call.device)

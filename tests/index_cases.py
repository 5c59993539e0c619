"""An index made plainly, in float64, for the tests of what uses one."""

from typing import NamedTuple

import pytest
import torch

from memokern.backends import protocol as backends
from memokern.util import env

F64 = torch.float64
# Triton's kernels are interpreted here, which takes minutes; their own tests have these cases.
AVAILABLE = [row.name for row in backends.here() if row.runs and row.name != "triton"]


@pytest.fixture(params=AVAILABLE, autouse=True, scope="module")
def backend(request):
    """Every test of a file that imports this runs on each backend that has bounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.BACKEND, request.param)
        yield request.param


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Projected(NamedTuple):
    z: torch.Tensor
    norms: torch.Tensor
    margin: torch.Tensor
    sq: torch.Tensor


def up(value):
    """float32, not below the float64 value."""
    return torch.nextafter((value * (1 + 1e-6)).float(), torch.tensor(torch.inf))


class PlainIndex:
    """An orthonormal basis from the SVD of the rows; K <= D coordinates, bands of a few."""

    def __init__(self, data, dims=(4, 8, 12), storage=torch.float16, basis=None):
        self.center = c = data.center.double()
        yc = data.rows.double() * data.scale + data.shift - c
        d = yc.shape[1]
        self.basis = torch.linalg.svd(yc.T @ yc)[0] if basis is None else basis
        self.dims = tuple(sorted({min(k, d) for k in dims}))
        edges = sorted({*self.dims, min(6, d), min(10, d), d})
        self.edges = [e for e in edges if e >= self.dims[0]]
        self.bands = len(self.edges) - 1
        self.first_band = tuple(self.edges.index(k) for k in self.dims)
        true = yc @ self.basis
        k0, k = self.dims[0], self.dims[-1]
        coarse, self.fine = true[:, :k0].float(), true[:, k0:k].to(storage).contiguous()
        stored = torch.cat([coarse.double(), self.fine.double()], 1)
        pad = (stored - true[:, :k]).norm(dim=1, keepdim=True)
        self.coarse = torch.cat([coarse, up(self.band_norms(true)), up(pad)], 1).contiguous()
        self.y_max = yc.norm(dim=1).max().item() * (1 + 1e-6)
        self.n, self.mean_square = len(yc), yc.square().sum(1).mean().item()

    def band_norms(self, true):
        pairs = zip(self.edges, self.edges[1:], strict=False)
        parts = [true[:, a:b].norm(dim=1, keepdim=True) for a, b in pairs]
        return torch.cat([true[:, :0], *parts], 1)

    def project(self, x, alpha):
        center = self.center
        xc = x.double() - alpha[:, None] * center
        true = xc @ self.basis
        size = xc.norm(dim=1)
        norms = up(torch.cat([self.band_norms(true), size[:, None]], 1))
        # z in float32, level 0 of the rows in float32, products in float32.
        margin = 2.0**-24 * (2 * (self.dims[-1] + self.bands + 16) + 4) * size * self.y_max
        # |xc|^2 and |yc_n|^2 are sums of D rounded squares of differences: the first goes down
        # by a bound on all these errors, whatever the row; the margin by what that takes from it.
        reach = self.y_max + 2 * center.norm()
        off = 2.0**-52 * (x.shape[1] + 32) * (size + alpha.abs() * reach).square()
        low = (size.square() - off).clamp(min=0.0)
        margin = margin + 2.0**-17 * self.y_max * (size - low.sqrt())
        return Projected(true[:, : self.dims[-1]].float(), norms, margin, low)


def with_index(data, **kwargs):
    """The data set, indexed."""
    data._derived.index = PlainIndex(data, **kwargs)
    return data

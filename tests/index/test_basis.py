"""The orthonormal bases of an index."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch

from memokern.index.basis import FULL_EIGEN, Cosine, Principal, cosines, defect, is_image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("n", [1, 2, 3, 32, 255, 1024])
def test_cosines_are_the_orthonormal_dct(n):
    matrix = cosines(n)
    expected = scipy.fft.dct(np.eye(n), type=2, norm="ortho", axis=0)
    # scipy's fast transform rounds too, in log2(n) steps.
    torch.testing.assert_close(matrix, torch.from_numpy(expected), rtol=0, atol=2e-15)
    assert float((matrix @ matrix.T - torch.eye(n)).norm()) < 1e-15 * n


@pytest.mark.parametrize(
    "shape", [(9, 12), (3, 8, 10), (8, 10, 3), (2, 5, 6), (6, 7, 1), (5, 9, 8)]
)
def test_the_cosine_transform_of_images(shape):
    values = torch.randn(20, *shape, dtype=torch.float64)
    flat = values.flatten(1)
    axes = shape if len(shape) == 3 else (1, *shape)
    planes = values.reshape(20, *axes)
    if shape[-1] <= 3 and shape[0] > 4:
        planes = planes.movedim(-1, 1)
    expected = scipy.fft.dctn(planes.numpy(), norm="ortho", axes=(1, 2, 3)).reshape(20, -1)
    order = np.argsort(-np.square(expected).sum(0), kind="stable")
    for size in (flat.shape[1], 17):
        basis = Cosine.fit(flat, shape, size)
        wanted = torch.from_numpy(expected[:, order[:size]].copy())
        torch.testing.assert_close(basis.coordinates(flat), wanted, rtol=0, atol=1e-13)
        # float32 is within the error that is claimed, and what is claimed is not vacuous.
        off = basis.coordinates(flat.float()).double() - basis.coordinates(flat.float().double())
        worst = float((off.norm(dim=1) / flat.norm(dim=1)).max())
        assert worst <= basis.error(torch.float32) <= 300 * worst


def test_colours_cost_few_frequencies():
    """Grey noise under smooth colours: of the second and third channel little is computed."""
    grey = torch.randn(30, 1, 16, 16, dtype=torch.float64).expand(-1, 3, -1, -1)
    tint = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)[:, None, None] * 5
    values = grey + tint * torch.randn(30, 1, 1, 1, dtype=torch.float64)
    basis = Cosine.fit(values.flatten(1), (3, 16, 16), 257)
    assert [part[1].shape[0] for part in basis._parts] == [16, 1]


@pytest.mark.parametrize("dim", [40, 1100])
def test_principal_directions(dim):
    """As much variance as the singular vectors, beyond FULL_EIGEN nearly as much."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(300, dim, generator=g, dtype=torch.float64) / (1 + torch.arange(dim))
    basis = Principal.fit(values, (dim,), 16)
    energy = float(basis.coordinates(values).square().sum())
    best = float(torch.linalg.svdvals(values)[:16].square().sum())
    assert (1 - 1e-12 if dim <= FULL_EIGEN else 0.999) * best <= energy <= best * (1 + 1e-12)
    gram = basis.matrix @ basis.matrix.T - torch.eye(16)
    assert float(torch.linalg.matrix_norm(gram, 2)) <= basis.error(torch.float64) < 1e-10


def test_a_crooked_basis_is_paid_for():
    """Directions off by 1e-3 are no error: what they miss is in the bounds."""
    g = torch.Generator().manual_seed(0)
    straight = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64)).Q
    crooked = straight + 1e-3 * torch.randn(30, 30, generator=g, dtype=torch.float64)
    u, _, v = torch.linalg.svd(crooked)
    assert float(torch.linalg.matrix_norm(crooked - u @ v, 2)) <= defect(crooked)


def test_which_rows_are_images():
    for shape in ((8, 8), (3, 32, 32), (32, 32, 3), (1, 28, 28), (28, 28, 1), (4, 64, 64)):
        assert is_image(shape)
    for shape in ((64,), (7, 9), (3, 7, 9), (64, 8, 8), (2, 3, 8, 8), ()):
        assert not is_image(shape)

"""The public functions: shapes and defaults around the primitive operations.

Every function takes queries x [*batch, *shape] and a data set of rows [N, *shape], a tensor or a
:class:`memokern.TrainingSet`; numbers per query (sigma, alpha, temperature) are floats or tensors
that broadcast to [*batch].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern import conditional, ops, sweep, validate
from memokern.conditional import Label, Wanted
from memokern.data.parted import PartedSet
from memokern.data.training_set import TrainingSet
from memokern.results import Nearest, Posterior
from memokern.strategies import costs, parted, pruned_nearest, units
from memokern.strategies.small_call import (
    small_call,
    small_mean,
    small_residual,
)
from memokern.util.torch_internals import traced, under_transform
from memokern.validate import (
    PerQuery,
    as_data,
    batch_shape,
    check_k,
    checked,
)


def posterior(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    label: Label = None,
    condition: Tensor | None = None,
    bandwidth: PerQuery | None = None,
    leave_out: int | Tensor | None = None,
    bias: Tensor | None = None,
    weighting: str = "gaussian",
    method: str = "auto",
    certificate: bool = False,
    tol: float | None = None,
    precision: str = "auto",
) -> Posterior:
    r"""The posterior over the rows given x = alpha y + sigma z, in one sweep over the data.

    l_n = -\|x - alpha y_n\|^2 / (2 sigma^2) + b_n,  w = softmax(l / T),  mean = sum w_n y_n.

    Args:
        x: [\*batch, \*shape] float32 or float64, any strides; float16 and bfloat16 are computed in
            float32, as the result's tensors are; what is one tensor like x is returned in its type.
        data: N rows of that shape: a TrainingSet, or a tensor [N, \*shape] of float64, float32,
            bfloat16, float16 or uint8 (then y = 2/255 u - 1).
        sigma: noise level >= 0. 0 is the limit: the nearest of the rows that are not left out;
            rows that are equally near share in proportion to exp(bias / T).
        alpha: signal scale, any finite number. temperature: T > 0.
        label: only rows with this label count: one for all queries, or [\*batch] integers. -1,
            where no row has it, stands for all rows, as do one-hot labels of zeros.
        condition: [K] or [\*batch, K], for x given a condition near it: the logits get
            -\|c - c_n\|^2 / (2 h^2) more, c_n the TrainingSet's `conditions`. bandwidth: h >= 0, a
            number or one per query; 0 is the limit, where rows with that very condition share.
            In log_z, mean_logit and mean_bias this part counts from the largest that a row gets.
        leave_out: the number of a row that does not count, one for all queries or [\*batch]; -1
            for none. Conditions and rows left out may differ from query to query in one sweep, with
            the compiled kernels; elsewhere, and with an index, queries that ask for the same share
            one. Each label has a sweep of its own; nearly as many labels as queries have one call
            together (with derivatives: of classes that are not large).
        bias: [N] floating point, finite or -inf (the row is left out); a TrainingSet's
            `log_weights` are added to it.
        weighting: "gaussian" as above, or "log", which does not know sigma (arXiv 2601.19285):
            l_n = -(D/2) log(\|x - alpha y_n\|^2 / D) + b_n.
        method: "dense" sweeps over all rows. "pruned" sweeps over those that the data's index (see
            `TrainingSet.build_index`) cannot prove negligible: together they weigh less than 1e-6
            (float64: 1e-14) of the total. "auto", where there is an index, chooses for each query
            what is faster on this machine. Weighting "log", sigma = 0, queries that are not finite,
            and calls under torch.func transforms, forward mode or a compiler, or while a CUDA
            graph is captured, are dense.
        certificate: True puts proven bounds on what pruning changed into the result's
            `certificate`, a :class:`.Certificate`.
        tol: the largest error of the mean, as an L2 norm in the units of the data, that pruning may
            cause, where that is less than the weight above already grants.
        precision: how NVIDIA's GPUs multiply float32 rows: "tf32x3" by three products on the tensor
            cores, right to about 2^-20; "ieee" by float32 multiply-adds, right to 2^-24 and several
            times slower. "auto" is MEMOKERN_PRECISION, by default tf32x3. Results keep the same
            contract with each: what products leave uncertain is evaluated exactly. Other rows and
            other devices have one way only.

    Returns:
        :class:`Posterior`: mean, log_z and the other sums, and what follows from them.

    Raises:
        TypeError: wrong types. ValueError: shapes that don't match, values out of range, "pruned"
            without an index.

    Numerics: distances that matter are right at every sigma (no cancellation); float32 queries on
    float32, half-precision or uint8 rows accumulate in float32, anything float64 in float64; the
    numbers per query are float64. A query with NaN or inf gives NaN and leaves the others alone; so
    does a float64 query whose squared norm overflows (1e154). A row with NaN that is not left out
    makes everything NaN.
    Rows at exactly equal distances share by their bias, however far they are; the Triton and CUDA
    kernels know logits to about 1e-16 of themselves, so that there such rows share equally from
    some (\|x - y\| / sigma)^2 = 1e16 on. Beyond 1e30 (float64: 1e280) sigma counts as 0, and the
    bias as it does there. The data may be in any units: float32 rows of 1e-30 to 1e35, with a sigma
    to match, float64 rows of 1e-139 to 1e153.

    Gradients: for x, sigma, alpha, temperature, bias (twice) and floating-point rows given as a
    tensor (once); forward mode and torch.func.grad, jvp work too, through the slower reference.

    Cost: 4 B N D operations; memory O(B D) beyond the inputs with the compiled kernels. Pruned: at
    small sigma, one product over N rows of a few dozen numbers each, and a few rows. "auto" goes by
    timings, taken once: where both ways cost the same, which one is taken may differ between two
    processes, and with it the last bits.

    Source: Baptista et al., arXiv 2501.15785, section 2.

    Example:
        >>> import torch, memokern
        >>> rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> p = memokern.posterior(torch.tensor([[0.0, 3.0]]), rows, sigma=1.0)
        >>> p.mean.tolist(), round(p.ess.item(), 6)
        ([[0.0, 0.0]], 2.0)
        >>> round(p.covariance_trace.item(), 4)
        1.0
    """
    x = validate.computable(x)
    options: dict[str, Any] = {"weighting": weighting, "method": method, "tol": tol}
    options |= {"certificate": certificate, "precision": precision}
    if label is None and condition is None and bandwidth is None and leave_out is None:
        return sweep.posterior(x, data, sigma, alpha, temperature, bias, **options)
    wanted = Wanted(label, condition, bandwidth, leave_out)

    def check() -> validate.Asked:
        sweep.index_for(data, method)
        return checked(x, data, sigma, alpha, temperature, bias, weighting, precision)

    asked = parted.together(data, "posterior", check) if isinstance(data, PartedSet) else check()
    return conditional.posterior(x, data, asked, bias, wanted, options)


def score(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    method: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """grad_x log p(x) = (alpha mean - x) / sigma^2 [*batch, *shape]: see :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> memokern.score(torch.tensor([[3.0]]), torch.tensor([[1.0]]), sigma=2.0).tolist()
        [[-0.5]]
    """
    call = small_call(x, data, sigma, alpha, temperature, bias, method, precision)
    if call is None:
        found = posterior(
            validate.computable(x),
            data,
            sigma,
            alpha,
            temperature,
            bias=bias,
            method=method,
            precision=precision,
        )
        return found.score.to(x.dtype)
    s = call.numbers[0]
    return small_residual(call).div_(s).div_(s)  # the same, in place


def denoise(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    method: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """The ideal denoiser x0 = E[y | x] [*batch, *shape]: see :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> rows = torch.tensor([[-1.0], [1.0]])
        >>> memokern.denoise(torch.tensor([[0.2]]), rows, sigma=0.0).tolist()
        [[1.0]]
    """
    call = small_call(x, data, sigma, alpha, temperature, bias, method, precision)
    if call is not None:
        return small_mean(call)
    query = validate.computable(x)
    mean = posterior(
        query, data, sigma, alpha, temperature, bias=bias, method=method, precision=precision
    ).mean
    return mean if query is x else mean.to(x.dtype)


def log_density(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    method: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """log p(x) of the mixture sum_n pi_n N(alpha y_n, sigma^2 I), pi = softmax(bias) [*batch].

    float64; sigma > 0 (at 0 there is no density). See :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> round(memokern.log_density(torch.zeros(1, 1), torch.zeros(1, 1), 1.0).item(), 6)
        -0.918939
    """
    return posterior(
        x, data, sigma, alpha, bias=bias, method=method, precision=precision
    ).log_density


def nearest(x: Tensor, data: TrainingSet | Tensor, k: int = 1, *, method: str = "auto") -> Nearest:
    r"""The k nearest rows in L2, exactly: by direct differences in float64.

    Evaluated are only rows that a proven bound cannot rule out: that of the data's index, where
    there is one, else (compiled kernels) one on the rounding of a product over all features. The
    reference without an index (MEMOKERN_BACKEND=reference) evaluates all.

    Args:
        x: [\*batch, \*shape], and data: N rows, as for :func:`posterior`.
        k: 1 <= k <= N. method: as :func:`posterior`; the result is the same, to the bit.

    Returns:
        distance [\*batch, k] float64 (not squared), ascending; index [\*batch, k] int64. Ties go to
        the lower index; a query with NaN has NaN distances, and a row with NaN is infinitely far.
        Differentiable in x, at a row itself with derivative 0. Distances of any size are right,
        those too whose squares float64 cannot hold (beyond 1e154 and below 1e-154); not so under
        torch.compile and vmap, where such a square is infinite or 0.

    Raises: TypeError, ValueError as :func:`posterior`; ValueError for k out of range.

    Example:
        >>> import torch, memokern
        >>> memokern.nearest(torch.tensor([[0.0, 1.0]]), torch.eye(2), k=2).index.tolist()
        [[1, 0]]
    """
    x, found = validate.computable(x), as_data(data)
    rows = found.rows

    def check() -> torch.Size:
        sweep.index_for(data, method)
        check_k(k, data.n if isinstance(data, PartedSet) else found.rows.n)
        if under_transform(x, rows.data):
            raise RuntimeError(
                "nearest has no forward mode and no torch.func transform but vmap: use backward()"
                " or torch.autograd.grad"
            )
        return batch_shape(x, found)

    apart = data if isinstance(data, PartedSet) else None
    batch = check() if apart is None else parted.together(apart, "nearest", check)
    index = sweep.index_for(data, method)
    flat = x.reshape(-1, rows.dim)
    if apart is not None:
        sq, row = parted.nearest(flat, apart, k, method)
        distance, row = parted.distances(flat, apart, sq, row, k, method)
        return Nearest(distance.reshape(*batch, k), row.reshape(*batch, k))
    if index is None or traced(x):
        sq, row = ops.nearest(flat, rows, k)
    else:
        measured = costs.costs_of(x, rows.data) if method == "auto" else None
        sq, row = pruned_nearest.nearest(flat, rows, index, k, measured)

    def search(x: Tensor, unit: float) -> tuple[Tensor, Tensor]:
        return ops.nearest(x, rows.in_units(unit), k)

    distance, row = units.distances(flat, rows, sq, row, search)
    return Nearest(distance.reshape(*batch, k), row.reshape(*batch, k))


def jvp(
    x: Tensor,
    data: TrainingSet | Tensor,
    v: Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    r"""J v, with J = d mean / d x = (alpha / (T sigma^2)) Cov_w(y) [\*batch, \*shape].

    J is symmetric, so this is also the vector-Jacobian product: one forward and one backward sweep,
    where forward mode would go through the reference. Differentiable once more. 0 at sigma = 0.

    Args: as :func:`posterior`; v has x's shape and type.

    Example:
        >>> import torch, memokern
        >>> rows = torch.tensor([[-1.0], [1.0]])
        >>> x = torch.zeros(1, 1)
        >>> memokern.jvp(x, rows, torch.ones(1, 1), sigma=1.0).tolist()  # tanh'(0) = 1
        [[1.0]]
    """
    if not isinstance(v, Tensor) or v.shape != x.shape or v.dtype != x.dtype:
        got = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"expected v like x, {x.dtype} {tuple(x.shape)}, got {got}")
    keep = torch.is_grad_enabled() and (x.requires_grad or v.requires_grad)
    with torch.enable_grad():
        query, along = validate.computable(x), validate.computable(v)
        query = query if query.requires_grad else query.detach().requires_grad_()
        mean = posterior(query, data, sigma, alpha, temperature, bias=bias).mean
        (out,) = torch.autograd.grad(mean, query, along, create_graph=keep)
    return out.to(x.dtype)

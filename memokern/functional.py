"""The public functions: validation, shapes and defaults around the primitive operations.

Every function takes queries x [*batch, *shape] and a data set of rows [N, *shape], a tensor or a
:class:`memokern.TrainingSet`; numbers per query (sigma, alpha, temperature) are floats or tensors
that broadcast to [*batch].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from memokern import ops
from memokern.backends import reference
from memokern.data import ROW_DTYPES, UINT8_SCALE, UINT8_SHIFT, TrainingSet

KERNELS = ("gaussian", "log")
METHODS = ("auto", "dense")
# weights() is for small problems: 1 GiB of float64.
MAX_DENSE_WEIGHTS = 1 << 27

PerQuery = float | int | Tensor


@dataclass(frozen=True)
class Posterior:
    r"""What one sweep over the data says about x = alpha y + sigma z, y a row, z standard normal.

    With logits l_n = -\|x - alpha y_n\|^2 / (2 sigma^2) + b_n and weights w = softmax(l / T).

    Attributes:
        x: the queries [\*batch, \*shape].
        mean: sum w y, the ideal denoiser's x0 [\*batch, \*shape], in x's type.
        log_z: T logsumexp(l / T); mean_logit: sum w l; mean_bias: sum w b; weight_sq: sum w^2;
            each [\*batch] float64.
        sigma, alpha, temperature: as used, [\*batch] float64.
        n: the number of rows N. log_weight_total: log sum_n exp(b_n), log N without a bias.
        dim: D.
    """

    x: Tensor
    mean: Tensor
    log_z: Tensor
    mean_logit: Tensor
    mean_bias: Tensor
    weight_sq: Tensor
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor
    n: int
    dim: int
    log_weight_total: Tensor

    def _wide(self, value: Tensor) -> Tensor:
        return wide(value, self.x)

    @property
    def residual(self) -> Tensor:
        """alpha mean - x = sigma^2 score, finite at every sigma."""
        return self._wide(self.alpha) * self.mean - self.x

    @property
    def score(self) -> Tensor:
        """(alpha mean - x) / sigma^2; not finite at sigma = 0 unless x is a row."""
        return self.residual / self._wide(self.sigma) / self._wide(self.sigma)

    @property
    def eps(self) -> Tensor:
        """(x - alpha mean) / sigma = -sigma score."""
        return -self.residual / self._wide(self.sigma)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma mean (Salimans & Ho, arXiv 2202.00512)."""
        return self._wide(self.alpha) * self.eps - self._wide(self.sigma) * self.mean

    def velocity(self, d_alpha: PerQuery = 1.0, d_sigma: PerQuery = -1.0) -> Tensor:
        """(sigma'/sigma) x + (alpha' - alpha sigma'/sigma) mean: that of the probability flow.

        The default derivatives are those of flow matching's straight path, alpha = t,
        sigma = 1 - t, where it is (mean - x) / (1 - t) (arXiv 2506.03719).
        """
        return flow_velocity(self.x, self.mean, self.sigma, self.alpha, d_alpha, d_sigma)

    @property
    def log_density(self) -> Tensor:
        """log_z - log sum exp b - (D / 2) log(2 pi sigma^2): the mixture's log p(x) [*batch]."""
        half_log = math.log(2 * math.pi) / 2 + torch.log(self.sigma)
        return self.log_z - self.log_weight_total - self.dim * half_log

    @property
    def ess(self) -> Tensor:
        """1 / sum w^2: how many rows share the weight, from 1 (memorised) to N."""
        return 1 / self.weight_sq

    @property
    def entropy(self) -> Tensor:
        """-sum w log w = (log_z - mean_logit) / T; at sigma = 0 the limit, log ess (equal ties)."""
        value = (self.log_z - self.mean_logit) / self.temperature
        limit = ~(torch.isfinite(self.log_z) & torch.isfinite(self.mean_logit))
        value = torch.where(limit, torch.log(self.ess), value)
        return value.clamp(min=0.0)

    @property
    def covariance_trace(self) -> Tensor:
        """tr Cov_w(y) = (-2 sigma^2 (sum w l - sum w b) - |x - alpha mean|^2) / alpha^2.

        A difference of two squares: absolute error about 1e-7 |x - alpha mean|^2 / alpha^2 for
        float32 queries, and 0 where that is larger than the trace. Gaussian kernel, alpha != 0.
        """
        r2 = -2 * self.sigma.square() * (self.mean_logit - self.mean_bias)
        gap = self.residual.to(torch.float64)
        gap = gap.flatten(self.sigma.dim()).square().sum(-1)
        trace = (r2 - gap) / self.alpha.square()
        return torch.where(self.sigma == 0, 0.0, trace.clamp(min=0.0))

    @property
    def divergence(self) -> Tensor:
        """div score = alpha^2 tr C / (T sigma^4) - D / sigma^2, exact: no Hutchinson estimator."""
        s2 = self.sigma.square()
        return (
            self.alpha.square() * self.covariance_trace / (self.temperature * s2) - self.dim
        ) / s2


class Nearest(NamedTuple):
    """`distance` [*batch, k] float64, L2, ascending; `index` [*batch, k] int64 into the rows."""

    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class _Rows(NamedTuple):
    """A data set as the operations take it."""

    rows: Tensor
    shape: tuple[int, ...]
    scale: float
    shift: float
    center: Tensor | None
    sq_norms: Tensor | None
    log_weights: Tensor | None


def _as_rows(data: TrainingSet | Tensor) -> _Rows:
    if isinstance(data, TrainingSet):
        return _Rows(
            data.rows, data.shape, data.scale, data.shift, data.center, data.sq_norms,
            data.log_weights,
        )  # fmt: skip
    if not isinstance(data, Tensor):
        raise TypeError(
            f"expected data as a TrainingSet or a tensor [N, ...], got {type(data).__name__};"
            " wrap arrays and files in memokern.TrainingSet"
        )
    if data.dtype not in ROW_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in ROW_DTYPES)
        raise TypeError(f"expected rows of type {names}, got {data.dtype}; convert them first")
    if data.dim() < 2 or data.shape[0] == 0 or data[0].numel() == 0:
        raise ValueError(
            f"expected data [N, *shape] with N >= 1 rows of at least one number, got"
            f" {tuple(data.shape)}"
        )
    scale, shift = (UINT8_SCALE, UINT8_SHIFT) if data.dtype == torch.uint8 else (1.0, 0.0)
    rows = data.reshape(data.shape[0], -1)
    if rows.stride(1) != 1:  # the kernels read whole rows; a TrainingSet copies once, not per call
        rows = rows.contiguous()
    return _Rows(rows, tuple(data.shape[1:]), scale, shift, None, None, None)


def _batch_shape(x: Tensor, rows: _Rows) -> torch.Size:
    """Checks the queries against the rows; the batch part of their shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x as a tensor [*batch, *shape], got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"expected x as float32 or float64, got {x.dtype}; use x.float() (rows may stay in"
            " half precision or uint8)"
        )
    if x.device != rows.rows.device:
        raise ValueError(
            f"x is on {x.device} and the data on {rows.rows.device}; move one with .to(device)"
        )
    k = len(rows.shape)
    if x.dim() < k or tuple(x.shape[x.dim() - k :]) != rows.shape:
        raise ValueError(
            f"expected x [*batch, {', '.join(map(str, rows.shape))}] to match the rows, got"
            f" {tuple(x.shape)}"
        )
    return x.shape[: x.dim() - k]


def per_query(name: str, value: PerQuery, batch: Sequence[int], device: torch.device) -> Tensor:
    """A float or a tensor that broadcasts to the batch -> [*batch] float64."""
    if isinstance(value, bool) or not isinstance(value, float | int | Tensor):
        raise TypeError(f"expected {name} as a number or a tensor, got {type(value).__name__}")
    tensor = torch.as_tensor(value, dtype=torch.float64, device=device)
    try:
        return tensor.expand(tuple(batch))
    except RuntimeError:
        raise ValueError(
            f"expected {name} as a number or a tensor that broadcasts to the batch"
            f" {tuple(batch)}, got {tuple(tensor.shape)}"
        ) from None


def batch_shape(x: Tensor, data: TrainingSet | Tensor) -> torch.Size:
    """[*batch] of queries x [*batch, *shape]; TypeError or ValueError if they are not that."""
    return _batch_shape(x, _as_rows(data))


def require(name: str, value: PerQuery, tensor: Tensor, ok: Tensor, what: str) -> None:
    """Raises where a value is out of range; tensors under a compiler or transform, or without
    values (meta), are trusted."""
    if _traced(tensor):
        return
    good = ok.all()
    if not bool(good):
        got = value if not isinstance(value, Tensor) else tensor[~ok][0].item()
        raise ValueError(f"expected {name} {what}, got {got}")


def wide(value: Tensor, like: Tensor) -> Tensor:
    """A number per query, shaped to multiply `like`, in its type."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim())).to(like.dtype)


def flow_velocity(
    x: Tensor, x0: Tensor, sigma: Tensor, alpha: Tensor, d_alpha: PerQuery, d_sigma: PerQuery
) -> Tensor:
    """(sigma'/sigma) x + (alpha' - alpha sigma'/sigma) x0, the probability flow's dx/dt."""
    da = per_query("d_alpha", d_alpha, sigma.shape, x.device)
    rate = per_query("d_sigma", d_sigma, sigma.shape, x.device) / sigma
    return wide(rate, x) * x + wide(da - alpha * rate, x) * x0


def _traced(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return True
    functorch = torch._C._functorch
    return any(
        t is not None
        and (
            t.is_meta
            or functorch.is_functorch_wrapped_tensor(t)
            or isinstance(t, torch._subclasses.FakeTensor)
        )
        for t in tensors
    )


def _transformed(*tensors: Tensor | None) -> bool:
    """Whether a derivative transform that a registered operation would lose is at work here."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack):
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _bias(bias: Tensor | None, rows: _Rows) -> tuple[Tensor | None, Tensor]:
    """The bias with the rows' log weights, and log sum exp of it."""
    n, device = rows.rows.shape[0], rows.rows.device
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"expected bias as a tensor [{n}], got {type(bias).__name__}")
        if bias.shape != (n,):
            raise ValueError(f"expected bias [{n}], one per row, got {tuple(bias.shape)}")
        if bias.device != device:
            raise ValueError(f"bias is on {bias.device} and the rows on {device}")
        if not bias.is_floating_point():
            raise TypeError(f"expected a floating-point bias, got {bias.dtype}")
        bias = bias.to(torch.float64)
        if not _traced(bias):
            if bool((torch.isnan(bias) | torch.isposinf(bias)).any()):
                raise ValueError("expected bias finite or -inf (a row left out), got NaN or +inf")
            if bool(torch.isneginf(bias).all()):
                raise ValueError("every bias is -inf: no row is left to weigh")
    if rows.log_weights is not None:
        bias = rows.log_weights if bias is None else bias + rows.log_weights
        if not _traced(bias) and bool(torch.isneginf(bias).all()):
            raise ValueError("bias and log_weights together leave no row: all sums are -inf")
    if bias is None:
        total = torch.full((), math.log(n), dtype=torch.float64, device=device)
    else:
        total = torch.logsumexp(bias, 0)
    return bias, total


def _asked(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery,
    temperature: PerQuery,
    bias: Tensor | None,
    kernel: str,
) -> tuple[_Rows, torch.Size, tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor]:
    """A call's arguments, checked: rows, [*batch], sigma, alpha and temperature [*batch], the bias
    with the rows' log weights, and log sum exp of it."""
    rows = _as_rows(data)
    batch = _batch_shape(x, rows)
    if kernel not in KERNELS:
        raise ValueError(f"expected kernel one of {', '.join(KERNELS)}, got {kernel!r}")
    s = per_query("sigma", sigma, batch, x.device)
    a = per_query("alpha", alpha, batch, x.device)
    t = per_query("temperature", temperature, batch, x.device)
    require("sigma", sigma, s, (s >= 0) & torch.isfinite(s), "finite and >= 0")
    require("alpha", alpha, a, torch.isfinite(a), "finite")
    require("temperature", temperature, t, (t > 0) & torch.isfinite(t), "finite and > 0")
    return rows, batch, (s, a, t), *_bias(bias, rows)


def posterior(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    kernel: str = "gaussian",
    method: str = "auto",
) -> Posterior:
    r"""The posterior over the rows given x = alpha y + sigma z, in one sweep over the data.

    l_n = -\|x - alpha y_n\|^2 / (2 sigma^2) + b_n,  w = softmax(l / T),  mean = sum w_n y_n.

    Args:
        x: [\*batch, \*shape] float32 or float64, any strides.
        data: N rows of that shape: a TrainingSet, or a tensor [N, \*shape] of float64, float32,
            bfloat16, float16 or uint8 (then y = 2/255 u - 1).
        sigma: noise level >= 0. 0 is the limit: the nearest row, ties share.
        alpha: signal scale, any finite number. temperature: T > 0.
        bias: [N] floating point, finite or -inf (the row is left out); a TrainingSet's
            `log_weights` are added to it.
        kernel: "gaussian" as above, or "log" for l_n = -(D/2) log(\|x - alpha y_n\|^2 / D) + b_n,
            which doesn't know sigma (arXiv 2601.19285).
        method: "auto" or "dense", which are the same today.

    Returns:
        :class:`Posterior`: mean, log_z and the other sums, and what follows from them.

    Raises:
        TypeError: wrong types. ValueError: shapes that don't match, values out of range.

    Numerics: distances that matter are right at every sigma (no cancellation); float32 queries on
    float32, half-precision or uint8 rows accumulate in float32, anything float64 in float64; the
    numbers per query are float64. A query with NaN or inf gives NaN and leaves the others alone; so
    does a float64 query whose squared norm overflows (1e154).

    Gradients: for x, sigma, alpha, temperature, bias (twice) and floating-point rows given as a
    tensor (once); forward mode and torch.func.grad, jvp work too, through the slower reference.

    Cost: 4 B N D operations; memory O(B D) beyond the inputs with the compiled kernels.

    Source: Baptista et al., arXiv 2501.15785, section 2.

    Example:
        >>> import torch, memokern
        >>> rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> p = memokern.posterior(torch.tensor([[0.0, 3.0]]), rows, sigma=1.0)
        >>> p.mean.tolist(), round(p.ess.item(), 6)
        ([[0.0, 0.0]], 2.0)
        >>> round(p.covariance_trace.item(), 6)
        1.0
    """
    if method not in METHODS:
        raise ValueError(f"expected method one of {', '.join(METHODS)}, got {method!r}")
    rows, batch, (s, a, t), b, total = _asked(x, data, sigma, alpha, temperature, bias, kernel)
    dim = rows.rows.shape[1]
    transformed = _transformed(x, rows.rows, s, a, t, b)
    run = reference.posterior if transformed else ops.posterior
    out = run(
        x.reshape(-1, dim), rows.rows, s.reshape(-1), a.reshape(-1), t.reshape(-1), b,
        rows.center, rows.sq_norms, rows.scale, rows.shift, kernel,
    )  # fmt: skip
    mean, *stats = out
    log_z, mean_logit, mean_bias, weight_sq = (v.reshape(batch) for v in stats)
    return Posterior(
        x, mean.reshape(x.shape), log_z, mean_logit, mean_bias, weight_sq, s, a, t,
        rows.rows.shape[0], dim, total,
    )  # fmt: skip


def score(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """grad_x log p(x) = (alpha mean - x) / sigma^2 [*batch, *shape]: see :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> memokern.score(torch.tensor([[3.0]]), torch.tensor([[1.0]]), sigma=2.0).tolist()
        [[-0.5]]
    """
    return posterior(x, data, sigma, alpha, temperature, bias=bias, method=method).score


def denoise(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """The ideal denoiser x0 = E[y | x] [*batch, *shape]: see :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> rows = torch.tensor([[-1.0], [1.0]])
        >>> memokern.denoise(torch.tensor([[0.2]]), rows, sigma=0.0).tolist()
        [[1.0]]
    """
    return posterior(x, data, sigma, alpha, temperature, bias=bias, method=method).mean


def log_density(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """log p(x) of the mixture sum_n pi_n N(alpha y_n, sigma^2 I), pi = softmax(bias) [*batch].

    float64; sigma > 0 (at 0 there is no density). See :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> round(memokern.log_density(torch.zeros(1, 1), torch.zeros(1, 1), 1.0).item(), 6)
        -0.918939
    """
    return posterior(x, data, sigma, alpha, bias=bias, method=method).log_density


def nearest(x: Tensor, data: TrainingSet | Tensor, k: int = 1) -> Nearest:
    r"""The k nearest rows in L2, exactly: by direct differences in float64.

    The compiled kernels evaluate only rows that a product with a proven bound on its rounding
    cannot rule out; the reference (MEMOKERN_BACKEND=reference) evaluates all.

    Args:
        x: [\*batch, \*shape] float32 or float64. data: N rows, as for :func:`posterior`.
        k: 1 <= k <= N.

    Returns:
        distance [\*batch, k] float64 (not squared), ascending; index [\*batch, k] int64. Ties go to
        the lower index; a query with NaN has NaN distances. Differentiable in x where distance > 0.

    Raises: TypeError, ValueError as :func:`posterior`; ValueError for k out of range.

    Example:
        >>> import torch, memokern
        >>> memokern.nearest(torch.tensor([[0.0, 1.0]]), torch.eye(2), k=2).index.tolist()
        [[1, 0]]
    """
    rows = _as_rows(data)
    batch = _batch_shape(x, rows)
    n, dim = rows.rows.shape
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"expected k as an int, got {type(k).__name__}")
    if not 1 <= k <= n:
        raise ValueError(f"expected 1 <= k <= N = {n}, got {k}")
    if _transformed(x, rows.rows):
        raise RuntimeError(
            "nearest has no forward mode and no torch.func transform but vmap: use backward() or"
            " torch.autograd.grad"
        )
    flat = x.reshape(-1, dim)
    sq, index = ops.nearest(flat, rows.rows, k, rows.center, rows.sq_norms, rows.scale, rows.shift)
    return Nearest(sq.sqrt().reshape(*batch, k), index.reshape(*batch, k))


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
        query = x if x.requires_grad else x.detach().requires_grad_()
        mean = posterior(query, data, sigma, alpha, temperature, bias=bias).mean
        (out,) = torch.autograd.grad(mean, query, v, create_graph=keep)
    return out


def weights(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery = 1.0,
    temperature: PerQuery = 1.0,
    *,
    bias: Tensor | None = None,
    kernel: str = "gaussian",
) -> Tensor:
    r"""softmax(l / T) itself [\*batch, N] float64, for small problems: it is what the other
    functions never build.

    Raises: ValueError beyond 2^27 weights (1 GiB); otherwise as :func:`posterior`.

    Example:
        >>> import torch, memokern
        >>> memokern.weights(torch.zeros(1, 1), torch.tensor([[-1.0], [1.0]]), 0.5).tolist()
        [[0.5, 0.5]]
    """
    rows, batch, (s, a, t), b, _ = _asked(x, data, sigma, alpha, temperature, bias, kernel)
    n, dim = rows.rows.shape
    if math.prod(batch) * n > MAX_DENSE_WEIGHTS:
        raise ValueError(
            f"weights of {math.prod(batch)} queries on {n} rows are more than"
            f" {MAX_DENSE_WEIGHTS} numbers; posterior() gives their mean, entropy and ess in O(B D)"
        )
    w = reference.weights(
        x.reshape(-1, dim), rows.rows, s.reshape(-1), a.reshape(-1), t.reshape(-1), b,
        rows.center, rows.scale, rows.shift, kernel,
    )  # fmt: skip
    return w.reshape(*batch, n)

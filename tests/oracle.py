"""The tests' own truth: the definitions in float64, by direct differences, plainly."""

import torch


def posterior(x, rows, sigma, alpha=1.0, temperature=1.0, bias=None, kernel="gaussian"):
    """-> mean, log_z, mean_logit, mean_bias, weight_sq, for [B, D] queries and [N, D] rows."""
    x, y = x.double(), rows.double()
    sigma, alpha, temperature = (
        torch.as_tensor(v, dtype=torch.float64).expand(len(x))[:, None]
        for v in (sigma, alpha, temperature)
    )
    b = torch.zeros(len(y), dtype=torch.float64) if bias is None else bias
    r2 = torch.stack([(q - a * y).square().sum(-1) for q, a in zip(x, alpha[:, 0], strict=True)])
    if kernel == "gaussian":
        logits = -r2 / (2 * sigma**2) + b
    else:
        logits = -x.shape[1] / 2 * torch.log(r2 / x.shape[1]) + b
    w = torch.softmax(logits / temperature, 1)
    counted = w > 0
    return (
        w @ y,
        temperature[:, 0] * torch.logsumexp(logits / temperature, 1),
        torch.where(counted, w * logits, 0.0).sum(1),
        torch.where(counted, w * b, 0.0).sum(1),
        w.square().sum(1),
    )

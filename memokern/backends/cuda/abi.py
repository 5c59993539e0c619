"""The structs that kernels take, field by field as csrc/cuda/*/abi.h have them. Every field has
8 bytes; a test holds both to the same names in the same order."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

# Rows of a query's table, and of a part's states.
TABLE_ROWS = 12
STATE_ROWS = 7
# Rows of the table of gradients, and of a part's sums in the backward sweep.
GRADIENT_TABLE_ROWS = 2
GRADIENT_ROWS = 8
# Rows of what is known of a list.
LISTED_ROWS = 8
WORD = 8

_KINDS = {"*": ctypes.c_void_p, ".": ctypes.c_double, "#": ctypes.c_int64}


def _fields(text: str) -> list[tuple[str, Any]]:
    """Of names that end in what they are: * a pointer, . a double, # an integer."""
    return [(word[:-1], _KINDS[word[-1]]) for word in text.split()]


class QueriesParams(ctypes.Structure):
    """Of sweep/queries.cu."""

    _fields_ = _fields(
        "x* sigma* alpha* temperature* center* terms* table* scale. shift. b# d# dp# queries#"
        " depth# log#"
    )


class SweepParams(ctypes.Structure):
    """Of sweep/sweep.cu."""

    _fields_ = _fields(
        "rows* sq_norms* bias* terms* table* x* sigma* alpha* states* acc* near* scale. shift. b#"
        " n# d# stride#"
    )


class FinishParams(ctypes.Structure):
    """Of sweep/finish.cu."""

    _fields_ = _fields(
        "states* acc* near* table* x* sigma* alpha* temperature* center* scale. zero. b# d# dp#"
        " parts# queries# residual* key* m* s* s_v* s_bias* s_sq* sum* mean* log_z* mean_logit*"
        " mean_bias* weight_sq* score* tikhonov. log_threshold."
    )


class GradientParams(ctypes.Structure):
    """Of all of gradient/."""

    _fields_ = _fields(
        "rows* sq_norms* bias* center* terms* table* grad_terms* grad_table* x* sigma* alpha*"
        " temperature* mean* grad_mean* log_z* mean_logit* mean_bias* weight_sq* grad_log_z*"
        " grad_mean_logit* grad_mean_bias* grad_weight_sq* sums* acc* near* pairs* grad_x*"
        " grad_sigma* grad_alpha* grad_temperature* grad_bias* scale. shift. zero. b# n# d# dp#"
        " stride# parts# queries# first#"
    )


class NormsParams(ctypes.Structure):
    """Of sweep/norms.cu."""

    _fields_ = _fields("rows* center* sq_norms* scale. shift. n# d# stride#")


class ScanParams(ctypes.Structure):
    """Of all of scan/."""

    _fields_ = _fields(
        "rows* sq_norms* bias* x* sigma* alpha* temperature* coarse* fine* z* norms* margin* sq*"
        " largest* scaled* reach* best* least* bound* guess* place* chunk* index* left* count*"
        " level* threshold* start* out* scale. shift. span. b# n# d# stride# k0# bands#"
        " fine_width# most_listed# parts# k1# k2# b1# b2# first#"
    )


class ListedParams(ctypes.Structure):
    """Of all of listed/."""

    _fields_ = _fields(
        "rows* bias* x* sigma* alpha* temperature* start* index* r2* weight* known* part* mean*"
        " residual* log_z* mean_logit* mean_bias* weight_sq* grad_mean* grad_log_z*"
        " grad_mean_logit* grad_mean_bias* grad_weight_sq* gy* xy* factor* pair_bias* grad_x*"
        " grad_sigma* grad_alpha* grad_temperature* scale. shift. b# n# d# stride# m# parts#"
        " backward#"
    )


class NearestParams(ctypes.Structure):
    """Of all of nearest/."""

    _fields_ = _fields(
        "rows* x* about* least* most* part_distance* part_index* distance* index* scale. shift. b#"
        " n# d# stride# k# parts#"
    )


class PlaneParams(ctypes.Structure):
    """Of all of plane/."""

    _fields_ = _fields(
        "rows* bias* x* sigma* alpha* temperature* center* largest* part* residual* key* m* s*"
        " s_v* s_bias* s_sq* sum* mean* log_z* mean_logit* mean_bias* weight_sq* scale. shift. b#"
        " n# d# stride# parts# log# features#"
    )


def filled(kind: type[ctypes.Structure], **values: Tensor | float | int | None) -> Any:
    """A struct with these values, a tensor's address for a pointer; fields that are not named are
    0. AttributeError for a name that the struct does not have, which ctypes would take."""
    known = {name for name, *_ in kind._fields_}
    if not known.issuperset(values):
        raise AttributeError(f"{kind.__name__} has no {', '.join(sorted(set(values) - known))}")
    found = kind()
    for name, value in values.items():
        setattr(found, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return found

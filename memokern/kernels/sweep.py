"""temp"""
from memokern.kernels import chunked, planner


def posterior(q, data, machine, kernel, precision, out):
    size = planner.element_size(data.rows.dtype)
    plan = planner.chunked(q.x.shape[0], data.n, data.d, size, machine)
    chunked.posterior(q, data, plan, kernel, precision, out)

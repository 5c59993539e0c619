"""`make gpu-check`: what is to be known of the kernels on a GPU that is there for a few minutes.

    python -m tools.gpu_check --minutes 6

First smoke tests: each operation on each type of rows, against float64 in plain PyTorch. Then the
times of the problems of :mod:`tools.gpu_check.steps`, the most important first, beside the peers
that are there; each result is compared with float64 before it is timed. After each line the page
gpu-check.md and gpu-check.json are written anew, so that a run that is cut off leaves what it had.

The work is done by processes of their own (:mod:`tools.gpu_check.worker`), one step at a time: a
step that hangs, or that takes the GPU's context with it, costs its own line and a new process. The
process that hands out the steps (:mod:`tools.gpu_check.schedule`) watches the clock, and needs
neither PyTorch nor a GPU.

``--rehearse`` runs the same steps on tiny problems without a GPU, the Triton kernels interpreted.
"""

"""The Triton kernels: one source for NVIDIA and AMD. Imported only where Triton is wanted.

:mod:`.variant` says what a kernel is launched with; every module of kernels lists its own.
"""

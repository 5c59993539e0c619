"""Who computes: plain PyTorch, C++ on CPUs, CUDA C++ and Triton on GPUs."""

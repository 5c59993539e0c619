"""Who computes: plain PyTorch, C++ on CPUs, Triton on GPUs."""

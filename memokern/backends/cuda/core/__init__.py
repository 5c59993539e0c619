"""What every CUDA kernel needs of the host: its sources, its machine code, the driver."""

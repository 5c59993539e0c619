"""What is read from the kernels, predicted of them, and checked of them on a GPU."""

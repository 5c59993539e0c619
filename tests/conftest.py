"""Two threads are what the tests need, and what makes their sums reproducible."""

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))

"""One thread: models this small only lose time to a second one."""

import torch

torch.set_num_threads(1)

"""A network of random weights, for tests that need one and not its images."""

import torch

from benchmarks import cost
from torch_utils import network_io
from training import networks


def save_network(path, seed, channels=1, label_dim=3):
    """8×8 images. Returns the path as a string."""
    torch.manual_seed(seed)
    kwargs = {'model_type': 'SongUNet', 'model_channels': 8, 'channel_mult': [1], 'num_blocks': 1}
    net = networks.EDMPrecond(8, channels, label_dim=label_dim, **kwargs)
    cost.randomize_zeros(net)
    network_io.save_network(net, path)
    return str(path)

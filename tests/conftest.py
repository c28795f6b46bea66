import pickle

import foreign_edm
import pytest
import torch

from sampling.networks import open_network
from training.networks import EDMPrecond

SONG = {'model_type': 'SongUNet', 'model_channels': 8, 'channel_mult': [1, 2], 'num_blocks': 1, 'attn_resolutions': [4]}


@pytest.fixture
def one_thread():
    """PyTorch on one thread, as small networks are quickest, and images the same on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def network_files(tmp_path_factory):
    """Snapshots of small random networks: digits (3 classes), grey (no classes), rgb (1000 classes)."""
    folder = tmp_path_factory.mktemp('networks')
    for name, channels, label_dim in [('digits', 1, 3), ('grey', 1, 0), ('rgb', 3, 1000)]:
        net = EDMPrecond(8, channels, label_dim=label_dim, **SONG)
        net = foreign_edm.randomize(net, seed=0).eval().requires_grad_(False)
        (folder / f'{name}.pkl').write_bytes(pickle.dumps({'ema': net}))
    return folder


@pytest.fixture(scope='session')
def digits(network_files):
    return open_network(str(network_files / 'digits.pkl'), torch.device('cpu'))

import pytest
import torch


@pytest.fixture
def one_thread():
    """PyTorch on one thread, as small networks are quickest, and images the same on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Network files → denoisers ready to sample: loaded, checked, in their precision, guided, counted."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import dnnlib
import sampler_2nd
from dnnlib import npz
from sampling import run_record
from torch_utils import distributed as dist
from torch_utils import misc, network_io
from training.networks import Precond

SHIPPED_NETWORK = Path(__file__).parent.parent / 'ckpts' / 'edm-mnist-32x32-cond-vp.pkl'


def check_network(net: Any, class_idx: int | Sequence[int] | None) -> None:
    """Raise click.UsageError unless `net` makes images that a PNG file can hold, and knows the classes."""
    if net.img_channels not in (1, 3):
        raise click.UsageError(f'--network makes images of {net.img_channels} channels; PNG files hold 1 or 3')
    if class_idx is None:
        return
    largest = class_idx if isinstance(class_idx, int) else max(class_idx)
    if not net.label_dim:
        raise click.UsageError(f'--class={largest}: this network is unconditional; leave --class out')
    if largest >= net.label_dim:
        raise click.UsageError(f'--class={largest}: this network has the classes 0 to {net.label_dim - 1}')


def read_vectors(path: str, label_dim: int) -> np.ndarray:
    """The label vectors of --labels, float32 [M, label_dim].

    Raises:
        ValueError, OSError: the file has none that this network knows.
    """
    with open(path, 'rb') as file:
        try:
            vectors = npz.array(file.read()).astype(np.float32)
        except ValueError as err:
            raise ValueError(f'--labels={path} is no .npy file of numbers: {dnnlib.util.one_line(err, 200)}') from None
    if not label_dim or vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != label_dim:
        raise ValueError(
            f'--labels={path} has the shape {list(vectors.shape)}; this network has labels [N, {label_dim}]'
        )
    if not np.isfinite(vectors).all():
        raise ValueError(f'--labels={path} has numbers that are not finite')
    return vectors


def check_guidance(guidance: float | None, gnet: str | None) -> None:
    """What can be said of --guidance and --gnet without a network. Raises click.UsageError."""
    if guidance is not None and gnet is None:
        raise click.UsageError(f'--guidance={guidance:g} needs --gnet, the guiding network')
    if gnet is not None and guidance is None:
        raise click.UsageError('--gnet needs --guidance, such as --guidance=2')
    if guidance is not None and not math.isfinite(guidance):
        raise click.UsageError(f'--guidance={guidance} is not a number to compute with')


def open_network(
    path: str, device: torch.device, trust_pickle: bool = False, option: str = '--network'
) -> torch.nn.Module:
    """The network, on `device`. Rank 0 loads first, so that it alone downloads, and alone says what is wrong.

    Raises:
        ValueError: on rank 0, that the file is missing, or no network that this project reads; it names the `option`.
    """
    loaded: list[torch.nn.Module] = []

    def load() -> None:
        try:
            loaded.append(network_io.load_network(path, trust_pickle=trust_pickle))
        except (OSError, ValueError) as err:
            raise ValueError(f'{option}{"=" if str(err).startswith(path) else ": "}{err}') from None

    dist.on_rank0(load)
    net = (loaded[0] if loaded else network_io.load_network(path, trust_pickle=trust_pickle)).to(device)
    return prepare_for_cpu(net) if device.type == 'cpu' else net


def prepare_for_cpu(net: torch.nn.Module) -> torch.nn.Module:
    """The same network, faster: benchmarks/cost.py measures by how much."""
    misc.keep_freed_memory()
    if isinstance(net, Precond):  # others' networks may lose their forward mode by it
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


PRECISIONS = {'fp16': torch.float16, 'bf16': torch.bfloat16}


def set_precision(net: Any, device: torch.device, dtype: str) -> None:
    """Make `net` compute in 'fp32', or let autocast compute in 'fp16' or 'bf16'; weights, input and output stay.

    Raises:
        click.ClickException: the device cannot.
    """
    net.use_fp16 = False  # EDM's own half precision; it would mix with autocast's
    if dtype == 'fp32':
        return
    if device.type == 'cpu':
        dist.print0(f'Warning: --dtype={dtype} is for GPUs; many CPUs compute it far slower than fp32')
    try:
        precision = torch.autocast(device.type, PRECISIONS[dtype])
    except RuntimeError as err:
        raise click.ClickException(f'--dtype={dtype}: {err}') from None
    net.forward = precision(net.forward)


class LoadedNetworks:
    """What the sampler evaluates, and what that took.

    Attributes:
        main: the network of the command line; net: the same, guided by --gnet where there is one.
        settings: what of the images depends on the networks and how they are run.
    """

    def __init__(self, opts: dnnlib.EasyDict, device: torch.device):
        self.device = device
        self.settings: dict[str, Any] = {'network': None, 'gnet': None, 'guidance': opts.guidance}
        self.settings |= {'trust-pickle': opts.trust_pickle, 'compile': opts.compile_net, 'device': device.type}
        self._guide: sampler_2nd.CountCalls | None = None
        self.main = self._open('network', opts.network_pkl, opts, device)
        self.net: Any = self.main
        check_network(self.net, opts.class_idx)
        if opts.gnet is not None:
            self._guide = self._open('gnet', opts.gnet, opts, device)
            try:
                self.net = sampler_2nd.Guided(self.main, self._guide, opts.guidance)
            except ValueError as err:
                raise click.UsageError(f'--gnet={opts.gnet}: {err}') from None

    def _open(self, name: str, path: str, opts: dnnlib.EasyDict, device: torch.device) -> sampler_2nd.CountCalls:
        dist.print0(f'Loading {"guiding " if name == "gnet" else ""}network from {path} ...')
        net: Any = open_network(path, device, opts.trust_pickle, f'--{name}')
        self.settings[name] = run_record.fingerprint(net)
        own_fp16 = device.type == 'cuda' and getattr(net, 'use_fp16', False)
        self.settings['dtype'] = opts.dtype or ("the file's own fp16" if own_fp16 else 'fp32')
        if opts.dtype is not None:
            set_precision(net, device, opts.dtype)
        if opts.compile_net:
            net.compile()
        return sampler_2nd.CountCalls(net)

    def work_done(self, num_steps: int, num_batches: int) -> str:
        text = work_done(self.main, num_steps, num_batches)
        if self._guide is None:
            return text
        return f'{text}, and {self._guide.calls // num_batches} calls of the guiding network'


def work_done(net: sampler_2nd.CountCalls, num_steps: int, num_batches: int) -> str:
    """What an image cost."""
    calls, jvp_calls = net.calls // num_batches, net.jvp_calls // num_batches
    return f'{num_steps} steps: {calls} network calls, {jvp_calls} of them with a JVP'

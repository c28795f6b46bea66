"""The state of a run: what changes during training, and the files training-state-KIMG.pt that hold it.

A file of ours is a dict of state dicts and counters, which loads with `weights_only=True`. EDM's is a pickled module
and Adam's state; with `trust_pickle` it is read as well, together with the snapshot of the same kimg.
"""

import math
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

import dnnlib
from images.tree import DAMAGED
from torch_utils import distributed as dist
from torch_utils import misc, network_io

STATE_NAME = re.compile(r'training-state-(\d+)\.pt')

_MODULES = ('net', 'ema', 'optimizer')
_COUNTERS = ('cur_nimg', 'cur_tick', 'tick_start_nimg', 'elapsed_sec')


@dataclass
class Run:
    """What changes during training, and all that a state file holds.

    Attributes:
        net, ema: the trained network and the moving average of its weights.
        cur_nimg: images shown so far, over all ranks.
        cur_tick: index of the tick in progress; tick_start_nimg: `cur_nimg` where it began.
        elapsed_sec: training time of this run and of those it resumes.
    """

    net: torch.nn.Module
    ema: torch.nn.Module
    optimizer: torch.optim.Optimizer
    cur_nimg: int = 0
    cur_tick: int = 0
    tick_start_nimg: int = 0
    elapsed_sec: float = 0.0

    def tick_is_over(self, kimg_per_tick: float) -> bool:
        """The first tick is a single step."""
        return self.cur_tick == 0 or self.cur_nimg >= self.tick_start_nimg + kimg_per_tick * 1000

    @torch.no_grad()
    def update_ema(self, batch_size: int, halflife_kimg: float, rampup_ratio: float | None) -> None:
        """ema ← β ema + (1 − β) net with β = ½^(batch_size / half-life)."""
        halflife_nimg = halflife_kimg * 1000
        if rampup_ratio is not None:
            halflife_nimg = min(halflife_nimg, self.cur_nimg * rampup_ratio)
        beta = 0.5 ** (batch_size / max(halflife_nimg, 1e-8))
        averages: list[torch.Tensor] = list(self.ema.parameters())
        torch._foreach_lerp_(averages, [weight.detach() for weight in self.net.parameters()], 1 - beta)

    def transfer(self, network_pkl: str, trust_pickle: bool = False) -> None:
        """Copy the weights of a network file into net and EMA, name by name."""
        try:
            source = network_io.load_network(network_pkl, trust_pickle)
            for target in (self.net, self.ema):
                misc.copy_params_and_buffers(source, target)
        except (OSError, ValueError) as err:
            problem = dnnlib.util.one_line(err, 300)
            raise ValueError(
                problem if network_pkl in problem else f'cannot start from {network_pkl}: {problem}'
            ) from err

    def save(self, path: str) -> None:
        """Write the state, with the random number generators of all ranks; to be called on every rank."""
        rng = dist.all_gather_object(_rng_state(next(self.net.parameters()).device))
        if dist.get_rank() != 0:
            return
        counters = {name: getattr(self, name) for name in _COUNTERS}
        modules = {name: getattr(self, name).state_dict() for name in _MODULES}
        with dnnlib.util.atomic_write(path) as file:
            torch.save({**modules, **counters, 'rng': rng}, file)

    def load(self, path: str, snapshot: str | None = None, trust_pickle: bool = False) -> None:
        """Continue from a state file; `snapshot`, of the same kimg, is for EDM's, which hold no EMA.

        Raises:
            ValueError: the file is damaged, needs `trust_pickle` or a snapshot, or is of another network.
        """
        content = read_state(path, trust_pickle)
        try:
            if 'optimizer_state' in content:
                self._take_edm(content, path, snapshot, trust_pickle)
            else:
                self._take(content)
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as err:
            raise ValueError(
                f'{path} does not fit this run: {dnnlib.util.one_line(err, 300)}; '
                'give the options that are in training_options.json beside it'
            ) from err

    def _take(self, content: dict[str, Any]) -> None:
        self._check_moments(content['optimizer'])
        self.net.load_state_dict(content['net'])
        self.ema.load_state_dict(content['ema'])
        self._take_optimizer(content['optimizer'])
        content['elapsed_sec'] = max(content['elapsed_sec'], 0)  # a clock that went back may have made it negative
        for name in _COUNTERS:
            if not 0 <= content[name] < math.inf:
                raise ValueError(f'{name} is {content[name]!r}')
            setattr(self, name, content[name])
        if len(content['rng']) == dist.get_world_size():
            _set_rng_state(content['rng'][dist.get_rank()], next(self.net.parameters()).device)
        else:
            dist.print0('Another number of processes than before: random numbers start anew')

    def _take_edm(self, content: dict[str, Any], path: str, snapshot: str | None, trust_pickle: bool) -> None:
        if snapshot is None:
            raise ValueError(
                "EDM's state holds no EMA; network-snapshot-KIMG.pkl of the same kimg has to lie beside it"
            )
        self._check_moments(content['optimizer_state'])
        self.transfer(snapshot, trust_pickle)
        misc.copy_params_and_buffers(content['net'], self.net, require_all=True)
        self._take_optimizer(content['optimizer_state'])
        self.cur_nimg = self.tick_start_nimg = state_kimg(path) * 1000

    def _check_moments(self, state: dict[str, Any]) -> None:
        """Whether a state of Adam is one of this run's: its kernels trust what they are given, and write beyond it.

        Raises:
            ValueError: numbers for other parameters, or of another shape or kind than theirs.
        """
        params = [param for group in self.optimizer.param_groups for param in group['params']]
        if state['state'] and set(state['state']) != set(range(len(params))):
            raise ValueError(
                f'the optimizer has moments of {len(state["state"])} parameters, and the network {len(params)}'
            )
        for index, moments in state['state'].items():
            expected = dict.fromkeys(('exp_avg', 'exp_avg_sq'), params[index].shape) | {'step': torch.Size([])}
            found = {name: value.shape for name, value in moments.items() if torch.is_tensor(value)}
            if found != expected:
                raise ValueError(f'the moments of parameter {index} are {found}, not {expected}')
            if not all(value.is_floating_point() for value in moments.values()):
                raise ValueError(f'the moments of parameter {index} are not in floating point')

    def _take_optimizer(self, state: dict[str, Any]) -> None:
        """The moments of a state; the parameters and how Adam computes are up to this run, not to the file."""
        groups = self.optimizer.state_dict()['param_groups']
        self.optimizer.load_state_dict({'state': state['state'], 'param_groups': groups})
        for param, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == param.shape:  # one kernel goes through both, so their elements need the same order
                    moments[name] = torch.empty_like(param, dtype=moment.dtype).copy_(moment)


# ----------------------------------------------------------------------------
# Files.


def state_kimg(path: str) -> int:
    """The number in the name of a state file; ValueError for any other name."""
    match = STATE_NAME.fullmatch(os.path.basename(path))
    if match is None:
        raise ValueError(f'{path}: the name of a training state is training-state-KIMG.pt')
    return int(match.group(1))


def latest_state(folder: str) -> str | None:
    """The newest state file of a run directory that is not damaged; None if there are no states.

    Raises:
        ValueError: all are damaged.
    """
    names = [name for name in os.listdir(folder) if STATE_NAME.fullmatch(name)] if os.path.isdir(folder) else []
    for name in sorted(names, key=state_kimg, reverse=True):
        path = os.path.join(folder, name)
        damage = find_damage(path)
        if damage is None:
            return path
        print(f'Warning: {path} is damaged ({damage}); passed over')
    if names:
        raise ValueError(
            f'all {len(names)} training states in {folder} are damaged; delete them to '
            'start anew, or give another --outdir'
        )
    return None


def find_damage(path: str) -> str | None:
    """What is wrong with a state file, by the checksums of its parts, which PyTorch writes and does not look at."""
    if not os.path.isfile(path):
        return 'it is not a file'  # reading a pipe would never end
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except DAMAGED as err:
        return dnnlib.util.one_line(err)
    return None if part is None else f'checksum of {part}'


def read_state(path: str, trust_pickle: bool) -> dict[str, Any]:
    damage = find_damage(path)
    if damage is not None:
        raise ValueError(f'{path} is damaged ({damage}); take the state before it, or its folder, which finds that')
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as err:  # PyTorch raises many kinds for files that are not its own
        if misc.is_out_of_memory(err):
            raise
        if not isinstance(err, pickle.UnpicklingError) or 'GLOBAL' not in str(err).upper():
            raise ValueError(f'{path} is not the state of a training run: {dnnlib.util.one_line(err, 200)}') from err
        if not trust_pickle:
            raise ValueError(
                f"{path} holds Python objects, as EDM's own states do; "
                'if you trust its author, --trust-pickle reads it and runs the code in it'
            ) from err
        dist.print0(f'Warning: --trust-pickle runs the Python code inside {path}')
        content = _load_trusted(path)
    if not isinstance(content, dict) or not ({*_MODULES, *_COUNTERS, 'rng'} <= content.keys() or _is_edm(content)):
        raise ValueError(f'{path} is not the state of a training run')
    return content


def _load_trusted(path: str) -> Any:
    try:
        return torch.load(path, map_location='cpu', weights_only=False)
    except Exception as err:  # its code may raise anything
        if misc.is_out_of_memory(err):
            raise
        raise ValueError(f'{path} cannot be read: {dnnlib.util.one_line(err, 200)}') from err


def _is_edm(content: dict[str, Any]) -> bool:
    return isinstance(content.get('net'), torch.nn.Module) and 'optimizer_state' in content


# ----------------------------------------------------------------------------
# Random numbers.


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {'cpu': torch.get_rng_state()}
    if device.type != 'cpu':
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state['cpu'])
    if device.type in state and device.type != 'cpu':
        getattr(torch, device.type).set_rng_state(state[device.type])

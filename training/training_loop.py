"""The training loop: images from a dataset, denoising loss, Adam, exponential moving average of the weights.

`training_loop` is the way in. It builds a `Run` (network, EMA, optimizer, counters: everything that a state file
holds) and repeats: `_gradient_step`, and at each tick `_Reporter` lines, snapshots and state dumps.
"""

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import dnnlib
from torch_utils import distributed as dist
from torch_utils import misc, network_io, training_stats


def training_loop(
    run_dir: str,
    dataset_kwargs: dict[str, Any],
    data_loader_kwargs: dict[str, Any],
    network_kwargs: dict[str, Any],
    loss_kwargs: dict[str, Any],
    optimizer_kwargs: dict[str, Any],
    augment_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 512,
    batch_gpu: int | None = None,
    total_kimg: int = 200_000,
    ema_halflife_kimg: float = 500,
    ema_rampup_ratio: float | None = 0.05,
    lr_rampup_kimg: float = 10_000,
    loss_scaling: float = 1,
    kimg_per_tick: int = 50,
    snapshot_ticks: int = 50,
    state_dump_ticks: int = 500,
    snapshot_format: str = 'pkl',
    resume_pkl: str | None = None,
    resume_state_dump: str | None = None,
    cudnn_benchmark: bool = True,
    bf16: bool = False,
    device: torch.device | str = 'cpu',
) -> None:
    """Train a network; write snapshots, states and statistics to `run_dir`.

    The `…_kwargs` name a class (`class_name`) and its arguments. 1 kimg is 1000 images shown to the network.

    * A step sees `batch_size` images, split evenly over the ranks and into rounds of at most `batch_gpu` images per
      rank. The gradient is that of the mean over the images of the loss summed over pixels, times `loss_scaling`
      (never undone: Adam does not mind).
    * Learning rate: linear from 0 over the first `lr_rampup_kimg`, constant afterwards.
    * EMA: half-life `ema_halflife_kimg`, at most `ema_rampup_ratio` of the images seen so far.
    * A tick is `kimg_per_tick`. Every `snapshot_ticks` (first after the first step, and at the end) the EMA network is
      saved as network-snapshot-KIMG.pkl (with loss and augmentation) or .safetensors (without), by `snapshot_format`;
      every `state_dump_ticks` and at the end the state as training-state-KIMG.pt.
    * `resume_pkl`: start from the weights of that network. `resume_state_dump`: go on from that state, with the
      random numbers and the data order that an uninterrupted run would have had.
    * `bf16`: run the network under bfloat16 autocast, weights and optimizer in float32.

    Raises:
        ValueError: batch_size does not divide evenly.
    """
    device = torch.device(device)
    rounds, batch_round = _split_batch(batch_size, batch_gpu)
    _seed_everything(seed)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    dist.print0('Loading dataset...')
    dataset = dnnlib.util.construct_class_by_name(**dataset_kwargs)
    dist.print0('Constructing network...')
    run = _make_run(network_kwargs, optimizer_kwargs, dataset, device)
    if dist.get_rank() == 0:
        _print_summary(run.net, batch_round, device)
    loss_fn = dnnlib.util.construct_class_by_name(**loss_kwargs)
    augment_pipe = dnnlib.util.construct_class_by_name(**augment_kwargs) if augment_kwargs else None
    if resume_pkl is not None:
        dist.print0(f'Loading network weights from {resume_pkl}...')
        run.transfer(resume_pkl)
    if resume_state_dump is not None:
        dist.print0(f'Loading training state from {resume_state_dump}...')
        run.load(resume_state_dump, device)

    batches = _endless_batches(dataset, batch_round, seed, run.cur_nimg, data_loader_kwargs, device)
    ddp = _distribute(run.net, device)
    snapshot = {'loss_fn': loss_fn, 'augment_pipe': augment_pipe, 'dataset_kwargs': dict(dataset_kwargs)}
    reporter = _Reporter(run_dir, total_kimg, device)

    def objective(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = loss_fn(ddp, images, labels, augment_pipe)
        training_stats.report('Loss/loss', loss)
        return loss.sum() * (loss_scaling / (batch_round * rounds))

    dist.print0(f'Training for {total_kimg} kimg...\n')
    while True:
        lr = optimizer_kwargs['lr'] * min(run.cur_nimg / max(lr_rampup_kimg * 1000, 1e-8), 1)
        _gradient_step(run.optimizer, ddp, objective, [next(batches) for _ in range(rounds)], lr)
        run.update_ema(batch_size, ema_halflife_kimg, ema_rampup_ratio)
        run.cur_nimg += batch_size
        done = run.cur_nimg >= total_kimg * 1000 or dist.should_stop()
        if not done and run.cur_tick > 0 and run.cur_nimg < run.tick_start_nimg + kimg_per_tick * 1000:
            continue

        reporter.end_tick(run)
        tick, kimg = run.cur_tick, f'{run.cur_nimg // 1000:06d}'
        run.cur_tick, run.tick_start_nimg = tick + 1, run.cur_nimg
        if done or tick % snapshot_ticks == 0:
            misc.check_ddp_consistency(run.ema)
            if dist.get_rank() == 0:
                path = os.path.join(run_dir, f'network-snapshot-{kimg}.{snapshot_format}')
                network_io.save_network(run.ema, path, **snapshot)
        if done or (tick > 0 and tick % state_dump_ticks == 0):
            run.save(os.path.join(run_dir, f'training-state-{kimg}.pt'))
        reporter.start_tick()
        if done:
            break
    dist.print0('\nExiting...')


# ----------------------------------------------------------------------------
# State of a run.


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

    @torch.no_grad()
    def update_ema(self, batch_size: int, halflife_kimg: float, rampup_ratio: float | None) -> None:
        """ema ← β ema + (1 − β) net with β = ½^(batch_size / half-life)."""
        halflife_nimg = halflife_kimg * 1000
        if rampup_ratio is not None:
            halflife_nimg = min(halflife_nimg, self.cur_nimg * rampup_ratio)
        beta = 0.5 ** (batch_size / max(halflife_nimg, 1e-8))
        averages: list[torch.Tensor] = list(self.ema.parameters())
        torch._foreach_lerp_(averages, [weight.detach() for weight in self.net.parameters()], 1 - beta)

    def transfer(self, network_pkl: str) -> None:
        """Copy the weights of a network file into net and EMA, name by name."""
        source = network_io.load_network(network_pkl)
        for target in (self.net, self.ema):
            misc.copy_params_and_buffers(source, target)

    def save(self, path: str) -> None:
        """Write the state, with the random number generators of all ranks; to be called on every rank."""
        rng = dist.all_gather_object(_rng_state(next(self.net.parameters()).device))
        if dist.get_rank() != 0:
            return
        counters = {name: getattr(self, name) for name in _COUNTERS}
        modules = {name: getattr(self, name).state_dict() for name in ('net', 'ema', 'optimizer')}
        with dnnlib.util.atomic_write(path) as file:
            torch.save({**modules, **counters, 'rng': rng}, file)

    def load(self, path: str, device: torch.device) -> None:
        state = torch.load(path, map_location='cpu', weights_only=True)
        for name in ('net', 'ema', 'optimizer'):
            getattr(self, name).load_state_dict(state[name])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        if len(state['rng']) == dist.get_world_size():
            _set_rng_state(state['rng'][dist.get_rank()], device)


_COUNTERS = ('cur_nimg', 'cur_tick', 'tick_start_nimg', 'elapsed_sec')


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {'cpu': torch.get_rng_state()}
    if device.type != 'cpu':
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state['cpu'])
    if device.type in state and device.type != 'cpu':
        getattr(torch, device.type).set_rng_state(state[device.type])


# ----------------------------------------------------------------------------
# Set-up.


def _split_batch(batch_size: int, batch_gpu: int | None) -> tuple[int, int]:
    """(rounds, images per round and rank)."""
    world = dist.get_world_size()
    batch_round = min(batch_gpu or batch_size, batch_size // world)
    rounds = batch_size // max(batch_round * world, 1)
    if rounds * batch_round * world != batch_size:
        raise ValueError(
            f'--batch={batch_size} does not split evenly over {world} processes '
            f'with rounds of {batch_gpu or batch_round} images (--batch-gpu)'
        )
    return rounds, batch_round


def _seed_everything(seed: int) -> None:
    np.random.seed((seed * dist.get_world_size() + dist.get_rank()) % 2**31)
    torch.manual_seed(np.random.randint(2**31))


def _make_run(
    network_kwargs: dict[str, Any], optimizer_kwargs: dict[str, Any], dataset: Any, device: torch.device
) -> Run:
    shape = {'img_resolution': dataset.resolution, 'img_channels': dataset.num_channels}
    net = dnnlib.util.construct_class_by_name(**network_kwargs, **shape, label_dim=dataset.label_dim)
    net.train().requires_grad_(True).to(device)
    optimizer = dnnlib.util.construct_class_by_name(params=net.parameters(), **optimizer_kwargs)
    return Run(net=net, ema=copy.deepcopy(net).eval().requires_grad_(False), optimizer=optimizer)


def _print_summary(net: Any, batch: int, device: torch.device) -> None:
    images = torch.zeros([batch, net.img_channels, net.img_resolution, net.img_resolution], device=device)
    sigma, labels = torch.ones([batch], device=device), torch.zeros([batch, net.label_dim], device=device)
    with torch.no_grad():
        misc.print_module_summary(net, [images, sigma, labels], max_nesting=2)


def _endless_batches(
    dataset: Any, batch: int, seed: int, start_idx: int, loader_kwargs: dict[str, Any], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(images in [−1, 1], labels) of this rank, on `device`, from position `start_idx` of the shuffled stream on."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sampler = misc.InfiniteSampler(dataset, rank=rank, num_replicas=world, seed=seed, start_idx=start_idx)
    # A generator of its own: starting the loader draws a number, and must not shift the stream that training uses.
    own_rng = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(dataset, batch, sampler=sampler, generator=own_rng, **loader_kwargs)
    for images, labels in loader:
        yield images.to(device).to(torch.float32) / 127.5 - 1, labels.to(device)


def _distribute(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    if dist.get_world_size() == 1:
        return net
    device_ids = [device] if device.type == 'cuda' else None
    return torch.nn.parallel.DistributedDataParallel(net, device_ids=device_ids)


# ----------------------------------------------------------------------------
# One step.


def _gradient_step(
    optimizer: torch.optim.Optimizer,
    ddp: torch.nn.Module,
    objective: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rounds: list[tuple[torch.Tensor, torch.Tensor]],
    lr: float,
) -> None:
    """Accumulate gradients over the rounds (ranks exchange them in the last), make them finite, update."""
    optimizer.zero_grad(set_to_none=True)
    for i, (images, labels) in enumerate(rounds):
        with misc.ddp_sync(ddp, i == len(rounds) - 1):
            objective(images, labels).backward()
    for group in optimizer.param_groups:
        group['lr'] = lr
        for param in group['params']:
            if param.grad is not None:
                torch.nan_to_num(param.grad, nan=0, posinf=1e5, neginf=-1e5, out=param.grad)
    optimizer.step()


# ----------------------------------------------------------------------------
# Progress.


class _Reporter:
    """The status line and the row of stats.jsonl that each tick ends with. Clocks start with the object."""

    def __init__(self, run_dir: str, total_kimg: float, device: torch.device):
        self._stats_path = os.path.join(run_dir, 'stats.jsonl')
        self._total_kimg = total_kimg
        self._device = device
        self._tick_began = self._tick_ended = time.time()
        self._maintenance_sec = 0.0

    def start_tick(self) -> None:
        """Call after the work between ticks (snapshots, states), which counts as maintenance."""
        self._tick_began = time.time()
        self._maintenance_sec = self._tick_began - self._tick_ended

    def end_tick(self, run: Run) -> None:
        self._tick_ended = time.time()
        tick_sec = self._tick_ended - self._tick_began
        run.elapsed_sec += tick_sec + self._maintenance_sec
        kimg = run.cur_nimg / 1000
        tick_kimg = (run.cur_nimg - run.tick_start_nimg) / 1000
        report = training_stats.report0
        line = [
            f'tick {report("Progress/tick", run.cur_tick):<5d}',
            f'kimg {report("Progress/kimg", kimg):<9.1f}',
            f'time {dnnlib.util.format_time(report("Timing/total_sec", run.elapsed_sec)):<12s}',
            f'sec/tick {report("Timing/sec_per_tick", tick_sec):<7.1f}',
            f'sec/kimg {report("Timing/sec_per_kimg", tick_sec / tick_kimg):<7.2f}',
            f'maintenance {report("Timing/maintenance_sec", self._maintenance_sec):<6.1f}',
            f'cpumem {report("Resources/cpu_mem_gb", _peak_cpu_memory() / 2**30):<6.2f}',
            f'gpumem {report("Resources/peak_gpu_mem_gb", self._peak_gpu_memory("allocated")):<6.2f}',
            f'reserved {report("Resources/peak_gpu_mem_reserved_gb", self._peak_gpu_memory("reserved")):<6.2f}',
        ]
        dist.print0(' '.join(line))
        if self._device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self._device)
        training_stats.default_collector.update()
        if dist.get_rank() == 0:
            with open(self._stats_path, 'a') as file:
                file.write(json.dumps({**training_stats.default_collector.as_dict(), 'timestamp': time.time()}) + '\n')
        dist.update_progress(run.cur_nimg // 1000, int(self._total_kimg))

    def _peak_gpu_memory(self, kind: str) -> float:
        """GiB since the last tick; 0 without CUDA."""
        if self._device.type != 'cuda':
            return 0.0
        return getattr(torch.cuda, f'max_memory_{kind}')(self._device) / 2**30


def _peak_cpu_memory() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024

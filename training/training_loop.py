"""The training loop: images from a dataset, denoising loss, Adam, exponential moving average of the weights.

`training_loop` is the way in. A `Trainer` makes the steps, each `fetch`, `accumulate`, `update`; `Outputs` writes what
a tick leaves: a status line, and now and then snapshots, sample sheets and states. All that changes is in a `Run`
(`training.run_state`), which is what a state file holds.
"""

import contextlib
import copy
import itertools
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch

import dnnlib
from torch_utils import distributed as dist
from torch_utils import misc, network_io, training_stats
from torch_utils.interrupts import Interrupts, outlast_signals
from training import fast, winograd
from training.reporter import Reporter, TensorBoard, draw_losses
from training.run_state import Run

MAX_WARNINGS = 10  # of losses that are not finite


@dataclass(kw_only=True)
class Config:
    """What a run is asked to do: the keywords of `training_loop`. 1 kimg is 1000 images shown to the network.

    Attributes:
        …_kwargs: name a class (`class_name`) and its arguments.
        batch_size, batch_gpu: a step sees `batch_size` images, split evenly over the ranks and into rounds of at most
            `batch_gpu` images per rank. The gradient is that of the mean over the images of the loss summed over
            pixels, times `loss_scaling` (never undone: Adam does not mind).
        lr_rampup_kimg: the learning rate is linear from 0 up to there, constant afterwards.
        ema_halflife_kimg, ema_rampup_ratio: the half-life of the EMA is the first, but at most this ratio of the images
            seen so far (None: no such limit).
        kimg_per_tick, snapshot_ticks, state_dump_ticks: every `snapshot_ticks` ticks, first after the first step, and
            at the end, the EMA network is saved as network-snapshot-KIMG.pkl (with loss and augmentation) or
            .safetensors (without), by `snapshot_format`; every `state_dump_ticks`, not after the first step, and at the
            end, the state as training-state-KIMG.pt.
        draw_samples: called on every rank with the EMA network at each snapshot; what it returns on rank 0, a uint8
            picture [H, W, C], becomes samples-KIMG.png.
        plot, tensorboard: draw loss.png at each snapshot; write events for TensorBoard in each tick.
        resume_pkl: start from the weights of that network. resume_state_dump: go on from that state, with the random
            numbers and the data order that an uninterrupted run would have had; then `resume_pkl` is the snapshot
            beside it, which EDM's states need. resume_kimg: not used, the state knows it.
        trust_pickle: run the code in `resume_pkl` and `resume_state_dump`.
        bf16: run the network under bfloat16 autocast, weights and optimizer in float32.
    """

    dataset_kwargs: dict[str, Any]
    data_loader_kwargs: dict[str, Any]
    network_kwargs: dict[str, Any]
    loss_kwargs: dict[str, Any]
    optimizer_kwargs: dict[str, Any]
    augment_kwargs: dict[str, Any] | None = None
    run_dir: str = '.'
    seed: int = 0
    batch_size: int = 512
    batch_gpu: int | None = None
    total_kimg: float = 200_000
    ema_halflife_kimg: float = 500
    ema_rampup_ratio: float | None = 0.05
    lr_rampup_kimg: float = 10_000
    loss_scaling: float = 1
    kimg_per_tick: float = 50
    snapshot_ticks: int = 50
    state_dump_ticks: int = 500
    snapshot_format: str = 'pkl'
    draw_samples: Callable[[torch.nn.Module], np.ndarray | None] | None = None
    plot: bool = False
    tensorboard: bool = False
    resume_pkl: str | None = None
    resume_state_dump: str | None = None
    resume_kimg: int = 0
    trust_pickle: bool = False
    cudnn_benchmark: bool = True
    bf16: bool = False
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)  # a name will do

    def is_done(self, nimg: int) -> bool:
        return nimg >= self.total_kimg * 1000

    def lr(self, nimg: int) -> float:
        return self.optimizer_kwargs['lr'] * min(nimg / max(self.lr_rampup_kimg * 1000, 1e-8), 1)


def training_loop(**options: Any) -> None:
    """Train a network; write snapshots, states and statistics to `run_dir`. The options are the fields of `Config`.

    SIGINT, SIGTERM and SIGHUP, or `distributed.should_stop`, end the run after the step in progress, with a state file
    and a snapshot of the network.

    Raises:
        ValueError: `batch_size` does not divide evenly, or a file to resume from does not fit.
        OSError: a file cannot be read or written.
    """
    config = Config(**options)
    split_batch(config.batch_size, config.batch_gpu)
    _set_up_torch(config)
    dist.print0('Loading dataset...')
    dataset = dnnlib.util.construct_class_by_name(**config.dataset_kwargs)
    run = _start_run(config, dataset)
    if config.is_done(run.cur_nimg):
        dist.print0(f'This run is complete: {run.cur_nimg / 1000:.1f} of {config.total_kimg} kimg')
        return
    trainer = Trainer(config, run, dataset)
    outputs = Outputs(config, trainer)
    dist.print0(f'Training for {config.total_kimg} kimg...\n')
    with Interrupts() as interrupts, contextlib.closing(trainer):
        _train(trainer, outputs, interrupts)
    dist.print0('\nExiting...')


def _train(trainer: 'Trainer', outputs: 'Outputs', interrupts: Interrupts) -> None:
    """Steps and ticks, to the end of the run or to an interrupt, which all ranks heed after the same step."""
    config, run = trainer.config, trainer.run
    stop_asked = dist.AnyRank(config.device)
    done = False
    while not done:
        trainer.step()
        done = config.is_done(run.cur_nimg)
        stopped = stop_asked(interrupts.received is not None or dist.should_stop()) and not done
        if done or run.tick_is_over(config.kimg_per_tick):
            outputs.end_tick(done)
        if stopped:
            path = outputs.save_state()
            outputs.save_network()
            dist.print0(f'\nStopped by {interrupts.received or "request"} at {run.cur_nimg / 1000:.1f} kimg.')
            dist.print0(f'The state is in {path}; continue with the same options and --resume={path} (no --transfer),')
            dist.print0('or, with --nosubdir, with the same command.')
            return


# ----------------------------------------------------------------------------
# Set-up.


def split_batch(batch_size: int, batch_gpu: int | None) -> tuple[int, int]:
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


def _set_up_torch(config: Config) -> None:
    """Seeds, one for each rank, and arithmetic without shortcuts."""
    np.random.seed((config.seed * dist.get_world_size() + dist.get_rank()) % 2**31)
    torch.manual_seed(np.random.randint(2**31))
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _start_run(config: Config, dataset: Any) -> Run:
    """A new network, or that of the file to start from or to resume."""
    dist.print0('Constructing network...')
    shape = {'img_resolution': dataset.resolution, 'img_channels': dataset.num_channels}
    net = dnnlib.util.construct_class_by_name(**config.network_kwargs, **shape, label_dim=dataset.label_dim)
    set_memory_format(fast.install(net).train().requires_grad_(True).to(config.device))
    optimizer = make_optimizer(net, config.optimizer_kwargs)
    run = Run(net=net, ema=copy.deepcopy(net).eval().requires_grad_(False), optimizer=optimizer)
    if dist.get_rank() == 0:
        _print_summary(net, split_batch(config.batch_size, config.batch_gpu)[1], config.device)
    if config.resume_state_dump is not None:
        dist.print0(f'Loading training state from {config.resume_state_dump}...')
        run.load(config.resume_state_dump, config.resume_pkl, config.trust_pickle)
    elif config.resume_pkl is not None:
        dist.print0(f'Loading network weights from {config.resume_pkl}...')
        run.transfer(config.resume_pkl, config.trust_pickle)
    return run


def set_memory_format(net: torch.nn.Module) -> torch.nn.Module:
    """Channels last on a CPU, for networks most of whose convolutions are wide enough to gain by it (`_winograd_pays`).

    Narrow ones lose in the normalizations what they gain in the convolutions: benchmarks/train.py.
    """
    kernels = [weight for weight in net.parameters() if weight.ndim == 4 and weight.device.type == 'cpu']
    wide = [kernel for kernel in kernels if kernel.shape[0] * kernel.shape[1] >= winograd.WIDE]
    if 2 * sum(map(torch.numel, wide)) > sum(map(torch.numel, kernels)):
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def make_optimizer(net: torch.nn.Module, optimizer_kwargs: dict[str, Any]) -> torch.optim.Optimizer:
    """Adam in one kernel for all weights, where there is one; benchmarks/train.py has what that saves."""
    kwargs = dict(optimizer_kwargs)
    if kwargs['class_name'] == 'torch.optim.Adam' and next(net.parameters()).device.type in ('cuda', 'cpu'):
        kwargs.setdefault('fused', True)
    return dnnlib.util.construct_class_by_name(params=net.parameters(), **kwargs)


def _print_summary(net: Any, batch: int, device: torch.device) -> None:
    images = torch.zeros([batch, net.img_channels, net.img_resolution, net.img_resolution], device=device)
    sigma, labels = torch.ones([batch], device=device), torch.zeros([batch, net.label_dim], device=device)
    with torch.no_grad():
        misc.print_module_summary(net, [images, sigma, labels], max_nesting=2)


# ----------------------------------------------------------------------------
# Steps.

Batch = tuple[torch.Tensor, torch.Tensor]  # images in [−1, 1], labels; on the device


class Trainer:
    """The steps of a run on this rank.

    Attributes:
        lr: learning rate of the last step.
        grad_norms: of the steps since they were last taken away; recorded for TensorBoard only.
    """

    def __init__(self, config: Config, run: Run, dataset: Any):
        self.config, self.run, self.dataset = config, run, dataset
        self.rounds, self.batch_round = split_batch(config.batch_size, config.batch_gpu)
        self.loss_fn = dnnlib.util.construct_class_by_name(**config.loss_kwargs)
        augment = config.augment_kwargs
        self.augment_pipe = dnnlib.util.construct_class_by_name(**augment) if augment else None
        self.lr = 0.0
        self.grad_norms: list[torch.Tensor] = []
        self._ddp = _distribute(run.net, config.device)
        self._batches = self._endless_batches()
        self._finite: list[torch.Tensor] = []  # per round of the last step: which images have a finite loss
        self._warnings = 0

    def step(self) -> None:
        """One update of the weights, from `batch_size` images over all ranks."""
        batches = self.fetch()
        self.warn_if_not_finite()  # of the step before, so that a GPU is not waited for
        self.accumulate(batches)
        self.update()
        self.run.cur_nimg += self.config.batch_size

    def fetch(self) -> list[Batch]:
        """The images of this rank for one step, one batch per round."""
        return [next(self._batches) for _ in range(self.rounds)]

    def close(self) -> None:
        """End the loading processes."""
        self._batches.close()

    def accumulate(self, batches: list[Batch]) -> None:
        """Add up the gradients of the rounds; the ranks exchange them in the last."""
        self.run.optimizer.zero_grad(set_to_none=True)
        for i, batch in enumerate(batches):
            with misc.ddp_sync(self._ddp, i == len(batches) - 1):
                self.objective(*batch).backward()

    def objective(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What a round minimizes: the sum of the loss over its pixels, over the images of this rank's step."""
        bf16 = self.config.bf16
        with torch.autocast(self.config.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = self.loss_fn(self._ddp, images, labels, self.augment_pipe)
        training_stats.report('Loss/loss', loss)
        self._finite.append(loss.detach().flatten(1).isfinite().all(1))
        return loss.sum() * (self.config.loss_scaling / (self.batch_round * self.rounds))

    def update(self) -> None:
        """Make the gradients finite, move the weights, and let the EMA follow."""
        self.lr = self.config.lr(self.run.cur_nimg)
        for group in self.run.optimizer.param_groups:
            group['lr'] = self.lr
        grads = [param.grad for param in self.run.net.parameters() if param.grad is not None]
        for grad in grads:
            torch.nan_to_num(grad, nan=0, posinf=1e5, neginf=-1e5, out=grad)
        if self.config.tensorboard:
            self.grad_norms.append(torch.stack(torch._foreach_norm(grads)).norm())
        self.run.optimizer.step()
        self.run.update_ema(self.config.batch_size, self.config.ema_halflife_kimg, self.config.ema_rampup_ratio)

    def warn_if_not_finite(self) -> None:
        """Tell of images in the last step whose loss is infinite or undefined; training goes on."""
        if not self._finite:
            return
        bad = (~torch.cat(self._finite)).nonzero().flatten().tolist()
        self._finite = []
        if not bad or self._warnings >= MAX_WARNINGS:
            return
        self._warnings += 1
        nimg = self.run.cur_nimg - self.config.batch_size
        order = list(itertools.islice(self._sampler(nimg), self.rounds * self.batch_round))
        print(
            f'Warning: step {nimg // self.config.batch_size + 1}, rank {dist.get_rank()}: the loss of {len(bad)} of '
            f'{len(order)} images is not finite; they are images {", ".join(str(order[i]) for i in bad[:8])}'
            f'{", …" if len(bad) > 8 else ""} of the dataset. In the gradient NaN becomes 0, and ±inf ±1e5.'
            + (' This is the last warning of this kind.' if self._warnings == MAX_WARNINGS else '')
        )

    def _sampler(self, start_idx: int) -> misc.InfiniteSampler:
        """This rank's share of the shuffled stream of images, from a position of the whole stream on."""
        rank, world = dist.get_rank(), dist.get_world_size()
        return misc.InfiniteSampler(
            self.dataset, rank=rank, num_replicas=world, seed=self.config.seed, start_idx=start_idx
        )

    def _endless_batches(self) -> Generator[Batch, None, None]:
        # A generator of its own: starting the loader draws a number, and must not shift the stream that training uses.
        loader = torch.utils.data.DataLoader(
            self.dataset,
            self.batch_round,
            sampler=self._sampler(self.run.cur_nimg),
            generator=torch.Generator().manual_seed(self.config.seed),
            worker_init_fn=outlast_signals,
            **self.config.data_loader_kwargs,
        )
        device, batches = self.config.device, iter(loader)
        try:
            for images, labels in batches:
                images, labels = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
                yield images.to(torch.float32) / 127.5 - 1, labels
        finally:
            if loader.num_workers:  # now, not when an error that came from one of them has been forgotten
                batches._shutdown_workers()  # type: ignore[attr-defined]


def _distribute(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    if dist.get_world_size() == 1:
        return net
    device_ids = [device] if device.type == 'cuda' else None
    return torch.nn.parallel.DistributedDataParallel(net, device_ids=device_ids)


# ----------------------------------------------------------------------------
# Files of a run.


class Outputs:
    """What a run leaves in its directory. Every rank has to call the methods."""

    def __init__(self, config: Config, trainer: Trainer):
        self.config, self.trainer, self.run = config, trainer, trainer.run
        self._reporter = Reporter(config.run_dir, config.total_kimg, config.device)
        tensorboard = config.tensorboard and dist.get_rank() == 0
        self._tensorboard = TensorBoard(config.run_dir, self.run.cur_nimg) if tensorboard else None

    def end_tick(self, done: bool) -> None:
        """A line of progress; a snapshot and a state when it is time for them, or when the run is done."""
        self.trainer.warn_if_not_finite()
        self._reporter.end_tick(self.run)
        self._report_to_tensorboard()
        tick = self.run.cur_tick
        self.run.cur_tick, self.run.tick_start_nimg = tick + 1, self.run.cur_nimg
        if done or tick % self.config.snapshot_ticks == 0:
            self.save_snapshot()
        if done or (tick > 0 and tick % self.config.state_dump_ticks == 0):
            self.save_state()
        self._reporter.start_tick()

    def save_state(self) -> str:
        path = self._path('training-state-{kimg}.pt')
        self.run.save(path)
        return path

    def save_snapshot(self) -> None:
        """The EMA network, a sheet of images drawn with it, and the loss so far."""
        self.save_network()
        if self.config.draw_samples is not None:
            picture = self.config.draw_samples(self.run.ema)
            if picture is not None:
                self._save_picture(picture, self._path('samples-{kimg}.png'))
        if self.config.plot and dist.get_rank() == 0:
            path = os.path.join(self.config.run_dir, 'loss.png')
            draw_losses({'loss': self._reporter.stats_path}, path)

    def save_network(self) -> None:
        try:
            misc.check_ddp_consistency(self.run.ema)
        except AssertionError as err:
            raise ValueError(
                f'the networks of the processes have drifted apart ({err}); resume the last state'
            ) from None
        if dist.get_rank() != 0:
            return
        path = self._path(f'network-snapshot-{{kimg}}.{self.config.snapshot_format}')
        beside = {
            'loss_fn': self.trainer.loss_fn,
            'augment_pipe': self.trainer.augment_pipe,
            'dataset_kwargs': dict(self.config.dataset_kwargs),
        }
        network_io.save_network(self.run.ema, path, **beside)

    def _save_picture(self, picture: np.ndarray, path: str) -> None:
        with dnnlib.util.atomic_write(path) as file:
            PIL.Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(file, format='png')
        if self._tensorboard is not None:
            self._tensorboard.add_samples(self.run.cur_nimg, picture)

    def _report_to_tensorboard(self) -> None:
        norms, self.trainer.grad_norms = self.trainer.grad_norms, []
        if self._tensorboard is not None:
            self._tensorboard.end_tick(self.run.cur_nimg, self.trainer.lr, float(torch.stack(norms).mean()))

    def _path(self, name: str) -> str:
        return os.path.join(self.config.run_dir, name.format(kimg=f'{self.run.cur_nimg // 1000:06d}'))

"""Train a denoising network on a dataset: images → network-snapshot-*.pkl or *.safetensors.

The command line becomes a plain config (`training_options.json`), the config becomes a call of
`training.training_loop.training_loop`.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import click
import numpy as np
import torch

import dnnlib
from dnnlib.options import FiniteRange, ListOf, PositiveInts, at_least_one, user_path
from images.pictures import contact_sheet
from sampling import choose
from sampling.draw import generate_images, split_seeds
from torch_utils import distributed as dist
from torch_utils import misc, training_stats
from training import networks, run_options, run_state
from training.training_loop import split_batch, training_loop

ARCHS: dict[str, dict[str, Any]] = {
    'ddpmpp': {
        'model_type': 'SongUNet',
        'embedding_type': 'positional',
        'encoder_type': 'standard',
        'decoder_type': 'standard',
        'channel_mult_noise': 1,
        'resample_filter': [1, 1],
        'model_channels': 128,
        'channel_mult': [2, 2, 2],
    },
    'ncsnpp': {
        'model_type': 'SongUNet',
        'embedding_type': 'fourier',
        'encoder_type': 'residual',
        'decoder_type': 'standard',
        'channel_mult_noise': 2,
        'resample_filter': [1, 3, 3, 1],
        'model_channels': 128,
        'channel_mult': [2, 2, 2],
    },
    'adm': {'model_type': 'DhariwalUNet', 'model_channels': 192, 'channel_mult': [1, 2, 3, 4]},
}
PRECONDS = {
    'vp': ('training.networks.VPPrecond', 'training.loss.VPLoss'),
    've': ('training.networks.VEPrecond', 'training.loss.VELoss'),
    'edm': ('training.networks.EDMPrecond', 'training.loss.EDMLoss'),
}
AUGMENTATIONS = {'xflip': 1e8, 'yflip': 1, 'scale': 1, 'rotate_frac': 1, 'aniso': 1, 'translate_frac': 1}
AUGMENT_DIM = 9  # numbers by which AUGMENTATIONS tells the network what it did


def _noise_distribution(opts: dnnlib.EasyDict) -> dict[str, float]:
    """P_mean and P_std of EDMLoss, where given."""
    return {name: opts[name] for name in ['P_mean', 'P_std'] if opts[name] is not None}


def make_config(opts: dnnlib.EasyDict, dataset: Any, state: str | None = None) -> dict[str, Any]:
    """The config of a run, which goes on from the file `state`: what training_options.json says, in its order."""
    network_class, loss_class = PRECONDS[opts.precond]
    network_kwargs = {**ARCHS[opts.arch], 'class_name': network_class}
    if opts.cbase is not None:
        network_kwargs['model_channels'] = opts.cbase
    if opts.cres is not None:
        network_kwargs['channel_mult'] = opts.cres
    if opts.num_blocks is not None:
        network_kwargs['num_blocks'] = opts.num_blocks
    if opts.augment:
        network_kwargs['augment_dim'] = AUGMENT_DIM
    network_kwargs.update(dropout=opts.dropout, use_fp16=opts.fp16)
    if opts.label_dropout:
        network_kwargs['label_dropout'] = opts.label_dropout

    dataset_kwargs = {
        'class_name': 'training.dataset.ImageFolderDataset',
        'path': opts.data,
        'use_labels': opts.cond,
        'xflip': opts.xflip,
        'cache': opts.cache,
        'resolution': dataset.resolution,
        'max_size': len(dataset) // (2 if opts.xflip else 1),
    }
    config: dict[str, Any] = {
        'dataset_kwargs': dataset_kwargs,
        'data_loader_kwargs': {'pin_memory': True, 'num_workers': opts.workers, 'prefetch_factor': 2},
        'network_kwargs': network_kwargs,
        'loss_kwargs': {'class_name': loss_class, **_noise_distribution(opts)},
        'optimizer_kwargs': {'class_name': 'torch.optim.Adam', 'lr': opts.lr, 'betas': [0.9, 0.999], 'eps': 1e-8},
    }
    if opts.augment:
        config['augment_kwargs'] = {'class_name': 'training.augment.AugmentPipe', 'p': opts.augment, **AUGMENTATIONS}
    config.update(
        total_kimg=max(int(opts.duration * 1000), 1),
        ema_halflife_kimg=int(opts.ema * 1000) or opts.ema * 1000,
        lr_rampup_kimg=opts.lr_rampup * 1000,
        batch_size=opts.batch,
        batch_gpu=opts.batch_gpu,
        loss_scaling=opts.ls,
        cudnn_benchmark=opts.bench,
        bf16=opts.bf16,
        kimg_per_tick=opts.tick,
        snapshot_ticks=opts.snap,
        state_dump_ticks=opts.dump,
        snapshot_format=opts.format,
        trust_pickle=opts.trust_pickle,
        seed=opts.seed,
    )
    config.update(samples=opts.samples, samplers=opts.sampler, plot=opts.plot, tensorboard=opts.tensorboard)
    began_with_transfer = run_options.beside(state).get('ema_rampup_ratio', 0) is None
    if opts.transfer is not None or began_with_transfer:
        config.update(resume_pkl=opts.transfer, ema_rampup_ratio=None)
    if state is not None:
        config.update(resume_kwargs(state))
    return config


def find_state(resume: str | None, run_dir: str, nosubdir: bool = False) -> str | None:
    """The state file that `--resume` means, or None for a fresh start.

    A file is itself, a folder its newest state, `latest` the newest state of the newest run named like `run_dir`. Without
    --resume, the newest state in `run_dir`: the same command with --nosubdir goes on. Damaged states are passed over.
    """
    if resume is None:
        return _latest_state(run_dir)
    if resume == 'latest':
        folders = [run_dir] if nosubdir else _runs_like(run_dir)
        state = next(filter(None, map(_latest_state, folders)), None)
        if state is None:
            looked = ', '.join(folders) or f'{os.path.dirname(run_dir)}, which has no run of this name'
            raise click.ClickException(f'--resume=latest: found no training-state-*.pt in {looked}')
        return state
    if os.path.isdir(resume):
        state = _latest_state(resume)
        if state is None:
            raise click.ClickException(f'--resume={resume}: no training-state-*.pt in this folder')
        return state
    if not run_state.STATE_NAME.fullmatch(os.path.basename(resume)) or not os.path.isfile(resume):
        raise click.ClickException(
            f'--resume={resume}: give a training-state-*.pt file, the folder of a run, or the word latest'
        )
    return resume


def _latest_state(folder: str) -> str | None:
    try:
        return run_state.latest_state(folder)
    except ValueError as err:
        raise click.ClickException(str(err)) from None


def _runs_like(run_dir: str) -> list[str]:
    """The folders beside a new `run_dir` that have its name, up to the number, newest first."""
    outdir, name = os.path.split(run_dir)
    pattern = r'\d+' + re.escape(name.lstrip('0123456789'))
    runs = [entry for entry in os.listdir(outdir) if re.fullmatch(pattern, entry)] if os.path.isdir(outdir) else []
    return [os.path.join(outdir, entry) for entry in sorted(runs, key=lambda entry: -int(entry.split('-')[0]))]


def resume_kwargs(state: str) -> dict[str, Any]:
    """The part of the config that continues from a state file, with the snapshot that EDM's states need."""
    kimg = run_state.state_kimg(state)
    snapshot = os.path.join(os.path.dirname(state), f'network-snapshot-{kimg:06d}.pkl')
    return {
        'resume_pkl': snapshot if os.path.isfile(snapshot) else None,
        'resume_kimg': kimg,
        'resume_state_dump': state,
    }


def draw_samples(
    net: Any, samplers: Sequence[str], num: int, max_batch: int, device: torch.device, vectors: np.ndarray | None = None
) -> np.ndarray | None:
    """Images of seeds 0 … num − 1, drawn by each sampler: one picture, on rank 0; the ranks share the work.

    `vectors`: the labels of the seeds, in turns, where the data set has no classes to draw.
    """
    batches = split_seeds(range(num), max_batch)
    mine = dist.my_share(batches)
    groups = []
    for name in samplers:
        sampler = choose.make(name, num_steps=choose.samplers()[name].num_steps)
        drawn = dist.all_gather_object(list(generate_images(net, mine, sampler, device, vectors=vectors)))
        by_seed = {
            seed: image for part in drawn for seeds, images in part for seed, image in zip(seeds, images, strict=True)
        }
        groups.append(np.stack([by_seed[seed] for seed in range(num)]))
    return contact_sheet(groups) if dist.get_rank() == 0 else None


def run_dir_name(opts: dnnlib.EasyDict, dataset_name: str) -> str:
    """Run directory below --outdir: 00000-NAME-cond-ARCH-PRECOND-gpusN-batchN-fp32[-DESC], numbered on."""
    taken = [re.match(r'\d+', entry) for entry in os.listdir(opts.outdir)] if os.path.isdir(opts.outdir) else []
    run_id = max((int(m.group()) for m in taken if m is not None), default=-1) + 1
    dtype = 'fp16' if opts.fp16 else 'bf16' if opts.bf16 else 'fp32'
    parts = [
        f'{run_id:05d}',
        dataset_name,
        'cond' if opts.cond else 'uncond',
        opts.arch,
        opts.precond,
        f'gpus{dist.get_world_size()}',
        f'batch{opts.batch}',
        dtype,
        *([opts.desc] if opts.desc else []),
    ]
    return os.path.join(opts.outdir, '-'.join(parts))


# ----------------------------------------------------------------------------
# Command line.


positive = FiniteRange(min=0, min_open=True)
fraction = FiniteRange(min=0, max=1)


# fmt: off
@click.command(context_settings={'show_default': True, 'max_content_width': 120})
# Main options.
@click.option('--outdir',        help='Where to save the results', metavar='DIR', type=user_path, required=True)
@click.option('--data',          help='Dataset', metavar='ZIP|DIR', type=user_path, required=True)
@click.option('--cond',          help='Train a class-conditional network', metavar='BOOL', type=bool, default=False)
@click.option('--arch',          help='Network architecture', type=click.Choice(list(ARCHS)), default='ddpmpp')
@click.option('--precond',       help='Preconditioning and loss', type=click.Choice(list(PRECONDS)), default='edm')
# Hyperparameters.
@click.option('--duration',      help='Training duration', metavar='MIMG', type=positive, default=200)
@click.option('--batch',         help='Total batch size', metavar='INT', type=at_least_one, default=512)
@click.option('--batch-gpu',     help='Limit the batch of one process at a time', metavar='INT', type=at_least_one)
@click.option('--cbase',         help='Channels at full resolution  [default: by --arch]', metavar='INT', type=at_least_one)
@click.option('--cres',          help='Channel multiples per resolution  [default: by --arch]', metavar='LIST', type=PositiveInts())
@click.option('--num-blocks',    help='Residual blocks per resolution  [default: by --arch]', metavar='INT', type=at_least_one)
@click.option('--lr',            help='Learning rate', metavar='FLOAT', type=positive, default=1e-3)
@click.option('--lr-rampup',     help='Learning rate grows over', metavar='MIMG', type=FiniteRange(min=0), default=10)
@click.option('--ema',           help='Half-life of the weight average', metavar='MIMG', type=FiniteRange(min=0), default=0.5)
@click.option('--dropout',       help='Dropout probability', metavar='FLOAT', type=fraction, default=0.13)
@click.option('--label-dropout', help='Probability of an image without its label', metavar='FLOAT', type=fraction, default=0)
@click.option('--augment',       help='Augmentation probability, 0 = off', metavar='FLOAT', type=fraction, default=0.12)
@click.option('--P_mean', 'P_mean', help='Mean of ln sigma in training, with --precond=edm  [default: -1.2]', metavar='FLOAT', type=FiniteRange(min=-10, max=10))
@click.option('--P_std', 'P_std', help='Its standard deviation, with --precond=edm  [default: 1.2]', metavar='FLOAT', type=FiniteRange(min=0, max=10, min_open=True))
@click.option('--xflip',         help='Add mirrored images to the dataset', metavar='BOOL', type=bool, default=False)
# Performance.
@click.option('--fp16',          help='Train in float16 on CUDA', metavar='BOOL', type=bool, default=False)
@click.option('--bf16',          help='Train under bfloat16 autocast', metavar='BOOL', type=bool, default=False)
@click.option('--ls',            help='Loss scaling', metavar='FLOAT', type=positive, default=1)
@click.option('--bench',         help='Let cuDNN search for fast kernels', metavar='BOOL', type=bool, default=True)
@click.option('--cache',         help='Keep the dataset in memory', metavar='BOOL', type=bool, default=True)
@click.option('--workers',       help='Data loading processes, 0 = none', metavar='INT', type=click.IntRange(min=0), default=1)
@click.option('--device',        help='cuda, mps or cpu  [default: the first there is]', metavar='NAME')
# Output.
@click.option('--desc',          help='Text to add to the name of the run directory', metavar='STR')
@click.option('--nosubdir',      help='Write into --outdir itself', is_flag=True)
@click.option('--tick',          help='Print progress every', metavar='KIMG', type=at_least_one, default=50)
@click.option('--snap',          help='Save a network every', metavar='TICKS', type=at_least_one, default=50)
@click.option('--samples',       help='Draw so many images with every network saved, by each of --sampler', metavar='INT', type=click.IntRange(min=0), default=0)
@click.option('--sampler',       help='Samplers of --samples, from left to right', metavar='LIST', type=ListOf(click.Choice(list(choose.samplers()))), default='heun,rk')
@click.option('--plot',          help='Draw the loss curve, loss.png, with every network saved', metavar='BOOL', type=bool, default=False)
@click.option('--tensorboard',   help='Write events for TensorBoard', metavar='BOOL', type=bool, default=False)
@click.option('--format',        help='Format of the networks saved', type=click.Choice(['pkl', 'safetensors']), default='pkl')
@click.option('--dump',          help='Save the training state every', metavar='TICKS', type=at_least_one, default=500)
@click.option('--seed',          help='Random seed  [default: random]', metavar='INT', type=click.IntRange(0, 2**32 - 1))
@click.option('--transfer',      help='Start from the weights of this network', metavar='NAME|PATH|URL', type=user_path)
@click.option('--resume',        help='Go on from this state, the newest in a folder, or that of the newest run', metavar='PT|DIR|latest', type=user_path)
@click.option('--trust-pickle',  help='Run the code in the files of --transfer and --resume', is_flag=True)
@click.option('-n', '--dry-run', help='Print the config and exit', is_flag=True)
def main(**kwargs):
    """Train a network that denoises images.

    \b
    # A small class-conditional network for MNIST, on a CPU
    python train.py --outdir=training-runs --data=datasets/mnist-32x32.zip --cond=1 \\
        --cbase=32 --cres=1,2,2 --num-blocks=1 --batch=32 --lr-rampup=0.02 --augment=0 --duration=0.5

    \b
    # CIFAR-10 on eight GPUs
    torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs \\
        --data=datasets/cifar10-32x32.zip --cond=1 --arch=ddpmpp
    """
    opts = dnnlib.EasyDict(kwargs)
    _check_options(opts)
    torch.multiprocessing.set_start_method('spawn', force=True)
    try:
        device = dist.init(opts.device)
        split_batch(opts.batch, opts.batch_gpu)
    except ValueError as err:
        raise click.ClickException(str(err)) from None
    training_stats.init_multiprocessing(dist.get_rank(), device if dist.get_world_size() > 1 else None)
    dataset = _open_dataset(opts)
    run_dir = opts.outdir if opts.nosubdir else dist.on_rank0(partial(run_dir_name, opts, dataset.name))
    state = dist.on_rank0(partial(find_state, opts.resume, run_dir, opts.nosubdir))
    if opts.seed is None:
        opts.seed = dist.on_rank0(partial(_choose_seed, state))
    config = make_config(opts, dataset, state)
    _check_resolution(config)
    _check_network(config, dataset)
    _print_config(config, opts, dataset, run_dir, device)
    dist.on_rank0(partial(_compare_options, config))
    if opts.dry_run:
        dist.print0('Dry run; exiting.')
        return

    with contextlib.ExitStack() as until_exit:
        run_dir = dist.on_rank0(partial(_make_run_dir, run_dir, opts, dataset.name, config, until_exit))
        _train(config, run_dir, device, dataset)

# fmt: on


def _check_options(opts: dnnlib.EasyDict) -> None:
    """What can be said without a dataset."""
    for one, other in [('transfer', 'resume'), ('fp16', 'bf16')]:
        if opts[one] and opts[other]:
            raise click.ClickException(f'--{one} and --{other} exclude each other')
    for option, package, extra in [('tensorboard', 'tensorboard', 'tensorboard'), ('plot', 'matplotlib', 'plot')]:
        if opts[option] and importlib.util.find_spec(package) is None:
            raise click.ClickException(f'--{option} needs {package}: pip install -e ".[{extra}]"')
    if opts.precond != 'edm' and _noise_distribution(opts):
        raise click.ClickException(
            f'--P_mean and --P_std belong to --precond=edm, and --precond={opts.precond} was given'
        )
    if opts.label_dropout and not opts.cond:
        raise click.ClickException('--label-dropout needs labels: --cond=1')
    if opts.desc and not re.fullmatch(r'[\w.+=,-]{1,100}', opts.desc):
        raise click.ClickException(f'--desc={opts.desc!r}: letters, digits and ._+=,- only, at most 100 of them')


def _open_dataset(opts: dnnlib.EasyDict) -> Any:
    """The dataset, opened once before the run to fail early and to know its size."""
    name = 'training.dataset.ImageFolderDataset'
    try:
        dataset = dnnlib.util.construct_class_by_name(
            class_name=name, path=opts.data, use_labels=opts.cond, xflip=opts.xflip
        )
        if opts.cond and not dataset.has_labels:
            raise click.ClickException(f'--cond=1 needs labels, and {opts.data} has none in its dataset.json')
    except OSError as err:
        raise click.ClickException(f'--data: {dnnlib.util.printable(err)}') from None
    except MemoryError as err:
        raise click.ClickException(f'--data: {explain(err)}') from None
    _, height, width = dataset.image_shape
    if height != width:
        size = 2 ** int(math.log2(min(height, width)))
        raise click.ClickException(
            f'--data={opts.data}: images are {width}x{height}, not square; dataset_tool.py --source={opts.data} '
            f'--dest=FILE.zip --transform=center-crop --resolution={size}x{size} makes a dataset of square ones'
        )
    return dataset


def _check_resolution(config: dict[str, Any]) -> None:
    """The network halves the images once for each entry of --cres after the first."""
    resolution, halvings = config['dataset_kwargs']['resolution'], len(config['network_kwargs']['channel_mult']) - 1
    if resolution % 2**halvings:
        raise click.ClickException(
            f'--data: images of {resolution}x{resolution} cannot be halved {halvings} times; give fewer channel '
            f'multiples (--cres=1,2), or resize with dataset_tool.py to a multiple of {2**halvings}'
        )


def _check_network(config: dict[str, Any], dataset: Any) -> None:
    """Build and run the U-Net without numbers."""
    size, channels, labels = dataset.resolution, dataset.num_channels, dataset.label_dim
    kwargs = {**config['network_kwargs'], 'img_resolution': size, 'label_dim': labels}
    kwargs |= {'in_channels': channels, 'out_channels': channels}
    unet = getattr(networks, kwargs.pop('model_type'))
    del kwargs['class_name'], kwargs['use_fp16']
    try:
        with torch.device('meta'), torch.no_grad():
            unet(**kwargs)(torch.empty(1, channels, size, size), torch.ones(1), torch.empty(1, labels))
    except (RuntimeError, ValueError, ArithmeticError) as err:
        raise click.ClickException(
            f'no network has --cbase={kwargs["model_channels"]}, --cres={kwargs["channel_mult"]}: {dnnlib.util.one_line(err, 150)}; '
            'multiples of 32 always do for --cbase'
        ) from None


def _choose_seed(state: str | None) -> int:
    """That of the run whose state goes on, so that the data order does; else a random one."""
    seed = run_options.beside(state).get('seed')
    if isinstance(seed, int):
        return seed
    return int.from_bytes(os.urandom(4), 'little') % 2**31


def _compare_options(config: dict[str, Any]) -> None:
    """Say what is not as in the run that goes on; refuse what its state does not fit."""
    state = config.get('resume_state_dump')
    before = run_options.beside(state)
    if not before:
        return
    fixed, free = run_options.compare(before, config)
    if fixed:
        raise click.ClickException(
            f'{state} is of another network: {", ".join(fixed)}; give the options of that run, as '
            f'{run_options.NAME} beside it has them, or start a new one in another --outdir'
        )
    if free:
        print(f'Changed since {state}: {", ".join(free)}')


def _make_run_dir(
    run_dir: str, opts: dnnlib.EasyDict, dataset_name: str, config: dict[str, Any], until_exit: contextlib.ExitStack
) -> str:
    """Make the folder, with the options and a log that can be written; what a killed run had half written goes.

    Without --nosubdir the folder is new: where another run has just made it, the one with the next number.
    """
    try:
        os.makedirs(opts.outdir, exist_ok=True)
        while not opts.nosubdir:
            try:
                os.mkdir(run_dir)
                break
            except FileExistsError:
                run_dir = run_dir_name(opts, dataset_name)
                print(f'Another run has made that directory; this one has {run_dir}')
        with open(os.path.join(run_dir, 'log.txt'), 'a'):
            pass
        if not until_exit.enter_context(dnnlib.util.in_use(os.path.join(run_dir, 'log.txt'))):
            raise click.ClickException(f'another run is training in {run_dir}; choose another --outdir')
        for name in os.listdir(run_dir):
            if name.startswith('.tmp_'):
                os.unlink(os.path.join(run_dir, name))
        run_options.save(run_dir, config)
        return run_dir
    except OSError as err:
        raise click.ClickException(f'cannot write to the run directory {run_dir}: {err}') from None


def _train(config: dict[str, Any], run_dir: str, device: torch.device, dataset: Any) -> None:
    """The run, with its log in `run_dir`; what goes wrong becomes one line, in the log as well."""
    log_file = os.path.join(run_dir, 'log.txt') if dist.get_rank() == 0 else None
    with dnnlib.util.Logger(log_file, 'a') if log_file else contextlib.nullcontext():
        try:
            training_loop(run_dir=run_dir, device=device, **_loop_kwargs(config, device, dataset))
            return
        except (OSError, ValueError, RuntimeError, MemoryError) as err:
            message = explain(err)
            if message is None:
                raise
    if log_file is not None:
        with contextlib.suppress(OSError), open(log_file, 'a', encoding='utf-8') as file:
            file.write(f'Error: {message}\n')
    raise click.ClickException(message)


def explain(err: Exception) -> str | None:
    """One line on what ended a run; None for an error that only its traceback explains."""
    if isinstance(err, dnnlib.util.FailedWriteError):
        return f'{err}: make room, and continue the run with --resume'
    if misc.is_out_of_memory(err):
        return (
            f'out of memory: {dnnlib.util.one_line(err, 200)}; lower --batch-gpu, which changes nothing but the speed'
        )
    if not isinstance(err, RuntimeError):
        # From a loading process the error comes with a traceback, and what it says in the last line.
        return (str(err).strip() or type(err).__name__).splitlines()[-1].removeprefix('OSError: ')
    if dist.lost_peer(err):
        return (
            f'rank {dist.get_rank()} lost contact with another process of this run, which has ended or is unreachable; '
            'see what that one says, and continue with --resume'
        )
    if 'DataLoader worker' in str(err):
        return f'{str(err).splitlines()[0]} A loading process has died; try --workers=0, or look for a lack of memory'
    return None


def _loop_kwargs(config: dict[str, Any], device: torch.device, dataset: Any) -> dict[str, Any]:
    """The config as `training_loop` takes it, with loader settings that this machine can honour."""
    kwargs = {**config, 'data_loader_kwargs': dict(config['data_loader_kwargs'])}
    loader = kwargs['data_loader_kwargs']
    loader['pin_memory'] = loader['pin_memory'] and device.type == 'cuda'
    if loader['num_workers'] == 0:
        del loader['prefetch_factor']
    num_samples, samplers = kwargs.pop('samples'), kwargs.pop('samplers')
    if num_samples:
        _, batch = split_batch(config['batch_size'], config['batch_gpu'])
        of_classes = dataset.has_onehot_labels or not dataset.has_labels
        first = range(0 if of_classes else min(num_samples, len(dataset)))
        vectors = np.stack([dataset.get_label(i) for i in first]) if first else None
        kwargs['draw_samples'] = partial(
            draw_samples, samplers=samplers, num=num_samples, max_batch=batch, device=device, vectors=vectors
        )
    return kwargs


def _print_config(
    config: dict[str, Any], opts: dnnlib.EasyDict, dataset: Any, run_dir: str, device: torch.device
) -> None:
    dist.print0('\nTraining config:')
    dist.print0(json.dumps(config, indent=2))
    dist.print0(f'\nOutput directory:        {run_dir}')
    dist.print0(f'Dataset path:            {opts.data}')
    dist.print0(
        f'Dataset:                 {len(dataset)} images, {dataset.num_channels}x{dataset.resolution}x{dataset.resolution}'
    )
    dist.print0(f'Class-conditional:       {opts.cond}')
    dist.print0(f'Network architecture:    {opts.arch}')
    dist.print0(f'Preconditioning & loss:  {opts.precond}')
    dist.print0(f'Processes, device:       {dist.get_world_size()} x {device.type}')
    dist.print0(f'Batch size:              {opts.batch}\n')


if __name__ == '__main__':
    dnnlib.util.print_any_text()
    main()

"""Train a denoising network on a dataset: images → network-snapshot-*.pkl or *.safetensors.

The command line becomes a plain config (`training_options.json`), the config becomes a call of
`training.training_loop.training_loop`.
"""

import json
import os
import re
from typing import Any

import click
import torch

import dnnlib
from torch_utils import distributed as dist
from torch_utils import training_stats
from training.training_loop import training_loop

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


def make_config(opts: dnnlib.EasyDict, dataset: Any) -> dict[str, Any]:
    """The config of a run: keyword arguments of `training_loop`, in the order of training_options.json."""
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
        'loss_kwargs': {'class_name': loss_class},
        'optimizer_kwargs': {'class_name': 'torch.optim.Adam', 'lr': opts.lr, 'betas': [0.9, 0.999], 'eps': 1e-8},
    }
    if opts.augment:
        config['augment_kwargs'] = {'class_name': 'training.augment.AugmentPipe', 'p': opts.augment, **AUGMENTATIONS}
    config.update(
        total_kimg=max(int(opts.duration * 1000), 1),
        ema_halflife_kimg=int(opts.ema * 1000),
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
        seed=opts.seed,
    )
    if opts.transfer is not None:
        config.update(resume_pkl=opts.transfer, ema_rampup_ratio=None)
    if opts.resume is not None:
        config.update(resume_state_dump=find_state(opts.resume))
    return config


def find_state(path: str) -> str:
    """A training-state-*.pt file: `path` itself, or the latest one in the folder `path`."""
    name = re.compile(r'training-state-\d+\.pt')
    if os.path.isdir(path):
        states = sorted((f for f in os.listdir(path) if name.fullmatch(f)), key=lambda f: int(re.sub(r'\D', '', f)))
        if not states:
            raise click.ClickException(f'--resume={path}: no training-state-*.pt in this folder')
        return os.path.join(path, states[-1])
    if not name.fullmatch(os.path.basename(path)) or not os.path.isfile(path):
        raise click.ClickException(f'--resume={path}: give a training-state-*.pt file or the folder of a run')
    return path


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


class IntList(click.ParamType):
    """1,2,2,2"""

    name = 'list'

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        try:
            return [int(item) for item in value.split(',')]
        except ValueError:
            self.fail(f'{value!r} is not a list of integers such as 1,2,2,2', param, ctx)


positive = click.FloatRange(min=0, min_open=True)
fraction = click.FloatRange(min=0, max=1)
at_least_one = click.IntRange(min=1)


# fmt: off
@click.command(context_settings={'show_default': True, 'max_content_width': 120})
# Main options.
@click.option('--outdir',        help='Where to save the results', metavar='DIR', required=True)
@click.option('--data',          help='Dataset', metavar='ZIP|DIR', required=True)
@click.option('--cond',          help='Train a class-conditional network', metavar='BOOL', type=bool, default=False)
@click.option('--arch',          help='Network architecture', type=click.Choice(list(ARCHS)), default='ddpmpp')
@click.option('--precond',       help='Preconditioning and loss', type=click.Choice(list(PRECONDS)), default='edm')
# Hyperparameters.
@click.option('--duration',      help='Training duration', metavar='MIMG', type=positive, default=200)
@click.option('--batch',         help='Total batch size', metavar='INT', type=at_least_one, default=512)
@click.option('--batch-gpu',     help='Limit the batch of one process at a time', metavar='INT', type=at_least_one)
@click.option('--cbase',         help='Channels at full resolution  [default: by --arch]', metavar='INT', type=at_least_one)
@click.option('--cres',          help='Channel multiples per resolution  [default: by --arch]', metavar='LIST', type=IntList())
@click.option('--num-blocks',    help='Residual blocks per resolution  [default: by --arch]', metavar='INT', type=at_least_one)
@click.option('--lr',            help='Learning rate', metavar='FLOAT', type=positive, default=1e-3)
@click.option('--lr-rampup',     help='Learning rate grows over', metavar='MIMG', type=click.FloatRange(min=0), default=10)
@click.option('--ema',           help='Half-life of the weight average', metavar='MIMG', type=click.FloatRange(min=0), default=0.5)
@click.option('--dropout',       help='Dropout probability', metavar='FLOAT', type=fraction, default=0.13)
@click.option('--augment',       help='Augmentation probability, 0 = off', metavar='FLOAT', type=fraction, default=0.12)
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
@click.option('--format',        help='Format of the networks saved', type=click.Choice(['pkl', 'safetensors']), default='pkl')
@click.option('--dump',          help='Save the training state every', metavar='TICKS', type=at_least_one, default=500)
@click.option('--seed',          help='Random seed  [default: random]', metavar='INT', type=click.IntRange(min=0))
@click.option('--transfer',      help='Start from the weights of this network', metavar='NAME|PATH|URL')
@click.option('--resume',        help='Go on from this state, or the latest in a folder', metavar='PT|DIR')
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
    if opts.transfer is not None and opts.resume is not None:
        raise click.ClickException('--transfer and --resume exclude each other')
    torch.multiprocessing.set_start_method('spawn', force=True)
    try:
        device = dist.init(opts.device)
    except ValueError as err:
        raise click.ClickException(str(err)) from None
    world = dist.get_world_size()
    training_stats.init_multiprocessing(dist.get_rank(), device if world > 1 else None)
    dataset = _open_dataset(opts)
    if opts.seed is None:
        opts.seed = dist.broadcast_object(int.from_bytes(os.urandom(4), 'little') % 2**31)
    config = make_config(opts, dataset)
    run_dir = opts.outdir if opts.nosubdir else run_dir_name(opts, dataset.name)
    _print_config(config, opts, dataset, run_dir, device)
    if opts.dry_run:
        dist.print0('Dry run; exiting.')
        return

    dist.barrier()  # all ranks have read the names in --outdir before one adds to them
    if dist.get_rank() == 0:
        os.makedirs(run_dir, exist_ok=True)
        with open(os.path.join(run_dir, 'training_options.json'), 'w') as file:
            json.dump({**config, 'run_dir': run_dir}, file, indent=2)
        dnnlib.util.Logger(file_name=os.path.join(run_dir, 'log.txt'), file_mode='a')
    try:
        training_loop(run_dir=run_dir, device=device, **_loop_kwargs(config, device))
    except ValueError as err:
        raise click.ClickException(str(err)) from None

# fmt: on


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
        raise click.ClickException(f'--data: {err}') from None
    return dataset


def _loop_kwargs(config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The config, with loader settings that this machine can honour."""
    loader = dict(config['data_loader_kwargs'])
    loader['pin_memory'] = loader['pin_memory'] and device.type == 'cuda'
    if loader['num_workers'] == 0:
        del loader['prefetch_factor']
    return {**config, 'data_loader_kwargs': loader}


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
    main()

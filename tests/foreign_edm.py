"""Network pickles exchanged with a checkout that is not ours, each in a process of its own.

A checkout here is a temporary directory with the `torch_utils` and `dnnlib` of tests/foreign, which know the pickle
format and nothing else. `read_there` loads pickles in one and returns what the networks in them compute.
`write_foreign_snapshot` gives one networks, losses and augmentation in a text that differs from ours and pickles a
network there. Both run this very file as a script in the checkout, with the job on standard input as JSON.
"""

import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile

import torch

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent

AUGMENT = {'p': 0.5, 'xflip': 1e8, 'yflip': 1, 'scale': 1, 'rotate_frac': 1, 'aniso': 1, 'translate_frac': 1}
AUGMENT_DIM = 9

# What stands in EDM's place of `AttentionOp`: a function with a backward pass and no forward-mode derivative.
ATTENTION = """
class AttentionOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k):
        scores = torch.einsum('bcq,bck->bqk', q.float(), k.float() / math.sqrt(k.shape[1]))
        w = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(q, k, w)
        return w.to(q.dtype)

    @staticmethod
    def backward(ctx, dw):
        q, k, w = ctx.saved_tensors
        ds = (dw.float() - (dw.float() * w).sum(dim=-1, keepdim=True)) * w / math.sqrt(k.shape[1])
        dq = torch.einsum('bqk,bck->bcq', ds, k.float())
        dk = torch.einsum('bqk,bcq->bck', ds, q.float())
        return dq.to(q.dtype), dk.to(k.dtype)


"""


# ---- On our side


def write_foreign_snapshot(
    path,
    class_name,
    kwargs,
    *,
    args=(),
    attention_function=True,
    numpy_scalars=True,
    numpy_core=None,
    attributes=None,
    append_source='',
    augment_kwargs=AUGMENT,
    seed=0,
):
    """Write a network snapshot as a checkout with other source text would; returns what its network computes there.

    The network is `class_name(*args, **kwargs)` with random weights, in a dict with the keys ema, loss_fn, augment_pipe
    and dataset_kwargs. It takes augmentation labels only if kwargs has `augment_dim` (9 for the default pipe).

        attention_function  the attention is a torch.autograd.Function with a backward pass and no `jvp`
        numpy_scalars       `skip_scale` is stored as numpy.float64
        numpy_core          module under which the pickle looks for numpy's `scalar`: 'numpy.core.multiarray' as from
                            numpy 1, 'numpy._core.multiarray' as from numpy 2; None: that of the numpy at hand
        attributes          dict of further attributes, stored on the preconditioner and on each UNetBlock
        append_source       text put at the end of each stored source
        augment_kwargs      of the AugmentPipe; None stores no pipe

    What goes into the network passes through JSON: tuples arrive as lists.

    The result is what `evaluate` returns, together with its inputs (x, sigma, class_labels, augment_labels, images).
    """
    job = {
        'action': 'write',
        'path': str(path),
        'class_name': class_name,
        'args': args,
        'kwargs': kwargs,
        'numpy_core': numpy_core,
        'attributes': attributes or {},
        'augment_kwargs': augment_kwargs,
        'seed': seed,
    }
    sources = foreign_sources(attention_function, numpy_scalars, append_source)
    return _run_in_checkout(job, sources)[0]


def read_there(paths, inputs):
    """Load each of these pickles in a checkout that has no `training` package; a list of `evaluate`'s results.

    `inputs` holds one dict of `make_inputs` for each path.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs_path = pathlib.Path(scratch) / 'inputs.pt'
        torch.save(list(inputs), inputs_path)
        job = {'action': 'read', 'paths': [str(path) for path in paths], 'inputs': str(inputs_path)}
        return _run_in_checkout(job, {})


def plain_output(path, shape):
    """Σ D(1; σ = 2), after plain unpickling where only EDM's `torch_utils` and `dnnlib` can be imported."""
    script = (
        "import pickle, sys, torch\nsys.modules['training'] = None\ntorch.set_num_threads(1)\n"
        f"net = pickle.load(open({str(path)!r}, 'rb'))['ema']\n"
        "assert 'foreign' in sys.modules['torch_utils.persistence'].__file__\n"
        f'print(net(torch.ones({shape}), torch.tensor(2.0)).double().sum().item())\n'
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=TESTS / 'foreign', env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def foreign_sources(attention_function=True, numpy_scalars=True, append_source=''):
    """{name in `training`: text}: our modules, changed where the other side differs."""
    texts = {name: (ROOT / 'training' / f'{name}.py').read_text() for name in ('networks', 'loss', 'augment')}
    if attention_function:
        texts['networks'] = _replace_once(r'class AttentionOp:.*?(?=^(?:def |@))', ATTENTION, texts['networks'])
    if numpy_scalars:
        texts['networks'] = _replace_once(r'import math\n', 'import math\n\nimport numpy as np\n', texts['networks'])
        texts['networks'] = _replace_once(r'float\(skip_scale\)', 'np.float64(skip_scale)', texts['networks'])
    return {name: f'# Not the text of this project.\n{text}{append_source}' for name, text in texts.items()}


def _replace_once(pattern, replacement, text):
    text, count = re.subn(pattern, lambda _match: replacement, text, flags=re.DOTALL | re.MULTILINE)
    assert count == 1, f'{pattern!r} stands {count} times in the text'
    return text


def _run_in_checkout(job, training_sources):
    with tempfile.TemporaryDirectory() as scratch:
        checkout = pathlib.Path(scratch) / 'checkout'
        shutil.copytree(TESTS / 'foreign', checkout, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(__file__, checkout)
        if training_sources:
            (checkout / 'training').mkdir()
            (checkout / 'training' / '__init__.py').touch()
        for name, text in training_sources.items():
            (checkout / 'training' / f'{name}.py').write_text(text)
        results = pathlib.Path(scratch) / 'results.pt'
        job = job | {'results': str(results), 'threads': torch.get_num_threads()}
        # A script's own directory comes first on its path; PYTHONPATH might lead to modules of ours.
        command = [sys.executable, str(checkout / pathlib.Path(__file__).name)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f'{job["action"]} failed in the other checkout:\n{done.stderr}'
        return torch.load(results, weights_only=True)


# ---- On both sides


def make_inputs(net, seed=0):
    """Inputs for a preconditioner, as a dict of tensors (None where it has no labels)."""
    rng = torch.Generator().manual_seed(seed)
    shape = [3, net.img_channels, net.img_resolution, net.img_resolution]
    augments = net.model.map_augment is not None
    return {
        'x': 5 * torch.randn(shape, generator=rng),
        'sigma': torch.tensor([0.3, 2.0, 20.0]),
        'class_labels': torch.eye(net.label_dim)[[0, 1, 0]] if net.label_dim else None,
        'augment_labels': torch.randn([3, net.model.map_augment.in_features], generator=rng) if augments else None,
        'images': torch.rand(shape, generator=rng) * 2 - 1,
    }


def evaluate(snapshot, inputs):
    """All that one does with a snapshot: denoise, differentiate, construct again, augment, train."""
    ema, loss_fn, augment_pipe = snapshot['ema'], snapshot['loss_fn'], snapshot['augment_pipe']
    x, sigma, labels, images = (inputs[key] for key in ('x', 'sigma', 'class_labels', 'images'))
    x = x.clone().requires_grad_(True)
    denoised = ema(x, sigma, labels)
    again = type(ema)(*ema.init_args, **ema.init_kwargs).eval().requires_grad_(False)
    again.load_state_dict(ema.state_dict())
    results = {
        'classes': [type(obj).__name__ for obj in (ema, ema.model, loss_fn, augment_pipe)],
        'shape': [ema.img_resolution, ema.img_channels, ema.label_dim],
        'sigma_range': [float(ema.sigma_min), float(ema.sigma_max)],
        'frozen': not any(module.training for module in ema.modules())
        and not any(param.requires_grad for param in ema.parameters()),
        'dataset_kwargs': snapshot['dataset_kwargs'],
        'rounded': ema.round_sigma(sigma),
        'denoised': denoised.detach(),
        'full_precision': ema(x.detach(), sigma, labels, force_fp32=True),
        'one_sigma_no_labels': ema(x.detach(), 0.7),
        'gradient': torch.autograd.grad(denoised.square().sum(), x)[0],
        'constructed_again': again(x.detach(), sigma, labels),
    }
    if inputs['augment_labels'] is not None:
        results['augmented'] = ema(x.detach(), sigma, labels, augment_labels=inputs['augment_labels'])
    torch.manual_seed(1)
    results['loss'] = loss_fn(ema, images, labels, augment_pipe)
    if augment_pipe is not None:
        results['piped_images'], results['piped_labels'] = augment_pipe(images)
    return results


def randomize(net, seed):
    """Weights that leave no path through the network at zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in net.parameters():
            fan_in = param[0].numel() if param.ndim > 1 else 4
            param.copy_(torch.randn(param.shape, generator=rng) / fan_in**0.5 + (param.ndim == 1) * param)
    return net


# ---- On the other side


def main():
    job = json.load(sys.stdin)
    torch.set_num_threads(job['threads'])
    if job['action'] == 'read':
        sys.modules['training'] = None  # an installed one, as from `pip install -e`, would be ours
        results = [_read(path, inputs) for path, inputs in zip(job['paths'], torch.load(job['inputs']), strict=True)]
    else:
        results = [_write(job)]
    for name, module in sys.modules.items():
        if name.partition('.')[0] in ('torch_utils', 'dnnlib', 'training') and module is not None:
            assert pathlib.Path(module.__file__).is_relative_to(TESTS), f'{module.__file__} is not of this checkout'
    torch.save(results, job['results'])


def _read(path, inputs):
    with open(path, 'rb') as file:
        return evaluate(pickle.load(file), inputs)


def _write(job):
    from training import augment, loss, networks

    net = randomize(getattr(networks, job['class_name'])(*job['args'], **job['kwargs']), job['seed'])
    for module in [net, *(module for module in net.modules() if type(module) is networks.UNetBlock)]:
        vars(module).update(job['attributes'])
    pipe_kwargs = job['augment_kwargs']
    snapshot = {
        'ema': net.eval().requires_grad_(False),
        'loss_fn': loss.EDMLoss(P_std=1.1),
        'augment_pipe': None if pipe_kwargs is None else augment.AugmentPipe(**pipe_kwargs),
        'dataset_kwargs': {'class_name': 'training.dataset.ImageFolderDataset', 'path': 'digits.zip'},
    }
    inputs = make_inputs(net)
    results = evaluate(snapshot, inputs)
    assert not inputs.keys() & results.keys()
    with open(job['path'], 'wb') as file:
        _Pickler(file, job['numpy_core']).dump(snapshot)
    return inputs | results


class _Pickler(pickle._Pickler):
    """Writes numpy's `scalar` as a global of the given module, which is where numpy 1 and numpy 2 differ."""

    def __init__(self, file, numpy_core):
        super().__init__(file)
        self.numpy_core = numpy_core

    def save_global(self, obj, name=None):
        if self.numpy_core is None or not pickle.whichmodule(obj, name).endswith('core.multiarray'):
            return super().save_global(obj, name)
        self.save(self.numpy_core)
        self.save(name)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


if __name__ == '__main__':
    main()

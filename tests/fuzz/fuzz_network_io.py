"""Coverage-guided fuzzing of the readers: no code runs, no error but the reader's own, no hang, no excess of memory.

    pip install atheris
    python tests/fuzz/fuzz_network_io.py seeds CORPUS                      # write the seed corpus into this folder
    python tests/fuzz/fuzz_network_io.py fuzz CORPUS -max_total_time=1200  # libFuzzer's options follow the folder
    python tests/fuzz/fuzz_network_io.py measure CORPUS                    # time and memory of each file found

Each input goes through the three readers: networks in pickles and in safetensors, up to the built network, and
`load_numpy`. A run stops with a stack trace, and leaves the input as crash-…, timeout-… or oom-…, if an exception other
than ValueError gets out, if an input takes more than 2 s, if memory passes 1 GiB, or if reading causes one of the audit
events that tests/audit.py forbids.
"""

import contextlib
import hashlib
import io
import itertools
import pathlib
import pickle
import pickletools
import random
import sys
import time
import tracemalloc

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import audit  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

OPTIONS = ['-timeout=2', '-rss_limit_mb=1024', '-max_len=32768', '-len_control=0']


def read_all(data):
    from dnnlib import safe_pickle
    from torch_utils import network_io

    with audit.watched():
        with contextlib.suppress(ValueError):
            stored = network_io.read_network(data)
            network_io.unknown_sources(stored)
            network_io.build(stored)
        with contextlib.suppress(safe_pickle.SafePickleError):
            safe_pickle.load_numpy(io.BytesIO(data))


# ----------------------------------------------------------------------------
# Inputs.


class Stored:
    """Pickles as the persistent object that a module is, with what the readers look at and nothing else."""

    def __init__(self, module, only=None):
        names = ('_parameters', '_buffers', '_modules', '_init_args', '_init_kwargs')
        self.state = {name: vars(module)[name] for name in names if name in vars(module)}
        kept = {name: child for name, child in module._modules.items() if only is None or name in only}
        self.state['_modules'] = {name: Stored(child, only) for name, child in kept.items() if child is not None}
        self.class_name = type(module).__name__

    def __reduce__(self):
        from torch_utils import persistence

        if self.class_name == 'ModuleDict':
            return torch.nn.ModuleDict, (), self.state
        meta = {'type': 'class', 'version': 6, 'module_src': '', 'class_name': self.class_name, 'state': self.state}
        return persistence._reconstruct_persistent_obj, (meta,)


def seeds():
    """Whole files of all kinds, small: a network, a network with one weight, numpy values as different writers do."""
    from torch_utils import network_io
    from training import networks

    tiny = {'model_channels': 4, 'channel_mult': [1], 'num_blocks': 0, 'attn_resolutions': []}
    net = networks.EDMPrecond(4, 1, model_type='SongUNet', **tiny)
    yield network_io._safetensors(net)
    yield pickle.dumps(Stored(net), 4)
    for protocol in range(2, 6):
        yield pickle.dumps({'ema': Stored(net, only=('model', 'map_layer0')), 'dataset_kwargs': {}}, protocol)
    yield pickle.dumps({'ema': Stored(net, only=())}, 4)
    values = {'num_images': np.int64(3), 'fid': {'mu': np.arange(3.0), 'sigma': np.asfortranarray(np.eye(2))}}
    values |= {'bytes': b'\x00\xff', 'set': {1, 2}, 'tuple': (1, -2.5, None, True), 'text': 'σ', 'big': 2**70}
    for protocol in range(6):
        yield pickle.dumps(values, protocol)
    yield CIFAR_BATCH


CIFAR_BATCH = (  # {'data': two rows of three bytes, 'labels': [1, 2]}, as Python 2 and numpy 1 write it
    b'\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05'
    b'(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
    b'\x89U\x06abcdeftbU\x06labelsq\x08]q\t(K\x01K\x02eu.'
)


def pieces(data):
    """The pickle cut at its opcodes, as far as it can be read."""
    cuts = []
    with contextlib.suppress(Exception):
        for _, _, position in pickletools.genops(data):
            cuts.append(position)
    return [data[a:b] for a, b in itertools.pairwise([0, *cuts[1:], len(data)])]


def mutate(data, max_size, seed):
    """Two times in three libFuzzer's own mutation of bytes; else opcodes dropped, doubled, moved or replaced."""
    import atheris

    rng = random.Random(seed)
    if rng.random() < 2 / 3 or len(data) < 4:
        return atheris.Mutate(data, max_size)
    parts = pieces(data)
    for _ in range(rng.randint(1, 4)):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        action = rng.randrange(4)
        if action == 0 and len(parts) > 1:
            del parts[i]
        elif action == 1:
            parts.insert(i, parts[j])
        elif action == 2:
            parts[i], parts[j] = parts[j], parts[i]
        else:
            parts[i] = bytes([ord(rng.choice(pickletools.opcodes).code)]) + parts[i][1:]
    return b''.join(parts)[:max_size]


# ----------------------------------------------------------------------------
# Commands.


def fuzz(corpus, options):
    import atheris

    with atheris.instrument_imports(
        include=['dnnlib.safe_pickle', 'torch_utils.network_pickle', 'torch_utils.network_io']
    ):
        from dnnlib import safe_pickle  # noqa: F401
        from torch_utils import network_io, network_pickle  # noqa: F401
    for data in seeds():  # everything that is imported on first use
        read_all_unwatched(data)
    atheris.Setup([sys.argv[0], *OPTIONS, *options, corpus], read_all, custom_mutator=mutate)
    atheris.Fuzz()


def read_all_unwatched(data):
    from dnnlib import safe_pickle
    from torch_utils import network_io

    for read in (
        lambda: network_io.build(network_io.read_network(data)),
        lambda: safe_pickle.load_numpy(io.BytesIO(data)),
    ):
        with contextlib.suppress(ValueError):
            read()


def measure(corpus):
    """The slowest input, and the largest memory as a multiple of the input's size."""
    for data in seeds():
        read_all_unwatched(data)
    slowest, largest, most, count = 0.0, 0.0, 0, 0
    for path in sorted(pathlib.Path(corpus).iterdir()):
        data = path.read_bytes()
        start = time.perf_counter()
        read_all(data)
        slowest = max(slowest, time.perf_counter() - start)
        tracemalloc.start()
        read_all(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        most, count = max(most, peak), count + 1
        if len(data) >= 1024:
            largest = max(largest, peak / len(data))
    print(f'{count} inputs; slowest {slowest:.2f} s; peak {most / 2**20:.1f} MiB, at most {largest:.1f} bytes per byte')


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ('seeds', 'fuzz', 'measure'):
        sys.exit(__doc__)
    command, corpus, *options = sys.argv[1:]
    torch.set_num_threads(1)
    if command == 'seeds':
        pathlib.Path(corpus).mkdir(parents=True, exist_ok=True)
        for data in seeds():
            (pathlib.Path(corpus) / hashlib.sha1(data).hexdigest()).write_bytes(data)
    elif command == 'fuzz':
        fuzz(corpus, options)
    else:
        measure(corpus)


if __name__ == '__main__':
    main()

"""Files that try to hurt whoever reads them: built here, none is committed. `python tests/attacks.py` reads them all.

`attacks()` gives {kind: {name: bytes}}. The vectors are those of the tests of picklescan, modelscan and fickling and of
their changelogs, as far as they are public, and more for the formats of this project.
"""

import contextlib
import copy
import io
import itertools
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import attack_files
import audit
import numpy as np
import safetensors.torch
import torch

from dnnlib import safe_pickle
from torch_utils import network_io, persistence
from training import networks

TINY = {'model_type': 'SongUNet', 'model_channels': 4, 'channel_mult': [1], 'num_blocks': 1, 'attn_resolutions': []}


def attacks():
    """{kind: {name: bytes}}; what `safe_pickle.load_numpy` has to refuse as well as the reader of networks."""
    return {'calls': calls(), 'names': names(), 'opcodes': opcodes(), 'excess': excess(), 'containers': containers()}


# ----------------------------------------------------------------------------
# Pieces of pickles.

PROTO = b'\x80\x04'
ARGUMENT = b'X\x0b\x00\x00\x00touch /evil\x85'


def text(value):
    return pickle.BINUNICODE + struct.pack('<I', len(value.encode())) + value.encode()


def named(module, name):
    return pickle.GLOBAL + f'{module}\n{name}\n'.encode()


def stack_named(module, name):
    return text(module) + text(name) + pickle.STACK_GLOBAL


DICT = named('collections', 'OrderedDict') + b')R'
MODULE = named('torch.nn.modules.container', 'ModuleDict') + b')R'
DTYPE = named('numpy', 'dtype') + text('f8') + b'\x85R'
RECONSTRUCT = named('torch_utils.persistence', '_reconstruct_persistent_obj')
TENSOR = named('torch._utils', '_rebuild_tensor_v2')
STORAGE = named('torch.storage', '_load_from_bytes')
ARRAY = named('numpy.core.multiarray', '_reconstruct') + named('numpy', 'ndarray') + b'K\x00\x85C\x01b\x87R'


# ----------------------------------------------------------------------------
# Calls of what runs code, opens files or connections, or changes the interpreter.

CALLS = """
os.system os.popen os.execv os.spawnv os.remove posix.system nt.system subprocess.Popen subprocess.call
subprocess.check_output _posixsubprocess.fork_exec builtins.eval builtins.exec builtins.compile builtins.getattr
builtins.setattr builtins.__import__ builtins.open builtins.breakpoint builtins.globals builtins.map builtins.filter
builtins.input builtins.vars builtins.delattr __builtin__.eval __builtin__.exec __builtin__.apply __builtin__.execfile
__builtin__.getattr __builtin__.file __builtin__.reduce __builtins__.eval sys.exit sys.setrecursionlimit
sys.addaudithook sys.modules.update pty.spawn socket.socket socket.create_connection _socket.socket ssl.wrap_socket
http.client.HTTPSConnection urllib.request.urlopen urllib.urlopen urllib2.urlopen requests.get requests.api.post
aiohttp.ClientSession smtplib.SMTP imaplib.IMAP4_stream ftplib.FTP poplib.POP3 telnetlib.Telnet nntplib.NNTP
xmlrpc.client.ServerProxy webbrowser.open shutil.rmtree shutil.copyfile tempfile.mktemp glob.glob fileinput.input
linecache.getline mmap.mmap ctypes.CDLL ctypes.util.find_library _ctypes.dlopen marshal.loads types.CodeType
types.FunctionType cloudpickle.cloudpickle._make_function cloudpickle.cloudpickle._builtin_type
cloudpickle.cloudpickle.subimport dill._dill._create_function dill._dill._import_module joblib.load pickle.loads
pickle.load pickle.Unpickler _pickle.loads cPickle.loads runpy.run_path runpy._run_code
code.InteractiveInterpreter.runcode code.interact codeop.compile_command pdb.run bdb.Bdb.run profile.run profile.runctx
cProfile.run cProfile.runctx trace.Trace.run timeit.timeit timeit.main doctest.debug_script pydoc.locate
pydoc.pipepager pkgutil.resolve_name importlib.import_module importlib._bootstrap._gcd_import
_frozen_importlib._gcd_import _frozen_importlib_external.SourceFileLoader _imp.create_dynamic imp.load_source
zipimport.zipimporter inspect.getattr_static gc.get_objects site.addsitedir test.support.script_helper.assert_python_ok
test.support.run_code unittest.main unittest.mock.patch idlelib.pyshell.ModifiedInterpreter
idlelib.autocomplete.AutoComplete.get_entity idlelib.run.Executive.runcode lib2to3.pgen2.grammar.Grammar.loads
lib2to3.pgen2.pgen.ParserGenerator ensurepip._run_pip pip.main pip._internal.main venv.create
distutils.file_util.write_file distutils.spawn.spawn asyncio.create_subprocess_shell
asyncio.unix_events._UnixSubprocessTransport._start multiprocessing.util.spawnv_passfds multiprocessing.Process
_interpreters.run_string _xxsubinterpreters.run_string threading.Thread _thread.start_new_thread signal.signal
atexit.register sqlite3.connect shelve.open dbm.open tarfile.open zipfile.ZipFile logging.FileHandler
logging.config.listen io.open io.FileIO _io.open _io.FileIO codecs.open uuid._get_command_stdout
_osx_support._find_build_tool _aix_support._read_cmd_output _pyrepl.pager.pipe_pager platform.popen
platform._syscmd_file operator.attrgetter operator.itemgetter operator.methodcaller _operator.attrgetter
_operator.methodcaller functools.partial functools.reduce itertools.starmap collections.defaultdict
numpy.f2py.crackfortran.getlincoef numpy.f2py.crackfortran.param_eval numpy.testing._private.utils.runstring
numpy.load numpy.fromfile numpy.memmap numpy.loadtxt numpy.frombuffer torch.load torch.serialization.load torch.hub.load
torch.jit.load torch.jit.unsupported_tensor_ops.execWrapper torch.utils.collect_env.run
torch.utils.bottleneck.__main__.run_cprofile torch._inductor.codecache.compile_file
torch._dynamo.guards.GuardBuilder.get torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression
torch.utils._config_module.ConfigModule.load_config torch.utils.data.datapipes.utils.decoder.basichandlers
torch._tensor._rebuild_from_type_v2 torch.utils.cpp_extension.load torch.ops.load_library torch.distributed.run.main
torch._utils._rebuild_wrapper_subclass torch._utils._rebuild_sparse_tensor torch.package.PackageImporter
torch.nn.modules.module.Module torch.storage.UntypedStorage fickling.hook.remove_hook
picklescan.scanner.scan_bytes numpy.core.multiarray.fromfile numpy.core.multiarray._vec_string
numpy.random._pickle.__randomstate_ctor tensorflow.io.write_file keras.models.load_model bpy.ops.wm.open_mainfile
nltk.data.load pandas.read_pickle scipy.io.loadmat yaml.load yaml.unsafe_load copy_reg._reconstructor
copyreg._reconstructor copyreg.__newobj__ copyreg.add_extension weakref.finalize contextlib.ExitStack.callback
torch_utils.persistence.module_from_source torch_utils.persistence.import_hook torch_utils.network_io.load_network
dnnlib.safe_pickle.load_numpy dnnlib.util.open_url dnnlib.util.call_func_by_name
dnnlib.util.construct_class_by_name dnnlib.util.get_obj_by_name
"""


def calls():
    return {dotted: PROTO + stack_named(*dotted.rsplit('.', 1)) + ARGUMENT + b'R.' for dotted in CALLS.split()}


# ----------------------------------------------------------------------------
# Ways of writing a name that a filter might not recognise.


def names():
    run = ARGUMENT + b'R.'
    system = text('os') + text('system')
    found = {
        'GLOBAL': named('os', 'system'),
        'dotted name': stack_named('os', 'path.os.system'),
        'dotted name through an allowed module': stack_named('torch_utils.persistence', 'sys.modules'),
        'attribute of an allowed function': stack_named('torch._utils', '_rebuild_tensor_v2.__globals__'),
        'attribute of an allowed class': stack_named('collections', 'OrderedDict.__init__.__globals__'),
        'method of a builtin': stack_named('builtins', 'eval.__call__'),
        'module in a module': stack_named('pathlib', 'os.system'),
        'other function of an allowed module': stack_named('torch._utils', '_import_dotted_name'),
        'other class of an allowed module': stack_named('collections', 'Counter'),
        'submodule of an allowed module': stack_named('collections.abc', 'OrderedDict'),
        'parent of an allowed module': stack_named('torch', '_rebuild_tensor_v2'),
        'private twin': stack_named('_collections', 'OrderedDict'),
        'Python 2 name of an allowed one': stack_named('UserDict', 'OrderedDict'),
        'Python 2 builtins': stack_named('__builtin__', 'eval'),
        'Python 2 copy_reg': stack_named('copy_reg', '_reconstructor'),
        'look-alike letters': stack_named('соllесtiоns', 'OrderedDict'),
        'full-width letters': stack_named('ｏｓ', 'system'),
        'space before': stack_named(' os', 'system'),
        'space after': stack_named('collections ', 'OrderedDict'),
        'space between': stack_named('collections OrderedDict', ''),
        'zero byte': stack_named('collections\0', 'OrderedDict'),
        'carriage return': b'ccollections\r\nOrderedDict\r\n',
        'upper case': stack_named('Collections', 'OrderedDict'),
        'empty module': stack_named('', 'system'),
        'empty name': stack_named('os', ''),
        'both empty': stack_named('', ''),
        'newlines and escapes': stack_named('os\nError: all is well', 'system\x1b[2J'),
        'through BINPUT and BINGET': text('os') + b'q\x000' + b'h\x00' + text('system') + b'\x93',
        'through MEMOIZE': text('os') + b'\x94' + text('system') + b'\x94\x93',
        'memo overwritten': text('collections') + b'q\x00' + text('os') + b'q\x00h\x00' + text('system') + b'\x93',
        'memo not filled': b'h\x05' + text('system') + b'\x93',
        'memo far away': text('os') + b'r\xff\xff\xff\x7fj\xff\xff\xff\x7e' + text('system') + b'\x93',
        'bytes for text': b'C\x02osC\x06system\x93',
        'numbers for text': b'K\x01K\x02\x93',
        'None for text': b'NN\x93',
        'a list for text': b']' + text('system') + b'\x93',
        'a name for text': DICT[:-2] + text('system') + b'\x93',
        'name made by a call': named('_codecs', 'encode') + system + b'\x86R' + text('system') + b'\x93',
        'module made by a call': named('_codecs', 'encode') + text('os') + text('latin1') + b'\x86R' + system + b'\x93',
        'not UTF-8': b'X\x02\x00\x00\x00\xff\xfe' + text('system') + b'\x93',
        'surrogates': b'X\x03\x00\x00\x00\xed\xa0\x80' + text('system') + b'\x93',
        'endless line': b'cos',
    }
    return {name: PROTO + content + run for name, content in found.items()}


# ----------------------------------------------------------------------------
# Opcodes that do more than they seem to.


OPCODES = {
    'INST': b'(ios\nsystem\n',
    'INST of an allowed name': b'(icollections\nOrderedDict\n',
    'OBJ': b'(' + named('os', 'system') + b'o',
    'OBJ popped': b'(' + named('os', 'system') + b'o0N',
    'EXT1': b'\x82\x01',
    'EXT2': b'\x83\x01\x00',
    'EXT4': b'\x84\x01\x00\x00\x00',
    'NEWOBJ of a function': RECONSTRUCT + b')\x81',
    'NEWOBJ of text': text('dict') + b')\x81',
    'NEWOBJ with a dict': DICT[:-2] + b'}\x81',
    'NEWOBJ_EX': named('collections', 'OrderedDict') + b')}\x92',
    'REDUCE of text': text('os.system') + b')R',
    'REDUCE of a record': MODULE + b')R',
    'REDUCE without a tuple': RECONSTRUCT + b'NR',
    'REDUCE of a list': named('collections', 'OrderedDict') + b']R',
    'call with nothing': RECONSTRUCT + b')R',
    'call with too much': named('collections', 'OrderedDict') + b'K\x01\x85R',
    'BUILD on a known function': RECONSTRUCT + b'}' + text('__code__') + b'Nsb',
    'BUILD of defaults': TENSOR + b'}' + text('__defaults__') + b')sb',
    'BUILD on a known class': named('collections', 'OrderedDict') + b'}' + text('x') + b'Nsb',
    'BUILD on a dict': b'}}' + text('__setstate__') + b'Nsb',
    'BUILD on a list': b']}b',
    'BUILD on text': text('x') + b'}b',
    'BUILD on nothing': b'b',
    'BUILD with slots': MODULE + b'N}' + text('__class__') + b'Ns\x86b',
    'BUILD twice': MODULE + b'}b}b',
    'BUILD with None': MODULE + b'Nb',
    'SETITEM on a function': RECONSTRUCT + b'NNs',
    'SETITEM on a list': b']K\x00Ns',
    'SETITEM on an object': MODULE + text('x') + b'Ns',
    'SETITEMS on a tuple': b')(K\x00Nu',
    'SETITEMS of an odd number': b'}(K\x00NK\x01u',
    'APPEND to a tuple': b')Na',
    'APPEND to a record': MODULE + b'Na',
    'APPENDS to a dict': b'}(Ne',
    'APPEND to a set': b'\x8fNa',
    'ADDITEMS to a dict': b'}(K\x01\x90',
    'FROZENSET': b'(K\x01\x91',
    'persistent id': b'Pname\n',
    'binary persistent id': text('x') + b'Q',
    'DUP': b'N2\x86',
    'POP': b'NN0',
    'POP_MARK': b'N(N1',
    'next buffer': b'\x97',
    'read-only buffer': b'C\x01x\x98',
    'LONG4': b'\x8b\x04\x00\x00\x00\x01\x02\x03\x04',
    'LONG4 of negative length': b'\x8b\xff\xff\xff\xff',
    'unknown opcode': b'\xff',
    'zero opcode': b'\x00',
    'missing mark': b'NNt',
    'mark across the end': b'(N',
    'empty stack': b'',
    'a lone mark': b'(',
    'two values': b'NN',
    'value below a mark': b'N(s',
    'mark in the memo': b'(q\x00h\x00',
    'unknown memo': b'h\x07',
    'memo of an empty stack': b'\x94',
    'mutable key': b'}]Ns',
    'key of None': b'}NNs',
    'key of a number with a point': b'}G\x7f\xf8\x00\x00\x00\x00\x00\x00Ns',
    'tuple as key': b'}K\x01\x85Ns',
    'list in a set': b'\x8f(]\x90',
    'list that holds itself': b']q\x00h\x00a',
    'dict that holds itself': b'}q\x00' + text('x') + b'h\x00s',
    'tuple that holds itself': b']q\x00h\x00\x85q\x01h\x01a',
    'record that holds itself': MODULE + b'q\x00}' + text('x') + b'h\x00sb',
    'a function as value': RECONSTRUCT,
    'a class as value': named('collections', 'OrderedDict'),
    'a function in a list': b']' + TENSOR + b'a',
    'future protocol': b'\x80\x06N',
    'protocol 255': b'\x80\xff',
    'protocol later': b'N0\x80\x04N',
    'frame past the end': b'\x95\x64\x00\x00\x00\x00\x00\x00\x00N',
    'huge frame': b'\x95' + b'\xff' * 8,
    'frame in a frame': b'\x95\x0a\x00\x00\x00\x00\x00\x00\x00\x95\x00\x00\x00\x00\x00\x00\x00\x00N',
    'opcode across the end of a frame': b'\x95\x03\x00\x00\x00\x00\x00\x00\x00X\x01\x00\x00\x00x',
    'text without its end': b'X\x64\x00\x00\x00x',
    'line without its end': b'V' + b'x' * 9,
    'string without quotes': b'Sx\n',
    'string of half a quote': b"S'\n",
    'string with a bad escape': b"S'\\x1'\n",
    'odd integer': b'Ix\n',
    'endless integer': b'I' + b'9' * 5000 + b'\n',
    'odd float': b'Fx\n',
    'odd memo number': b'N' + b'p-1\ng-2\n',
    'numpy object type': named('numpy', 'dtype') + text('O8') + b'\x85R',
    'numpy type of fields': DTYPE + b'(K\x03' + text('<') + b'N' + text('x') + b'\x85}tb',
    'numpy type of odd order': DTYPE + b'(K\x03' + text('?') + b'NNNtb',
    'numpy type with a short state': DTYPE + b'(K\x03tb',
    'numpy array of objects': ARRAY + b'(K\x01K\x01\x85' + named('numpy', 'dtype') + text('O') + b'\x85R\x89](Netb',
    'numpy array of too many': ARRAY + b'(K\x01K\x7f\x85' + DTYPE + b'\x89C\x08aaaaaaaatb',
    'numpy array of negative size': ARRAY + b'(K\x01J\xff\xff\xff\xff\x85' + DTYPE + b'\x89C\x08aaaaaaaatb',
    'numpy array of huge size': ARRAY + b'(K\x01K\x00\x8a\x09' + b'\0' * 8 + b'\x01\x86' + DTYPE + b'\x89C\x00tb',
    'numpy array of 33 dimensions': ARRAY + b'(K\x01(' + b'K\x01' * 33 + b't' + DTYPE + b'\x89C\x08aaaaaaaatb',
    'numpy array with a short state': ARRAY + b'K\x01K\x02\x86b',
    'numpy array with a dict for a state': ARRAY + b'}b',
    'numpy array that is not filled': ARRAY,
    'numpy array of a subclass': ARRAY.replace(b'cnumpy\nndarray', b'cnumpy\nmatrix'),
    'numpy array of text as class': ARRAY.replace(named('numpy', 'ndarray'), text('numpy.ndarray')),
    'numpy array called': named('numpy', 'ndarray') + b'K\x01\x85R',
    'numpy scalar without bytes': named('numpy.core.multiarray', 'scalar') + b'NN\x86R',
    'numpy scalar of two': named('numpy.core.multiarray', 'scalar') + DTYPE + b'C\x10' + b'a' * 16 + b'\x86R',
    'numpy scalar of a record': named('numpy.core.multiarray', 'scalar') + MODULE + b'C\x01a\x86R',
    'odd encoding': named('_codecs', 'encode') + text('x') + text('rot13') + b'\x86R',
    'encoding of a number': named('_codecs', 'encode') + b'K\x01' + text('latin1') + b'\x86R',
    'beyond latin1': named('_codecs', 'encode') + text('Ω') + text('latin1') + b'\x86R',
    'a set of a number': named('builtins', 'set') + b'K\x01\x85R',
    'a set of lists': named('builtins', 'set') + b'](]]e\x85R',
    'storage of text': STORAGE + text('x') + b'\x85R',
    'storage of garbage': STORAGE + b'C\x04\x80\x02N.' + b'\x85R',
    'storage of nothing': STORAGE + b'C\x00' + b'\x85R',
    'parameter of nothing': named('torch._utils', '_rebuild_parameter') + b')R',
    'tensor of nothing': TENSOR + b')R',
    'tensor of numbers': TENSOR + b'(K\x01K\x02))\x89NtR',
}


def opcodes():
    vectors = {name: PROTO + content + b'.' for name, content in OPCODES.items()}
    for name, evil in {'eval': named('builtins', 'eval'), 'system': named('os', 'system')}.items():
        run = evil + ARGUMENT + b'R'
        vectors |= {
            f'{name} after the end': PROTO + b'N.' + run + b'.',
            f'{name} in a second pickle': PROTO + b'N.' + PROTO + run + b'.',
            f'{name} before an error': PROTO + run + b'\xff',
            f'{name} result dropped': PROTO + run + b'0N.',
            f'{name} beside the value': PROTO + run + b'N.',
            f'{name} without an end': PROTO + run,
            f'{name} as argument': PROTO + named('collections', 'OrderedDict') + run + b'\x85R.',
            f'{name} as key': PROTO + b'}' + run + b'Ns.',
            f'{name} as state': PROTO + MODULE + run + b'b.',
            f'{name} in a set': PROTO + b'\x8f(' + run + b'\x90.',
        }
        for protocol in range(6):
            vectors[f'{name} in protocol {protocol}'] = b'\x80' + bytes([protocol]) + run + b'.'
            inner = pickle.dumps(Reduced(os.getpid), protocol)
            vectors[f'{name}: nested pickle of protocol {protocol}'] = pickle.dumps(
                Reduced(torch.storage._load_from_bytes, inner), protocol
            )
    return vectors


class Reduced:
    """Pickles as a call of `function` with `args`, then BUILD with `state` if there is one."""

    def __init__(self, function, *args, state=None):
        self.reduced = function, args, state

    def __reduce__(self):
        return self.reduced


# ----------------------------------------------------------------------------
# Small files that want much time, memory or stack.


def colliding(count, after=b''):
    """Integers of 16 bytes that Python hashes to the same number."""
    prime = sys.hash_info.modulus
    return b''.join(b'\x8a\x10' + (prime * i).to_bytes(16, 'little') + after for i in range(1, count + 1))


def excess():
    twice = b'](' + b'h%c' * 10 + b'eq%c'
    pair = b'}' + text('a') + b'h%cs' + text('b') + b'h%csq%c'
    deep = b')' + b'\x85' * 300_000
    numbers = b''.join(pickle.BININT2 + struct.pack('<H', i) for i in range(60_000))
    encode = named('_codecs', 'encode') + b'q\x00' + text('x' * 100_000) + text('latin1') + b'\x86q\x02'
    fill = b'(K\x01' + pickle.BININT + struct.pack('<i', 100_000) + b'\x85h\x00\x89h\x01tb'
    arrays = named('numpy', 'dtype') + text('u1') + b'\x85Rq\x00' + pickle.BINBYTES + struct.pack('<I', 100_000)
    arrays += bytes(100_000) + b'q\x01' + (ARRAY + fill) * 2000 + b'e'
    make_equal = named('builtins', 'set') + b'q\x00](' + b'K\x01' * 100_000 + b'e\x85q\x02'
    long_tuple = b'(' + b'N' * 100_000 + b'tq\x00'
    storage = torch.zeros(1).__reduce_ex__(4)[1][0]
    padded = storage.__reduce__()[1][0].replace(text('cpu'), text('x' * 1_000_000))
    storage_of_text = STORAGE + b'q\x00](B' + struct.pack('<I', len(padded)) + padded + b'\x85q\x02'
    make_set = named('builtins', 'set') + b'q\x00](' + numbers + b'e\x85q\x02'
    found = {
        'billion laughs in lists': b']q\x00' + b''.join(twice % (*[i] * 10, i + 1) for i in range(40)),
        'billion laughs in tuples': b')' + b''.join(b'q%ch%c\x86' % (i, i) for i in range(100)),
        'billion laughs in dicts': b'}q\x00' + b''.join(pair % (i, i, i + 1) for i in range(60)),
        'deep tuples': deep,
        'deep lists': b']' * 190_000 + b'a' * 189_999,
        'deep key': b'}' + deep + b'Ns',
        'deep tuple in a set': b'\x8f(' + deep + b'\x90',
        'deep tuple for a set': named('builtins', 'set') + b'(' + deep + b'ltR',
        'deep call': DICT[:-2] + deep + b'R',
        'deep state': MODULE + deep + b'b',
        'deep records': (MODULE + b'}' + text('x')) * 5000 + b'N' + b'sb' * 5000,
        'many values': b'N' * 400_001,
        'many marks': b'(' * 400_001,
        'many sets': b'\x8f' * 400_001,
        'keys that collide in a set': b'\x8f(' + colliding(30_000) + b'\x90',
        'keys that collide in a dict': b'}(' + colliding(30_000, b'N') + b'u',
        'name of 8 MB': b'c' + b'evil words ' * 700_000 + b'\nx\n',
        'names of 1 MB': b'](' + text('x' * 1_000_000) + b'q\x00' + b'h\x00h\x00\x93' * 60_000 + b'e',
        'one list of equal numbers made a set often': make_equal + b'h\x00h\x02R' * 60_000,
        'one state of many parts': long_tuple + b'](' + (ARRAY + b'h\x00b') * 20_000 + b'e',
        'one tuple of arguments': long_tuple + named('builtins', 'set') + b'q\x01](' + b'h\x01h\x00R' * 60_000 + b'e',
        'one storage of much text': storage_of_text + b'h\x00h\x02R' * 6000 + b'e',
        'one text encoded often': encode + b'h\x00h\x02R' * 2000,
        'one text in many arrays': b'](' + arrays,
        'one list made a set often': make_set + b'h\x00h\x02R' * 2000,
        'huge memo number': b'Nr\xff\xff\xff\xff',
        'huge text': b'\x8d' + b'\xff' * 8,
        'huge bytes': b'\x8e' + b'\xff' * 7 + b'\x7f',
        'huge bytearray': b'\x96' + b'\xff' * 7 + b'\x7f',
        'huge old bytes': b'B' + b'\xff' * 4,
        'huge old string': b'T' + b'\xff' * 4,
        'huge integer': b'\x8a\xff' + b'\x7f' * 255,
        'huge array': ARRAY + b'(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86' + DTYPE + b'\x89C\x00tb',
    }
    return {name: PROTO + content + b'.' for name, content in found.items()}


# ----------------------------------------------------------------------------
# What is no pickle, or more than one thing.


def containers():
    evil = pickle.dumps(Reduced(os.getpid), 2)
    saved = {}
    for name, new in [('zip', True), ('legacy', False)]:
        stream = io.BytesIO()
        torch.save({'x': Reduced(os.getpid)}, stream, _use_new_zipfile_serialization=new)
        saved[name] = stream.getvalue()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as file:
        file.writestr('archive/data.pkl', evil)
    plain = archive.getvalue()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode='w') as file:
        info = tarfile.TarInfo('pickle')
        info.size = len(evil)
        file.addfile(info, io.BytesIO(evil))
    npy, npz = io.BytesIO(), io.BytesIO()
    objects = np.array([Reduced(os.getpid)], dtype=object)
    np.save(npy, objects, allow_pickle=True)
    np.savez(npz, mu=objects)
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    found = {
        'empty file': b'',
        'one byte': b'\x80',
        'text': b'hello',
        'web page': b'<!DOCTYPE html><html></html>',
        'zip of torch.save': saved['zip'],
        'legacy file of torch.save': saved['legacy'],
        'legacy tar of torch.save': tar.getvalue(),
        'zip with a wrong CRC': plain.replace(evil, evil[:-1] + b'!'),
        'zip with a renamed entry': plain.replace(b'archive/data.pkl', b'archive/data.txt', 1),
        'zip with the encryption bit': plain[:6] + b'\x01' + plain[7:],
        'zip behind a pickle': PROTO + b'N.' + plain,
        'pickle behind a zip': plain + evil,
        '7z': b'7z\xbc\xaf\x27\x1c\x00\x04' + evil,
        'gzip': b'\x1f\x8b\x08\x00' + evil,
        'magic number made by a call': PROTO + named('builtins', 'eval') + text('0x1950a86a20f9469cfc6c') + b'\x85R.',
        'legacy magic, then code': magic + evil,
        'array of objects': npy.getvalue(),
        'archive of arrays of objects': npz.getvalue(),
    }  # fmt: skip
    return found | safetensors_files()


def safetensors_files():
    good = network_io._safetensors(networks.EDMPrecond(8, 1, **TINY))
    size = struct.unpack('<Q', good[:8])[0]
    header, numbers = good[8 : 8 + size], good[8 + size :]
    one = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    empty = one.replace(b'[1]', b'[0]').replace(b'[0,4]', b'[0,0]')
    described = {
        'no class': '{}',
        'one long text': '{"class_name": "EDMPrecond", "init_args": ["%s"], "init_kwargs": {}}' % ('x' * 1_000_000),
        'many arguments': '{"class_name": "EDMPrecond", "init_args": [%s1], "init_kwargs": {}}' % ('1,' * 500_000),
        'metadata of brackets': '[' + '[],' * 1_000_000 + '0]',
        'class of a long name': '{"class_name": "%s", "init_args": [], "init_kwargs": {}}' % ('\x1b' * 100_000),
        'unknown class': '{"class_name": "os.system", "init_args": ["x"], "init_kwargs": {}}',
        'class of a list': '{"class_name": [], "init_args": [], "init_kwargs": {}}',
        'other weights': '{"class_name": "EDMPrecond", "init_args": [8, 1], "init_kwargs": {}}',
        'metadata of a list': '[]',
        'metadata of a number': '1',
        'metadata of a huge number': '1' * 10_000,
        'deep metadata': '[' * 100_000,
    }
    headers = {
        'no JSON': b'{' + b'x' * (size - 1),
        'deep JSON': b'{"a":' * 100_000 + b'0' + b'}' * 100_000,
        'offsets outside': header.replace(b'"data_offsets":[0,', b'"data_offsets":[9999999,', 1),
        'overlapping tensors': b'{"a":' + one + b',"b":' + one + b'}',
        'unknown type': header.replace(b'"F32"', b'"X32"', 1),
        'integers': header.replace(b'"F32"', b'"I32"'),
        'complex numbers': b'{"w":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}',
        'numbers of 4000 digits': header.replace(b'"shape":[4', b'"shape":[4' + b'0' * 4000, 1),
        'header of 5 MB': header[:-1] + b' ' * (5 << 20) + b'}',
        'many tensors of nothing': b'{' + b','.join(b'"%d":%s' % (i, empty) for i in range(60_000)) + b'}',
        'brackets': b'{"__metadata__":' + b'[' + b'[],' * 1_000_000 + b'0]}',
        'dicts': b'{"__metadata__":{"network":' + b'{"a":' * 500 + b'0' + b'}' * 502,
        'one name twice': b'{"w":' + one + b',"w":' + one + b'}',
        'shape beyond the numbers': header.replace(b'"shape":[4', b'"shape":[400', 1),
    }
    found = {
        'huge header': struct.pack('<Q', 2**63) + good[8:],
        'header longer than the file': struct.pack('<Q', len(good)) + good[8:],
        'cut off': good[:-1],
        'more behind': good + b'x',
        'no metadata': safetensors.torch.save({'w': torch.zeros(2)}),
        **{name: struct.pack('<Q', len(each)) + each + numbers for name, each in headers.items()},
        **{name: safetensors.torch.save({'w': torch.zeros(2)}, {'network': each}) for name, each in described.items()},
    }
    return {f'safetensors: {name}': content for name, content in found.items()}


# ----------------------------------------------------------------------------
# Networks that are not what they say: pickles of whole networks.


def meta_of(net):
    """The dict that a persistent object is pickled as, free to be changed; the nested modules are live ones."""
    meta = copy.deepcopy(net).__reduce__()[1][0]
    return meta | {'state': dict(meta['state'])}


class Stored:
    """Pickles as the persistent object that `meta` describes."""

    def __init__(self, meta):
        self.meta = meta

    def __reduce__(self):
        return persistence._reconstruct_persistent_obj, (self.meta,)


def networks_of_lies():
    """{name: bytes}; only the reader of networks knows what is wrong with these."""
    kinds = {'record': _records(), 'arguments': _arguments(), 'repeated': _repeated()}
    return {f'{kind}: {name}': content for kind, vectors in kinds.items() for name, content in vectors.items()}


def _records():
    def changed(**changes):
        return pickle.dumps({'ema': Stored(meta_of(networks.EDMPrecond(8, 1, **TINY, sigma_data=0.4)) | changes)}, 4)

    def with_state(**changes):
        meta = meta_of(networks.EDMPrecond(8, 1, **TINY))
        return pickle.dumps(Stored(meta | {'state': meta['state'] | changes}), 4)

    return {
        'version 5': changed(version=5),
        'no version': changed(version=None),
        'version of text': changed(version='6'),
        'type function': changed(type='function'),
        'unknown class': changed(class_name='Precond2'),
        'class of a part': changed(class_name='SongUNet'),
        'class with a dot': changed(class_name='os.system'),
        'class __init__': changed(class_name='__init__'),
        'class __class__': changed(class_name='__class__'),
        'class of bytes': changed(class_name=b'EDMPrecond'),
        'empty class': changed(class_name=''),
        'other class': changed(class_name='VPPrecond'),
        'source of None': changed(module_src=None),
        'source of bytes': changed(module_src=b'import os'),
        'a field too many': changed(hook='x'),
        'no state': changed(state=None),
        'state of a list': changed(state=[]),
        'empty state': changed(state={}),
        'key of a number': changed(state={1: 2}),
        'no arguments': with_state(_init_args=None, _init_kwargs=None),
        'no parts': with_state(_modules={}),
        'parts of text': with_state(_modules={'model': 'x'}),
        'part with a number for a name': with_state(_modules={1: networks.Linear(1, 1)}),
        'part with a dot in its name': with_state(_modules={'model.enc': networks.Linear(1, 1)}),
        'parameters of a list': with_state(_parameters=[1]),
        'parameter of text': with_state(_parameters={'w': 'x'}),
        'no network': pickle.dumps({'ema': None}),
        'a number': pickle.dumps({'ema': 42}),
        'no ema': pickle.dumps({'net': networks.Linear(1, 1)}),
        'a list': pickle.dumps([networks.Linear(1, 1)]),
    }


def _arguments():
    def made_with(*args, **changes):
        meta = meta_of(networks.EDMPrecond(8, 1, **TINY))
        kwargs = {'img_resolution': 8, 'img_channels': 1, **TINY, **changes} if not args else changes
        meta['state'] |= {'_init_args': args, '_init_kwargs': kwargs}
        return pickle.dumps(Stored(meta), 4)

    return {
        'channels beyond the file': made_with(model_channels=4096, channel_mult=[64] * 3),
        'channels beyond reason': made_with(model_channels=10**9),
        'blocks beyond the file': made_with(num_blocks=30_000),
        'levels beyond the file': made_with(channel_mult=[1] * 64, num_blocks=0),
        'a list beyond reason': made_with(channel_mult=[1] * 100_000),
        'a filter beyond reason': made_with(resample_filter=[1] * 100_000),
        'labels beyond the file': made_with(label_dim=32_000),
        'negative channels': made_with(model_channels=-4),
        'channels of text': made_with(model_channels='4'),
        'channels of None': made_with(model_channels=None),
        'not a number': made_with(sigma_data=float('nan')),
        'bytes': made_with(sigma_data=b'x'),
        'a set': made_with(attn_resolutions={1}),
        'another class': made_with(class_name='os.system'),
        'another function': made_with(func_name='os.system'),
        'self': made_with(self=1),
        'unknown argument': made_with(surprise=1),
        'unknown model': made_with(model_type='system'),
        'a module for a model': made_with(model_type='torch'),
        'a dunder for a model': made_with(model_type='__builtins__'),
        'too few': made_with(8),
        'too many': made_with(*range(40)),
        'keys of numbers': made_with(**{'sigma_max': 7.25}).replace(b'\x8c\tsigma_max', b'K\x07', 1),
        'a network': made_with(attn_resolutions=networks.Linear(1, 1)),
    }


def _repeated():
    """What stands in a file once and is meant many times: a pickle refers to it in two bytes."""
    net = networks.EDMPrecond(8, 1, **TINY)
    meta, long = meta_of(net), 'x' * 1_000_000
    linear = meta_of(networks.Linear(1, 1))
    tensor = torch.nn.Parameter(torch.zeros(250_000))
    nothing = {f'{i}': None for i in range(30_000)}

    def with_state(**changes):
        return pickle.dumps({'ema': Stored(meta | {'state': meta['state'] | changes})}, 4)

    def with_arguments(**changes):
        return with_state(_init_kwargs={'img_resolution': 8, 'img_channels': 1, **TINY, **changes})

    def parts(count, **state):
        return {f'{i}': Stored(linear | {'state': linear['state'] | state}) for i in range(count)}

    nested = Stored(meta)
    for _ in range(40):
        nested = Stored(linear | {'state': linear['state'] | {'_parameters': {}, '_modules': {'x' * 30: nested}}})
    same = [[long] * 64] * 64
    return {
        'one tensor as 60,000 weights': with_state(_parameters={f'{i}': tensor for i in range(60_000)}),
        'one tensor in many parts': with_state(_modules=parts(3000, _parameters={'w': tensor})),
        'one empty list of weights in many parts': with_state(_modules=parts(3000, _parameters=nothing)),
        'one empty list of parts in many parts': with_state(_modules=parts(3000, _modules=nothing)),
        'one long name of many parts': with_state(
            _modules={long: Stored(linear)} | parts(3000, _parameters={long: tensor})
        ),
        'names that grow': pickle.dumps({'ema': nested}, 4),
        'one text in all arguments': with_arguments(**{f'a{i}': long for i in range(4000)}),
        'one text in a list of lists': with_arguments(attn_resolutions=same),
        'one list in a list of lists': with_arguments(attn_resolutions=[[[1] * 64] * 64] * 64),
        'one dict in many arguments': with_arguments(**{f'a{i}': nothing for i in range(4000)}),
        'one part in all arguments': with_arguments(**{f'a{i}': Stored(linear) for i in range(400)}),
        'one class name beside the network': pickle.dumps(
            {'net': net, **{f'{i}': Stored(linear | {'class_name': long}) for i in range(3000)}}, 4
        ),
    }


# ----------------------------------------------------------------------------


class Outcome(NamedTuple):
    result: str  # 'refused', 'read', or what went wrong
    seconds: float  # of processor time
    memory: int  # bytes that the process grew by, at its largest


def most_memory(data):
    """What docs/safety.md says that reading a network may take, in bytes."""
    return 5 * len(data) + (64 << 20) + 420 * min(len(data), safe_pickle.MAX_OPCODES)


def _memory(of):
    """VmRSS, or VmHWM, its largest value so far."""
    status = pathlib.Path('/proc/self/status')
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(of))


def outcome(data, read, refusals=(safe_pickle.SafePickleError, network_io.NetworkFileError), watched=audit.watched):
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # VmHWM begins anew
    memory, start = _memory('VmRSS'), time.process_time()
    try:
        with watched():
            read(data)
        result = 'read'
    except refusals as err:
        result = 'refused' if str(err).isprintable() else f'unprintable: {err!r:.200}'
    except BaseException as err:
        result = f'{err!r:.200}'
    return Outcome(result, time.process_time() - start, max(0, _memory('VmHWM') - memory))


def read_network(data):
    return network_io.build(network_io.read_network(data))


def read_numpy(data):
    return safe_pickle.load_numpy(io.BytesIO(data))


def of_pickles():
    """(kind, what reads it, {name: (outcome, most memory)}) of all pickles and safetensors files."""
    for kind, vectors in {**attacks(), 'networks': networks_of_lies()}.items():
        for reader, read in READERS.items() if kind != 'networks' else [('networks', read_network)]:
            yield kind, reader, {name: (outcome(data, read), most_memory(data)) for name, data in vectors.items()}


def of_files():
    """The same of `attack_files`, which are read from disk."""
    for kind, vectors in attack_files.vectors().items():
        found = {}
        for name, files in vectors.items():
            with tempfile.TemporaryDirectory() as folder:
                path = attack_files.write(folder, files)
                read = attack_files.READERS[kind][1]
                result = outcome(path, read, attack_files.REFUSALS, contextlib.nullcontext)
            found[name] = result, attack_files.most_memory(files)
        yield kind, 'its reader', found


READERS = {'networks': read_network, '`load_numpy`': read_numpy}


def main():
    print('| kind | read by | vectors | refused | slowest | largest memory |\n|---|---|---|---|---|---|')
    unexpected = []
    for kind, reader, found in itertools.chain(of_pickles(), of_files()):
        outcomes = [each for each, _ in found.values()]
        refused = sum(each.result == 'refused' for each in outcomes)
        seconds, memory = (max((each[i] for each in outcomes), default=0) for i in (1, 2))
        print(
            f'| {kind} | {reader} | {len(found)} | {refused} | {seconds:.2f} s | {memory / 2**20:.0f} MiB |', flush=True
        )
        for name, (each, most) in found.items():
            if each.result != 'refused':
                unexpected.append(f'{kind}, {reader}: {name}: {each.result}')
            if each.memory > most:
                unexpected.append(f'{kind}, {reader}: {name}: {each.memory:,} bytes, more than {most:,}')
    print('\n'.join(['', *unexpected]) if unexpected else '\nAll were refused.')


if __name__ == '__main__':
    main()

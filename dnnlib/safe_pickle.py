"""Read pickles as data: an interpreter of pickle's opcodes that can build plain values, and call nothing of the file's.

Python's unpickler imports and calls what a file names. This one knows no import and no attribute access: a file may
name only what a table lists, by its exact module and name, and what stands in the table is a function of this project
that checks its arguments. It works in two phases. `read_pickle` runs the opcodes and leaves an inert tree: None, bool,
int, float, str, bytes, list, tuple, dict, set, what the table's functions return, and `Record`s for objects that get
their state later. `settle` then walks the tree, without recursion, turns records into values, and refuses cycles, deep
nesting and small files that unfold into large trees.

`load_numpy` is the whole of it for plain values and numpy arrays; `torch_utils.network_pickle` has the table for
networks. Whatever is wrong with a file, the error is a `SafePickleError`.
"""

import codecs
import math
import pickle
import pickletools
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np

MAX_BYTES = 8 << 30
MAX_OPCODES = 400_000  # bounds the stack, the memo and the elements as well; EDM's largest network needs 120,000
MAX_NODES = 1_000_000  # of the tree, where a part counts as often as it occurs
MAX_DEPTH = 200
MAX_INT_BYTES = 16
MAX_KEY = 2**63  # of integers as keys: longer ones can be made to collide in a dict, all of them
MAX_NAME = 1000  # signs of a dotted name


class SafePickleError(ValueError):
    """The pickle is damaged, or asks for more than data; the message is one line that says why."""


Table = Mapping[tuple[str, str], Callable[..., Any]]


@dataclass(eq=False)
class Record:
    """An object as data: what kind it is, what is known of it, and the state that BUILD delivers, once."""

    kind: str
    args: tuple = ()
    state: Any = None


@dataclass(frozen=True)
class Name:
    """A name that the file mentions: the function of ours that stands for it."""

    module: str
    name: str
    call: Callable[..., Any]


def load_numpy(file: BinaryIO) -> Any:
    """The value in a pickle of None, bool, int, float, str, bytes, list, tuple, dict, set and numpy arrays of numbers.

    All protocols (0 to 5), as Python 2 and 3 and numpy 1 and 2 write them. What Python 2 calls `str` comes as bytes,
    also as a key: {b'data': array, b'labels': [...]}, like `pickle.load(..., encoding='bytes')`. numpy's scalars come
    as Python's numbers. Arrays are new, writable and in the byte order of this machine. Keys are str, bytes or int.

    Raises:
        SafePickleError: anything else, such as a call, an object of a class, an array of objects; or a damaged file.
    """
    return settle(read_pickle(file.read(), NUMPY_TABLE), finish=_numpy_value, leaves=(np.ndarray, np.dtype))


def expect(value: Any, kind: type | tuple[type, ...]) -> Any:
    """`value`, which has to be of this type; a bool is no int."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = ' or '.join(each.__name__ for each in kinds)
        raise SafePickleError(f'found {type(value).__name__} where such a file has {wanted}')
    return value


def refuse_name(module: str, name: str) -> NoReturn:
    raise SafePickleError(f'the file wants to call {f"{module}.{name}"!r}, which is none of the names that it may use')


# ----------------------------------------------------------------------------
# Phase one: from opcodes to an inert tree.


class Budget:
    """What a file of `size` bytes may cost: opcodes, and bytes of the values that are made of what is in it.

    Whoever makes a value pays for its memory, once: a tensor is cut from a storage that is paid for.
    """

    def __init__(self, size: int):
        if size > MAX_BYTES:
            raise SafePickleError(f'the file has {size} bytes; at most {MAX_BYTES} are read')
        self.opcodes, self.bytes = MAX_OPCODES, 3 * size + (64 << 20)

    def spend_opcode(self) -> None:
        self.opcodes -= 1
        if self.opcodes < 0:
            raise SafePickleError(f'the pickle has more than {MAX_OPCODES} opcodes')

    def spend_bytes(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise SafePickleError('the pickle makes values out of proportion to its size')


def read_pickle(
    data: bytes,
    table: Table,
    unknown: Callable[[str, str], Callable[..., Any]] = refuse_name,
    budget: Budget | None = None,
) -> Any:
    """The inert tree of the one pickle that `data` consists of.

    table: (module, name) → the function that REDUCE and NEWOBJ call when the file calls that name.
    unknown: is given any other name, and returns such a function or raises.
    """
    reader = Reader(data, table, unknown, budget)
    tree = reader.read()
    if reader.position != len(data):
        raise SafePickleError(f'{len(data) - reader.position} bytes follow the end of the pickle')
    return tree


class Reader:
    """The interpreter. Each `read` gives the tree of the next pickle in `data`.

    `persistent`, if given, is called with each persistent id (BINPERSID) and returns the value for it. A reader that
    the table's functions make for a pickle inside the pickle shares the budget of the outer one.
    """

    def __init__(
        self,
        data: bytes,
        table: Table,
        unknown: Callable[[str, str], Callable[..., Any]] = refuse_name,
        budget: Budget | None = None,
        persistent: Callable[[Any], Any] | None = None,
    ):
        self.data, self.position = data, 0
        self._table, self._unknown, self._persistent = table, unknown, persistent
        self._budget = budget or Budget(len(data))

    def read(self) -> Any:
        self._start, self._frame_end = self.position, len(self.data)
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            while (opcode := self._opcode()) != pickle.STOP:
                _STEPS[opcode](self)
        except (SafePickleError, MemoryError):
            raise
        except Exception as err:  # a damaged or hostile stream can trip the functions of the table anywhere
            raise SafePickleError(f'the pickle is damaged at byte {self.position} ({type(err).__name__})') from None
        if len(self._stack) != 1 or self._marked:
            raise SafePickleError('the pickle does not end with exactly one value')
        return self._stack.pop()

    def _opcode(self) -> bytes:
        self._budget.spend_opcode()
        if self.position == self._frame_end:
            self._frame_end = len(self.data)
        opcode = self.take(1)
        if opcode not in _STEPS and opcode != pickle.STOP:
            raise SafePickleError(f'the pickle has the opcode {_OPCODE_NAMES.get(opcode, opcode)}, which is not read')
        return opcode

    # What is left of the file.

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > self._frame_end:
            raise SafePickleError(f'the file ends early, or a frame does, at byte {self.position}')
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(f'<{code}', self.take(struct.calcsize(code)))[0]

    def sized(self, code: str) -> bytes:
        return self.take(self.number(code))

    def line(self) -> bytes:
        end = self.data.find(b'\n', self.position, self._frame_end)
        line = self.take((end if end >= 0 else self._frame_end) - self.position)
        self.take(1)
        return line

    # The stack.

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack:
            raise SafePickleError('the pickle takes a value that is not there')
        return self._stack.pop()

    def top(self, kind: type) -> Any:
        value = self.pop()
        self._stack.append(value)
        return expect(value, kind)

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[Any]:
        if not self._marked:
            raise SafePickleError('the pickle takes values up to a mark that is not there')
        items, self._stack = self._stack, self._marked.pop()
        return items

    # Opcodes of more than a line.

    def protocol(self) -> None:
        at_start, number = self.position == self._start + 1, self.take(1)[0]
        if not at_start or number > 5:
            raise SafePickleError(f'pickle protocol {number} is not read, or not announced at the start')

    def frame(self) -> None:
        size = self.number('Q')
        if self._frame_end != len(self.data) or self.position + size > len(self.data):
            raise SafePickleError(f'the pickle has a frame of {size} bytes that does not fit')
        self._frame_end = self.position + size

    def text(self, value: str) -> None:
        if not value.isascii():  # then it may have 4 bytes in memory for each in the file
            self._budget.spend_bytes(sys.getsizeof(value))
        self.push(value)

    def integer(self, size: int) -> None:
        if size > MAX_INT_BYTES:
            raise SafePickleError(f'the pickle has an integer of {size} bytes')
        self.push(int.from_bytes(self.take(size), 'little', signed=True))

    def decimal(self) -> None:
        """The text integers of protocol 0: I1, L1L; I00 and I01 are booleans."""
        line = self.line()
        if len(line) > 3 * MAX_INT_BYTES:
            raise SafePickleError(f'the pickle has an integer of {len(line)} digits')
        self.push(line == b'01' if line in (b'00', b'01') else int(line.removesuffix(b'L')))

    def quoted(self) -> None:
        line = self.line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[:1] != line[-1:]:
            raise SafePickleError('the pickle has a string without quotes')
        self.push(codecs.escape_decode(line[1:-1])[0])

    def put(self, index: int) -> None:
        if index > MAX_OPCODES:
            raise SafePickleError(f'the pickle has the memo number {index}')
        value = self.pop()
        self._memo[index] = value
        self.push(value)

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise SafePickleError(f'the pickle refers to memo {index}, which it has not filled')
        self.push(self._memo[index])

    def name(self, module: Any, name: Any) -> None:
        module, name = expect(module, str), expect(name, str)
        if len(module) + len(name) > MAX_NAME:
            raise SafePickleError(f'the pickle has a name of {len(module) + len(name)} signs')
        self.push(Name(module, name, self._table.get((module, name)) or self._unknown(module, name)))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def call(self) -> None:
        args, name = expect(self.pop(), tuple), expect(self.pop(), Name)
        self._budget.spend_bytes(sys.getsizeof(args))
        value = name.call(*args)
        self._budget.spend_bytes(sys.getsizeof(value))
        self.push(value)

    def build(self) -> None:
        state = self.pop()
        record = self.top(Record)
        if record.state is not None or state is None:
            raise SafePickleError(f'the pickle gives a state to {record.kind!r} that it cannot take')
        for part in state if isinstance(state, tuple) else ():
            self._budget.spend_bytes(sys.getsizeof(part))  # an array becomes a copy of the bytes in its state
        record.state = state

    def persistent_id(self) -> None:
        if self._persistent is None:
            raise SafePickleError('the pickle has the opcode BINPERSID, which is not read')
        self.push(self._persistent(self.pop()))

    def fill(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        self.top(dict).update(zip(map(key, keys), values, strict=True))

    def tuple(self, count: int) -> None:
        self.push((*[self.pop() for _ in range(count)][::-1],))


def key(value: Any) -> Any:
    """What may be hashed. Tuples may not: nested deeply, they would overflow the stack of Python's interpreter."""
    if isinstance(value, int) and not -MAX_KEY <= value < MAX_KEY:
        raise SafePickleError('the pickle has a key that is an integer of more than 8 bytes')
    return expect(value, (str, bytes, int))


def _dict(items: list[Any]) -> dict:
    return dict(zip(map(key, items[::2]), items[1::2], strict=True))


def _set_item(reader: Reader) -> None:
    value, name = reader.pop(), reader.pop()
    reader.fill([name, value])


def _append(reader: Reader) -> None:
    value = reader.pop()
    reader.top(list).append(value)


def _append_all(reader: Reader) -> None:
    items = reader.pop_mark()
    reader.top(list).extend(items)


def _add_all(reader: Reader) -> None:
    items = reader.pop_mark()
    reader.top(set).update(map(key, items))


_OPCODE_NAMES = {each.code.encode('latin1'): each.name for each in pickletools.opcodes}
_STEPS: dict[bytes, Callable[[Reader], None]] = {
    pickle.PROTO: Reader.protocol,
    pickle.FRAME: Reader.frame,
    pickle.NONE: lambda r: r.push(None),
    pickle.NEWTRUE: lambda r: r.push(True),
    pickle.NEWFALSE: lambda r: r.push(False),
    pickle.BININT: lambda r: r.push(r.number('i')),
    pickle.BININT1: lambda r: r.push(r.number('B')),
    pickle.BININT2: lambda r: r.push(r.number('H')),
    pickle.LONG1: lambda r: r.integer(r.number('B')),
    pickle.BINFLOAT: lambda r: r.push(struct.unpack('>d', r.take(8))[0]),
    pickle.SHORT_BINUNICODE: lambda r: r.text(r.sized('B').decode()),
    pickle.BINUNICODE: lambda r: r.text(r.sized('I').decode()),
    pickle.BINUNICODE8: lambda r: r.text(r.sized('Q').decode()),
    pickle.SHORT_BINBYTES: lambda r: r.push(r.sized('B')),
    pickle.BINBYTES: lambda r: r.push(r.sized('I')),
    pickle.BINBYTES8: lambda r: r.push(r.sized('Q')),
    pickle.BYTEARRAY8: lambda r: r.push(r.sized('Q')),
    pickle.MARK: Reader.mark,
    pickle.EMPTY_LIST: lambda r: r.push([]),
    pickle.EMPTY_DICT: lambda r: r.push({}),
    pickle.EMPTY_SET: lambda r: r.push(set()),
    pickle.EMPTY_TUPLE: lambda r: r.push(()),
    pickle.TUPLE: lambda r: r.push(tuple(r.pop_mark())),
    pickle.TUPLE1: lambda r: r.tuple(1),
    pickle.TUPLE2: lambda r: r.tuple(2),
    pickle.TUPLE3: lambda r: r.tuple(3),
    pickle.APPEND: _append,
    pickle.APPENDS: _append_all,
    pickle.ADDITEMS: _add_all,
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: lambda r: r.fill(r.pop_mark()),
    pickle.MEMOIZE: lambda r: r.put(len(r._memo)),
    pickle.BINPUT: lambda r: r.put(r.number('B')),
    pickle.LONG_BINPUT: lambda r: r.put(r.number('I')),
    pickle.BINGET: lambda r: r.get(r.number('B')),
    pickle.LONG_BINGET: lambda r: r.get(r.number('I')),
    pickle.GLOBAL: lambda r: r.name(r.line().decode(), r.line().decode()),
    pickle.STACK_GLOBAL: Reader.stack_name,
    pickle.REDUCE: Reader.call,
    pickle.NEWOBJ: Reader.call,
    pickle.BUILD: Reader.build,
    pickle.BINPERSID: Reader.persistent_id,
    # Protocols 0 and 1, and Python 2.
    pickle.INT: Reader.decimal,
    pickle.LONG: Reader.decimal,
    pickle.FLOAT: lambda r: r.push(float(r.line())),
    pickle.STRING: Reader.quoted,
    pickle.BINSTRING: lambda r: r.push(r.sized('I')),
    pickle.SHORT_BINSTRING: lambda r: r.push(r.sized('B')),
    pickle.UNICODE: lambda r: r.text(codecs.raw_unicode_escape_decode(r.line())[0]),
    pickle.LIST: lambda r: r.push(r.pop_mark()),
    pickle.DICT: lambda r: r.push(_dict(r.pop_mark())),
    pickle.GET: lambda r: r.get(int(r.line()[:10])),
    pickle.PUT: lambda r: r.put(int(r.line()[:10])),
}


# ----------------------------------------------------------------------------
# Phase two: from the tree to values.

_PLAIN = (type(None), bool, int, float, str, bytes)


def settle(tree: Any, finish: Callable[[Record], Any], leaves: tuple[type, ...] = ()) -> Any:
    """The tree with `finish(record)` in the place of each record; lists and dicts are changed in place.

    A record's state is settled before the record is. The result holds plain values, containers, instances of `leaves`
    and what `finish` returns, is at most MAX_DEPTH deep, has at most MAX_NODES nodes, and contains itself nowhere: any
    recursive function may walk it.
    """
    plain = (*_PLAIN, *leaves)
    # id → (the value, kept so that no other takes its id; what it becomes; its nodes; its depth)
    done: dict[int, tuple[Any, Any, int, int]] = {}
    entered: set[int] = set()
    frames: list[tuple[Any, list[Any], list[tuple[Any, Any, int, int]]]] = [(None, [tree], [])]  # value, parts, results
    while True:
        value, parts, results = frames[-1]
        if len(results) < len(parts):
            part = parts[len(results)]
            if isinstance(part, plain):
                results.append((part, part, 1, 1))
            elif id(part) in done:
                results.append(done[id(part)])
            elif id(part) in entered:
                raise SafePickleError('the pickle holds something that contains itself')
            elif len(frames) > MAX_DEPTH:
                raise SafePickleError(f'the pickle holds something nested more than {MAX_DEPTH} deep')
            else:
                entered.add(id(part))
                frames.append((part, _parts(part), []))
        elif len(frames) == 1:
            return results[0][1]
        else:
            frames.pop()
            entered.remove(id(value))
            nodes = 1 + sum(result[2] for result in results)
            depth = 1 + max((result[3] for result in results), default=0)
            if nodes > MAX_NODES or depth > MAX_DEPTH:
                raise SafePickleError('the pickle unfolds into something out of proportion, too deep or too large')
            done[id(value)] = (value, _settled(value, [result[1] for result in results], finish), nodes, depth)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, (list, tuple, set)):
        return [*value]
    if isinstance(value, Record):
        return [*value.args, value.state]
    if isinstance(value, Name):
        raise SafePickleError(f'the pickle has the name {f"{value.module}.{value.name}"!r} in the place of a value')
    raise SafePickleError(f'the pickle has a {type(value).__name__} in the place of a value')


def _settled(value: Any, parts: list[Any], finish: Callable[[Record], Any]) -> Any:
    if isinstance(value, dict):
        value.update(zip(value, parts, strict=True))
    elif isinstance(value, list):
        value[:] = parts
    elif isinstance(value, tuple):
        value = tuple(parts)
    elif isinstance(value, Record):
        value.args, value.state = tuple(parts[:-1]), parts[-1]
        value = finish(value)
    return value


# ----------------------------------------------------------------------------
# The names that plain values and numpy use.

NUMBERS = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')


def _text(value: Any) -> str:
    """Python 2 writes bytes where Python 3 writes str."""
    value = expect(value, (str, bytes))
    return value.decode('latin1') if isinstance(value, bytes) else value


def _latin1(text: str, encoding: str) -> bytes:
    """`_codecs.encode`: how Python 3 writes bytes in protocols 0 to 2."""
    if encoding != 'latin1':
        raise SafePickleError(f'bytes in this file are stored in the encoding {encoding!r}')
    return expect(text, str).encode('latin1')


def _set(items: Any = ()) -> set:
    made = set(map(key, expect(items, (list, tuple))))
    if len(made) < len(items):  # as no set is written; so the work is in proportion to the set, which is paid for
        raise SafePickleError('the pickle has a set with an element twice')
    return made


def _dtype_record(code: Any, align: Any = False, copy: Any = False) -> Record:
    if _text(code) not in NUMBERS:
        raise SafePickleError(f'numpy type {_text(code)!r} is no type of numbers that is read')
    return Record('dtype', (_text(code),))


def _dtype(record: Any) -> np.dtype:
    record = expect(record, Record)
    if record.kind != 'dtype':
        raise SafePickleError(f'found {record.kind!r} where such a file has a numpy type')
    dtype = np.dtype(record.args[0])
    if record.state is None:
        return dtype
    order, *structure = _fields(record, at_least=5)[1:5]
    if _text(order) not in ('<', '>', '|', '=') or structure != [None, None, None]:
        raise SafePickleError('the pickle has a numpy type that is none of numbers')
    return dtype.newbyteorder(_text(order))


def _fields(record: Record, at_least: int) -> tuple:
    state = expect(record.state, tuple)
    if len(state) < at_least:
        raise SafePickleError(f'the pickle has a numpy {record.kind} with {len(state)} fields')
    return state


def _scalar(dtype: Any, data: Any) -> Any:
    """A numpy number, as Python's."""
    array = np.frombuffer(expect(data, bytes), _dtype(dtype))
    if array.size != 1:
        raise SafePickleError('a numpy number in this file is damaged')
    return array[0].item()


def _array_record(subtype: Any, shape: Any, code: Any) -> Record:
    """`_reconstruct`: an empty array, which BUILD fills."""
    if (expect(subtype, Name).module, subtype.name) != ('numpy', 'ndarray'):
        raise SafePickleError('the pickle has a numpy array of a class that is not read')
    return Record('array')


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """How protocol 5 writes arrays."""
    return _array(shape, _dtype(dtype), order == 'F', data)


def _array(shape: Any, dtype: np.dtype, fortran: Any, data: Any) -> np.ndarray:
    sizes = expect(shape, tuple)
    if min((expect(size, int) for size in sizes), default=0) < 0 or len(sizes) > 32:
        raise SafePickleError('the pickle has a numpy array of a shape that is none')
    if math.prod(sizes) * expect(dtype, np.dtype).itemsize != len(expect(data, bytes)):
        raise SafePickleError(f'the pickle has a numpy array of {len(data)} bytes, which do not make up its shape')
    try:
        array = np.frombuffer(data, dtype).reshape(sizes, order='F' if fortran else 'C')
    except ValueError as err:  # sizes beyond numpy's, beside a zero
        raise SafePickleError(f'the pickle has a numpy array that numpy cannot hold ({err})') from None
    return array.astype(dtype.newbyteorder('='))


def not_called(*args: Any) -> NoReturn:
    raise SafePickleError('the pickle calls a name that such files only mention')


def _numpy_value(record: Record) -> Any:
    """The array or the type of numbers that a record stands for."""
    return _dtype(record) if record.kind == 'dtype' else _array(*_fields(record, at_least=5)[1:5])


PLAIN_TABLE: Table = {
    ('_codecs', 'encode'): _latin1,
    **{(module, 'set'): _set for module in ('builtins', '__builtin__')},
    **{(module, 'bytes'): lambda: b'' for module in ('builtins', '__builtin__')},
    ('numpy', 'dtype'): _dtype_record,
    **{(f'numpy.{core}.multiarray', 'scalar'): _scalar for core in ('core', '_core')},
}
NUMPY_TABLE: Table = {
    **PLAIN_TABLE,
    ('numpy', 'ndarray'): not_called,
    **{(f'numpy.{core}.multiarray', '_reconstruct'): _array_record for core in ('core', '_core')},
    **{(f'numpy.{core}.numeric', '_frombuffer'): _frombuffer for core in ('core', '_core')},
}

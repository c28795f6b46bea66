"""The records of an LMDB database, read by a process of their own: a damaged database ends its reader by a signal.

`python images/lmdb_records.py FOLDER` writes their number, then for each the lengths of key and value, and these, to
stdout. Numbers are of 8 bytes. No more is written than the files of the database hold.
"""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import IO


class LmdbError(ValueError):
    """The database is damaged, or is none; the message is one line."""


def count(folder: str) -> int:
    """The number of records. Raises LmdbError."""
    with _reader(folder) as process:
        assert process.stdout is not None
        number = _number(process.stdout)
        if number is None:
            raise LmdbError(_reason(process))
        process.kill()
    return number


def records(folder: str) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) in the order of the keys. Raises LmdbError at the first that cannot be read."""
    with _reader(folder) as process:
        stream = process.stdout
        assert stream is not None
        try:
            for _ in range(_number(stream) or 0):
                key_size, value_size = _number(stream), _number(stream)
                key, value = stream.read(key_size or 0), stream.read(value_size or 0)
                if value_size is None or len(value) != value_size:
                    raise LmdbError(_reason(process))
                yield key, value
            if _number(stream) != 0:
                raise LmdbError(_reason(process))
        finally:
            process.kill()


def _reader(folder: str) -> 'subprocess.Popen[bytes]':
    command, pipe = [sys.executable, __file__, folder], subprocess.PIPE
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)


def _number(stream: IO[bytes]) -> int | None:
    data = stream.read(8)
    return int.from_bytes(data, 'little') if len(data) == 8 else None


def _reason(process: 'subprocess.Popen[bytes]') -> str:
    """Why the process ended."""
    _, said = process.communicate()
    if process.returncode < 0:
        return f'signal {-process.returncode} ended its reader'
    return said.decode(errors='replace').strip().rpartition('\n')[2] or 'it does not hold as many records as it says'


def main(folder: str) -> None:
    import lmdb

    try:
        with lmdb.open(folder, readonly=True, create=False, lock=False) as database, database.begin() as transaction:
            size = left = os.path.getsize(os.path.join(folder, 'data.mdb'))
            if size < (database.info()['last_pgno'] + 1) * database.stat()['psize']:
                sys.exit('its file is cut off')
            sys.stdout.buffer.write(struct.pack('<Q', min(database.stat()['entries'], size)))
            before = b''
            for key, value in transaction.cursor():
                left -= len(key) + len(value)
                if key <= before or left < 0:
                    sys.exit('its keys are not in order, or it holds more than its file')
                sys.stdout.buffer.write(struct.pack('<QQ', len(key), len(value)) + key + value)
                before = key
            sys.stdout.buffer.write(bytes(8))
    except lmdb.Error as err:
        sys.exit(str(err))


if __name__ == '__main__':
    main(sys.argv[1])

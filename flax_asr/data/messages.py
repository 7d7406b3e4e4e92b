"""Python values sent through a socket between our own processes; arrays are not pickled.

A message is the number of its parts, their sizes, and the parts: a pickle, then the memory of each
array in it.
"""

import pickle
import socket
import struct
from typing import Any

import numpy as np

_SIZE = struct.Struct("<Q")


def send(link: socket.socket, value: Any) -> None:
    """Sends a value that can be pickled; blocks while the other side does not read.

    Raises:
        OSError: the other side is gone.
    """
    arrays: list[pickle.PickleBuffer] = []
    parts = [pickle.dumps(value, protocol=5, buffer_callback=arrays.append)]
    parts += [array.raw() for array in arrays]
    sizes = [len(parts), *(len(part) for part in parts)]
    link.sendall(b"".join(_SIZE.pack(size) for size in sizes) + parts[0])
    for part in parts[1:]:
        link.sendall(part)


def receive(link: socket.socket) -> Any:
    """Waits for the next value, and returns it.

    Raises:
        EOFError: the other side is gone.
    """
    (count,) = _SIZE.unpack(_read(link, _SIZE.size))
    sizes = [size for (size,) in _SIZE.iter_unpack(_read(link, count * _SIZE.size))]
    value, *arrays = (_read(link, size) for size in sizes)
    return pickle.loads(value, buffers=arrays)


def _read(link: socket.socket, size: int) -> memoryview:
    data = memoryview(np.empty(size, np.uint8))
    done = 0
    while done < size:
        read = link.recv_into(data[done:])
        if not read:
            raise EOFError("the other process is gone")
        done += read
    return data

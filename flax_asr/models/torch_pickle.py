"""An allow-list unpickler for torch checkpoints: without torch, and without running code.

`torch.save` writes a pickle program (`data.pkl`) that builds a dictionary of tensors, whose values
are in separate files. The standard unpickler imports and calls whatever the program names. This one
knows the few operations that build dictionaries, tuples and tensors, refuses all others by name,
and checks a tensor's extent against the real size of its storage before reading it.

Source: Python's pickletools (operations); torch/_utils.py, `_rebuild_tensor_v2` (arguments).
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from flax_asr import errors

STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
ORDERED_DICT = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
ALLOWED = (*STORAGES, ORDERED_DICT, TENSOR, PARAMETER)

_PUSH_ARGUMENT = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINSTRING".split()
)
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING_TO_DO = frozenset(("PROTO", "FRAME"))
_MARK = object()


class _Global(NamedTuple):
    """An allowed name: never an object that could be called."""

    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    elements: int


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


class _Machine:
    """The state of one run of a program: stack, memo and storages."""

    def __init__(self, read_storage: Callable[[str], bytes], source: str):
        self.read_storage = read_storage
        self.source = source
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, np.ndarray] = {}

    def run(self, program: bytes) -> Any:
        for operation, argument, _ in pickletools.genops(program):
            if operation.name == "STOP":
                return self.stack.pop()
            self.step(operation.name, argument)
        raise ValueError("it has no end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS"):
            items = self.since_mark() if name == "APPENDS" else [stack.pop()]
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            pairs = zip(items[::2], items[1::2], strict=True)
            self.top(dict).update(pairs)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            words = argument.split(" ") if name == "GLOBAL" else [stack.pop(), stack.pop()][::-1]
            stack.append(self.allowed(".".join(words)))
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif name == "BUILD":
            # Attributes of the dictionary (torch's `_metadata`), which are not needed.
            stack.pop()
            self.top(dict)
        elif name not in _NOTHING_TO_DO:
            raise errors.ModelError(
                f"{self.source}: refused, its pickle uses the operation {name}, which weights "
                "never need. Ask for the model in safetensors form."
            )

    def since_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"{type(self.stack[-1]).__name__} instead of a {kind.__name__}")
        return self.stack[-1]

    def allowed(self, name: str) -> _Global:
        if name not in ALLOWED:
            raise errors.ModelError(
                f"{self.source}: refused, its pickle asks for {name!r}, which weights never need "
                "and which could run code. Ask for the model in safetensors form."
            )
        return _Global(name)

    def storage(self, identity: Any) -> _Storage:
        kind, storage_type, key, _, elements = identity
        if kind != "storage" or type(key) is not str or type(storage_type) is not _Global:
            raise ValueError("a storage is not described as torch does")
        return _Storage(STORAGES[storage_type.name], key, _whole(elements))

    def call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not _Global or type(arguments) is not tuple:
            raise TypeError("something that is not a function is called")
        if function.name == ORDERED_DICT and not arguments:
            return {}
        if function.name == TENSOR:
            return self.tensor(*arguments[:4])
        if function.name == PARAMETER and type(arguments[0]) is np.ndarray:
            return arguments[0]
        raise ValueError(f"{function.name} is called with arguments that torch never writes")

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        """A view of the storage; offset and strides are in elements."""
        if type(storage) is not _Storage or len(shape) != len(strides):
            raise ValueError("a tensor is not described as torch does")
        shape, strides = tuple(map(_whole, shape)), tuple(map(_whole, strides))
        elements = 1
        for extent in shape:
            elements *= extent
        pairs = zip(shape, strides, strict=True)
        last = _whole(offset) + sum((extent - 1) * stride for extent, stride in pairs)
        # A stride of 0 makes a tensor of any size out of one number.
        if elements and (last >= storage.elements or elements > storage.elements):
            raise ValueError(
                f"a tensor of shape {shape} does not fit its storage of {storage.elements} numbers"
            )
        values = self.values(storage)
        if not elements:
            return np.zeros(shape, storage.dtype)
        steps = tuple(stride * storage.dtype.itemsize for stride in strides)
        start = offset * storage.dtype.itemsize
        return np.ndarray(shape, storage.dtype, values, start, steps)

    def values(self, storage: _Storage) -> np.ndarray:
        if storage.key not in self.storages:
            content = self.read_storage(storage.key)
            self.storages[storage.key] = np.frombuffer(content, np.uint8)
        content = self.storages[storage.key]
        if content.size != storage.elements * storage.dtype.itemsize:
            raise ValueError(
                f"storage {storage.key} has {content.size} bytes, not {storage.elements} numbers "
                f"of {storage.dtype.itemsize}"
            )
        return content.view(storage.dtype)


def state_dict(
    program: bytes, read_storage: Callable[[str], bytes], *, source: str
) -> dict[str, np.ndarray]:
    """The tensors that `program`, a checkpoint's data.pkl, describes.

    Args:
        program: the pickle, of any protocol.
        read_storage: the bytes of the storage with this key (`data/KEY` in the checkpoint).
        source: the file's name, for messages.

    Raises:
        ModelError: the program is damaged, builds anything but a dictionary of tensors, or a
            tensor reaches outside its storage.
    """
    try:
        result = _Machine(read_storage, source).run(program)
    # Arbitrary bytes can lead to an empty stack, an unknown memo or storage type, a wrong type, or
    # a number out of range.
    except (IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise errors.ModelError(f"{source}: its data.pkl is damaged: {error}.") from error
    if type(result) is not dict:
        raise errors.ModelError(f"{source}: holds a {type(result).__name__}, not named tensors.")
    for name, value in result.items():
        if type(name) is not str or type(value) is not np.ndarray:
            raise errors.ModelError(
                f"{source}: {name!r} is a {type(value).__name__}, not a tensor. Only a plain "
                "state_dict can be read, as `model.save_pretrained` writes it."
            )
    return result

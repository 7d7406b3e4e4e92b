"""Weight files of models, read and written.

Reads safetensors, torch's zip and Flax's msgpack, in one file or several with an index, all under
torch's names; writes safetensors. Files are not trusted: no code is run, and the sizes in a header
are checked against the file before memory is allocated.
"""

import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flax_asr import atomic, errors, json_object
from flax_asr.models import convert, torch_pickle

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
MSGPACK = "flax_model.msgpack"
MSGPACK_INDEX = "flax_model.msgpack.index.json"

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# The limit of the safetensors library.
MAX_HEADER_BYTES = 100_000_000
# That of XLS-R 2B has 0.2 MB.
MAX_PROGRAM_BYTES = 16_000_000

# What DataParallel, DistributedDataParallel and torch.compile put before every name of the model
# that they wrap; either can be in the other.
_WRAPPERS = ("module.", "_orig_mod.", "module.")

Tensors = dict[str, np.ndarray]


def _damaged(path: Path, why: str) -> errors.ModelError:
    return errors.ModelError(f"{path} is damaged: {why}. Download or copy the model again.")


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise errors.ModelError(
                f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder."
            )


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    """First byte, end, type and shape of one tensor in a safetensors header, checked."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the header's entry for {name!r} is not a tensor's")
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise errors.ModelError(
            f"{path}: the tensor {name!r} has the type {entry['dtype']!r}, which is not supported."
        )
    dtype, shape, offsets = (
        SAFETENSORS_DTYPES[entry["dtype"]],
        entry["shape"],
        entry["data_offsets"],
    )
    for sizes in (shape, offsets):
        if not isinstance(sizes, list) or not all(map(_is_size, sizes)):
            raise _damaged(
                path, f"the header's entry for {name!r} has sizes that are not whole numbers"
            )
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"the tensor {name!r} of shape {shape} does not fit its data_offsets")
    return offsets[0], offsets[1], dtype, tuple(shape)


def _read_safetensors(path: Path) -> Tensors:
    """Views of the memory-mapped file. (The library's numpy reader refuses bfloat16.)"""
    _refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, "it is shorter than its header says")
        try:
            header = json_object.parse(file.read(header_bytes))
        except ValueError as error:
            raise _damaged(path, f"its header cannot be read: {error}") from error
    metadata = header.pop("__metadata__", {})
    spans = {name: _span(path, name, entry) for name, entry in header.items()}

    data_bytes, end = size - 8 - header_bytes, 0
    for name, (start, stop, _, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if start != end:
            raise _damaged(path, f"there is a gap or an overlap before the tensor {name!r}")
        end = stop
    if end != data_bytes:
        raise _damaged(path, f"it holds {data_bytes} bytes of tensors, its header says {end}")

    mapped = np.memmap(path, np.uint8, mode="r").view(np.ndarray)[8 + header_bytes :]
    tensors = {
        name: mapped[start:stop].view(dtype).reshape(shape)
        for name, (start, stop, dtype, shape) in spans.items()
    }
    if isinstance(metadata, dict) and metadata.items() >= {("format", "flax")}:
        return convert.torch_names(_nested(tensors))
    return tensors


def _nested(tensors: Tensors) -> dict[str, Any]:
    """The tree of names like `lm_head.kernel`, as transformers 4 wrote Flax safetensors."""
    tree: dict[str, Any] = {}
    for name, values in tensors.items():
        *parents, leaf = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = values
    return tree


def _torch_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by their names within its one folder, with their sizes checked."""
    infos = archive.infolist()
    if any(i.compress_type != zipfile.ZIP_STORED or i.file_size != i.compress_size for i in infos):
        raise errors.ModelError(
            f"{path}: refused, it has compressed members, unlike torch's files."
        )
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise _damaged(path, "its members are larger than the file")
    members = {info.filename.partition("/")[2]: info for info in infos}
    if len(members) < len(infos) or "data.pkl" not in members:
        raise errors.ModelError(f"{path} is a zip archive, but not one that torch wrote.")
    if members["data.pkl"].file_size > MAX_PROGRAM_BYTES:
        raise errors.ModelError(f"{path}: refused, its data.pkl is too large for a model.")
    return members


def _read_torch(path: Path) -> Tensors:
    _refuse_pointer(path)
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80":
        raise errors.ModelError(
            f"{path} is in the format of torch before 1.6, which cannot be read without running "
            "its code. Convert it where you trust it, with transformers and torch: "
            "`AutoModelForCTC.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)`."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = _torch_members(path, archive)

            def read_storage(key: str) -> bytes:
                return archive.read(members[f"data/{key}"])

            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise errors.ModelError(f"{path}: written by a big-endian machine: not supported.")
            program = archive.read(members["data.pkl"])
            return torch_pickle.state_dict(program, read_storage, source=str(path))
    # zipfile raises NotImplementedError and RuntimeError for encrypted members and odd versions.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, str(error)) from error


def _read_msgpack(path: Path) -> Tensors:
    from flax import serialization

    _refuse_pointer(path)
    try:
        tensors = convert.torch_names(serialization.msgpack_restore(path.read_bytes()))
    # msgpack's own errors are ValueErrors; the others come from malformed arrays and trees.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"it is not a tree of Flax's msgpack ({error})") from error
    for name, values in tensors.items():
        if values.dtype.hasobject or values.dtype.kind in "SU":
            raise _damaged(path, f"{name!r} is not a tensor")
    return tensors


def _torch_name(flax_name: str) -> str:
    return convert.torch_name(flax_name.split("/"))


def _read_index(
    path: Path, read_shard: Callable[[Path], Tensors], name: Callable[[str], str] = str
) -> Tensors:
    """Tensors of all shards; `name` maps a name in the index to the one `read_shard` returns."""
    places = (json_object.read(path) or {}).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise _damaged(path, "it has no weight_map of tensor names to files")
    tensors: Tensors = {}
    for shard in sorted(set(places.values())):
        if shard != os.path.basename(shard) or shard in ("", ".", ".."):
            raise errors.ModelError(f"{path}: refused, it names {shard!r}, outside its folder.")
        if not (path.parent / shard).is_file():
            raise errors.ModelError(f"{path.parent / shard} is missing: {path.name} names it.")
        content = read_shard(path.parent / shard)
        listed = {name(key) for key, place in places.items() if place == shard}
        if listed != content.keys():
            differs = min(listed ^ content.keys())
            raise _damaged(path.parent / shard, f"it and {path.name} disagree about {differs!r}")
        tensors |= content
    return tensors


_READERS: dict[str, Callable[[Path], Tensors]] = {
    SAFETENSORS: _read_safetensors,
    SAFETENSORS_INDEX: lambda path: _read_index(path, _read_safetensors),
    TORCH: _read_torch,
    TORCH_INDEX: lambda path: _read_index(path, _read_torch),
    MSGPACK: _read_msgpack,
    MSGPACK_INDEX: lambda path: _read_index(path, _read_msgpack, _torch_name),
}
# In order of preference if a folder has several.
FILES = tuple(_READERS)


def _unwrapped(tensors: Tensors) -> Tensors:
    """Under the model's own names, where it was saved with a wrapper of torch around it."""
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def read(folder: str | os.PathLike) -> Tensors:
    """A model folder's tensors, with torch's names and layouts, in the type they are stored in.

    Those of a model that DataParallel or torch.compile wrapped are named as without. The arrays may
    be read-only views of the file. Of several weight files the first of `FILES` is taken.

    Raises:
        ModelError: there are no weights, or they are damaged, truncated or would run code.
    """
    for name, reader in _READERS.items():
        path = Path(folder) / name
        if path.is_file():
            try:
                return _unwrapped(reader(path))
            except OSError as error:
                raise errors.ModelError(f"{path} cannot be read: {errors.why(error)}.") from error
    raise errors.ModelError(f"{folder} holds no weights: it needs one of {', '.join(FILES)}.")


def write(
    folder: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes model.safetensors, whole or not at all; returns its path.

    `metadata` defaults to what transformers expects of PyTorch's weights, {"format": "pt"}.

    Raises:
        ModelError: the folder cannot be written.
    """
    import safetensors
    from safetensors import numpy as safetensors_numpy

    path = Path(folder) / SAFETENSORS
    arrays = {name: np.asarray(values, order="C") for name, values in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path, shared=True) as unfinished:
            safetensors_numpy.save_file(arrays, unfinished, dict(metadata or {"format": "pt"}))
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.ModelError(f"{path} cannot be written: {error}.") from error
    return path

import io
import json
import os
import pickle
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import small_torch
import torch
from flax import serialization, traverse_util
from safetensors import torch as safetensors_torch

from flax_asr import errors
from flax_asr.models import convert, weights


def _state(name="Wav2Vec2ForCTC"):
    return small_torch.model(name, small_torch.config()).state_dict()


def _same(ours, state):
    assert ours.keys() == state.keys()
    for key, tensor in state.items():
        expected = tensor.detach().contiguous()
        assert ours[key].shape == tuple(expected.shape), key
        assert ours[key].tobytes() == expected.flatten().view(torch.uint8).numpy().tobytes(), key


def _refused(folder, match):
    with pytest.raises(errors.ModelError, match=match):
        weights.read(folder)


# What torch and transformers write is read.


def test_safetensors_of_transformers_are_read_exactly(tmp_path):
    built = small_torch.model("Wav2Vec2ForCTC", small_torch.config())
    built.save_pretrained(tmp_path)
    _same(weights.read(tmp_path), built.state_dict())


def test_sharded_safetensors_of_transformers_are_read_exactly(tmp_path):
    built = small_torch.model("Wav2Vec2ForCTC", small_torch.config())
    built.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / weights.SAFETENSORS_INDEX).exists()
    assert not (tmp_path / weights.SAFETENSORS).exists()
    _same(weights.read(tmp_path), built.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("protocol", [2, 4])
def test_torch_zip_is_read_exactly_in_every_float_type(tmp_path, dtype, protocol):
    state = {key: value.to(dtype) for key, value in _state().items()}
    torch.save(state, tmp_path / weights.TORCH, pickle_protocol=protocol)
    ours = weights.read(tmp_path)
    _same(ours, state)
    if dtype == torch.bfloat16:
        assert ours["lm_head.weight"].dtype == ml_dtypes.bfloat16


def test_torch_zip_of_views_parameters_and_integers_is_read(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "transposed": base.T,
        "part": base[1:3, 2:5],
        "step": base[:, ::2],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    torch.save(state, tmp_path / weights.TORCH)
    ours = weights.read(tmp_path)
    _same(ours, state)


def test_torch_state_dict_with_metadata_is_read(tmp_path):
    state = torch.nn.Linear(2, 3).state_dict()
    assert hasattr(state, "_metadata")
    torch.save(state, tmp_path / weights.TORCH)
    _same(weights.read(tmp_path), state)


def test_sharded_torch_files_are_read(tmp_path):
    state = _state()
    places = {}
    for number, keys in enumerate((list(state)[::2], list(state)[1::2])):
        name = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({key: state[key] for key in keys}, tmp_path / name)
        places |= dict.fromkeys(keys, name)
    (tmp_path / weights.TORCH_INDEX).write_text(json.dumps({"weight_map": places}))
    _same(weights.read(tmp_path), state)


@pytest.mark.parametrize("wrapper", ["module.", "module._orig_mod.", "_orig_mod.module."])
def test_a_model_saved_in_a_wrapper_of_torch_is_read_under_its_own_names(tmp_path, wrapper):
    state = _state()
    wrapped = {wrapper + name: tensor for name, tensor in state.items()}
    torch.save(wrapped, tmp_path / weights.TORCH)
    _same(weights.read(tmp_path), state)
    # One name without it, and they are no wrapper's.
    mixed = wrapped | {"lm_head.weight": state["lm_head.weight"]}
    torch.save(mixed, tmp_path / weights.TORCH)
    _same(weights.read(tmp_path), mixed)


def test_bfloat16_safetensors_are_read_without_torch(tmp_path):
    state = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7), "c": torch.randn(2).half()}
    safetensors_torch.save_file(state, tmp_path / weights.SAFETENSORS)
    _same(weights.read(tmp_path), state)


def test_flax_msgpack_and_flax_safetensors_hold_the_deleted_classes_tree(tmp_path):
    config = small_torch.config()
    state = {key: value.numpy() for key, value in _state().items()}
    params = convert.params_from_torch(state, config, head=True)
    (tmp_path / weights.MSGPACK).write_bytes(serialization.to_bytes(params))
    flat = {".".join(path): leaf for path, leaf in convert._leaves(params)}
    flax_folder = tmp_path / "flax"
    weights.write(flax_folder, flat, {"format": "flax"})
    for folder in (tmp_path, flax_folder):
        read = convert.params_from_torch(weights.read(folder), config, head=True)
        after = convert.torch_from_params(read, config)
        assert all(np.array_equal(after[key], state[key]) for key in state)


def test_sharded_msgpack_of_the_deleted_classes_is_read(tmp_path):
    state = _state()
    tensors = {key: value.numpy() for key, value in state.items()}
    params = convert.params_from_torch(tensors, small_torch.config(), head=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    places = {}
    for number, keys in enumerate((list(flat)[::2], list(flat)[1::2])):
        name = f"flax_model-0000{number + 1}-of-00002.msgpack"
        shard = traverse_util.unflatten_dict({key: flat[key] for key in keys}, sep="/")
        (tmp_path / name).write_bytes(serialization.to_bytes(shard))
        places |= dict.fromkeys(keys, name)
    (tmp_path / weights.MSGPACK_INDEX).write_text(json.dumps({"weight_map": places}))
    ours = convert.params_from_torch(weights.read(tmp_path), small_torch.config(), head=True)
    jax.tree.map(np.testing.assert_array_equal, ours, params)


def test_safetensors_come_before_the_others(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / weights.TORCH)
    (tmp_path / weights.MSGPACK).write_bytes(serialization.to_bytes({"a": np.zeros(1)}))
    weights.write(tmp_path, {"a": np.ones(1, np.float32)})
    assert weights.read(tmp_path)["a"] == 1.0


# What we write is read by others, whole or not at all.


def test_torch_reads_what_we_write(tmp_path):
    tensors = {
        "view": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.ones(3, ml_dtypes.bfloat16),
    }
    weights.write(tmp_path, tensors)
    read = safetensors_torch.load_file(tmp_path / weights.SAFETENSORS)
    np.testing.assert_array_equal(read["view"].numpy(), tensors["view"])
    assert read["half"].dtype == torch.bfloat16
    with open(tmp_path / weights.SAFETENSORS, "rb") as file:
        header = file.read(200)
    assert b'"format":"pt"' in header


def test_what_we_write_can_be_read_by_whom_other_files_can(tmp_path):
    (tmp_path / "other").touch()
    written = weights.write(tmp_path, {"a": np.zeros(2, np.float32)})
    assert written.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    weights.write(tmp_path, {"a": np.ones(1, np.float32)})
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever the library raises
        weights.write(tmp_path, {"a": np.array(["text"])})
    assert weights.read(tmp_path)["a"] == 1.0
    assert os.listdir(tmp_path) == [weights.SAFETENSORS]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ModelError, match=r"file/model\.safetensors cannot be written"):
        weights.write(tmp_path / "file", {"a": np.ones(1, np.float32)})


# Damaged files.


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    _refused(tmp_path, r"holds no weights.*model\.safetensors.*pytorch_model\.bin")


@pytest.mark.parametrize("name", [weights.SAFETENSORS, weights.TORCH, weights.MSGPACK])
def test_every_truncation_is_noticed_and_names_the_file(tmp_path, name):
    whole, path = io.BytesIO(), tmp_path / name
    state = {"a": torch.randn(40), "b": torch.randn(4, 3)}
    if name == weights.SAFETENSORS:
        whole.write(safetensors_torch.save(state))
    elif name == weights.TORCH:
        torch.save(state, whole)
    else:
        arrays = {key: value.numpy() for key, value in state.items()}
        whole.write(serialization.to_bytes(arrays))
    content = whole.getvalue()
    for length in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:length])
        _refused(tmp_path, name)
    path.write_bytes(content)
    assert weights.read(tmp_path).keys() == state.keys()


def test_flipped_bits_in_a_torch_file_are_noticed(tmp_path):
    whole = io.BytesIO()
    torch.save({"a": torch.randn(40)}, whole)
    content = whole.getvalue()
    start = content.index(zipfile.ZipFile(whole).read("archive/data/0"))
    damaged = bytearray(content)
    damaged[start + 5] ^= 16
    (tmp_path / weights.TORCH).write_bytes(damaged)
    _refused(tmp_path, r"pytorch_model\.bin is damaged")


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    for name in (weights.MSGPACK, weights.TORCH, weights.SAFETENSORS):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        _refused(tmp_path, f"{name} is a Git LFS pointer.*git lfs pull")


def test_an_html_page_is_not_weights(tmp_path):
    for name in (weights.MSGPACK, weights.TORCH, weights.SAFETENSORS):
        (tmp_path / name).write_text("<!DOCTYPE html><html><body>Not found</body></html>")
        _refused(tmp_path, f"{name} is damaged")


def test_shards_that_are_missing_or_disagree_with_the_index_are_named(tmp_path):
    index = tmp_path / weights.SAFETENSORS_INDEX
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    _refused(tmp_path, r"model-1\.safetensors is missing")
    safetensors_torch.save_file({"b": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    _refused(tmp_path, r"model-1\.safetensors is damaged.*disagree about 'a'")
    index.write_text("{}")
    _refused(tmp_path, "no weight_map")


# Hostile safetensors: the header's word is not taken.


def _safetensors(folder, header, data=b"\0" * 16, header_bytes=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if header_bytes is None else header_bytes)
    (folder / weights.SAFETENSORS).write_bytes(size + text + data)


def _entry(**changes):
    return {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}


@pytest.mark.parametrize(
    "header",
    [
        {"a": _entry(shape=[2**40])},
        {"a": _entry(shape=[2**40], data_offsets=[0, 2**42])},
        {"a": _entry(shape=[-4])},
        {"a": _entry(shape=[4.0])},
        {"a": _entry(shape=[True, 4])},
        {"a": _entry(shape="4")},
        {"a": _entry(data_offsets=[-16, 0])},
        {"a": _entry(data_offsets=[16, 32])},
        {"a": _entry(data_offsets=[0, 16, 32])},
        {"a": _entry(data_offsets=None)},
        {"a": _entry(shape=[2], data_offsets=[0, 8])},
        {"a": _entry(shape=[2], data_offsets=[8, 16])},
        {"a": _entry(), "b": _entry()},
        {"a": 3},
        {"a": {"dtype": "F32"}},
        [1, 2],
        b"{" * 5000,
        b'{"a": {}, "a": {}}',
        b"\xff\xfe",
    ],
)
def test_safetensors_headers_that_lie_are_refused(tmp_path, header):
    _safetensors(tmp_path, header)
    _refused(tmp_path, r"model\.safetensors is damaged")


def test_safetensors_header_of_absurd_size_is_refused(tmp_path):
    _safetensors(tmp_path, {"a": _entry()}, header_bytes=2**62)
    _refused(tmp_path, "shorter than its header says")


def test_a_header_that_would_take_all_memory_is_not_read(tmp_path, monkeypatch):
    _safetensors(tmp_path, {"a": _entry()})
    assert weights.read(tmp_path)["a"].shape == (4,)
    monkeypatch.setattr(weights, "MAX_HEADER_BYTES", 40)
    _refused(tmp_path, "shorter than its header says")


def test_safetensors_types_that_are_unknown_are_named(tmp_path):
    _safetensors(tmp_path, {"a": _entry(dtype="F4")})
    _refused(tmp_path, "'a' has the type 'F4'")


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "sub/x", "..", ""])
def test_an_index_cannot_name_files_outside_of_its_folder(tmp_path, place):
    (tmp_path / weights.SAFETENSORS_INDEX).write_text(json.dumps({"weight_map": {"a": place}}))
    _refused(tmp_path, "outside its folder")


# Hostile pickles: refused by name and never run.


class _Runs:
    """Unpickled by the standard module, it would run `command`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def _torch_file(folder, program, storages=(), compression=zipfile.ZIP_STORED, prefix="archive"):
    with zipfile.ZipFile(folder / weights.TORCH, "w", compression) as archive:
        archive.writestr(f"{prefix}/data.pkl", program)
        for key, content in dict(storages).items():
            archive.writestr(f"{prefix}/data/{key}", content)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_os_system_is_refused_and_not_run(tmp_path, protocol):
    witness = tmp_path / "witness"
    bomb = _Runs(os.system, f"touch {witness}")
    torch.save({"a": torch.zeros(1), "b": bomb}, tmp_path / weights.TORCH)
    _refused(tmp_path, r"posix\.system")
    _torch_file(tmp_path, pickle.dumps({"a": bomb}, protocol))
    _refused(tmp_path, r"posix\.system|operation")
    assert not witness.exists()
    # the witness is a real one: the standard module does run it
    pickle.loads(pickle.dumps(bomb, protocol))
    assert witness.exists()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, "eval"),
        (getattr, "getattr"),
        (open, r"(_?io)\.open"),
        (__import__, "__import__"),
        (os.remove, "remove"),
        (np.zeros, "numpy.*zeros"),
        (torch.load, r"torch\.serialization\.load"),
        (torch.hub.load, r"torch\.hub\.load"),
    ],
)
def test_every_other_global_is_refused_by_name(tmp_path, function, name):
    _torch_file(tmp_path, pickle.dumps({"a": _Runs(function, "x")}, 2))
    _refused(tmp_path, rf"pytorch_model\.bin: refused, its pickle asks for '.*{name}")


def test_names_in_messages_carry_no_control_characters(tmp_path):
    _torch_file(tmp_path, b"\x80\x02cevil\x1b[2J\nname\n.")
    with pytest.raises(errors.ModelError) as caught:
        weights.read(tmp_path)
    assert "evil" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_python_objects_are_refused_by_their_operation(tmp_path):
    _torch_file(tmp_path, b"\x80\x02}U\x01aoq\x00.")
    _refused(tmp_path, r"operation OBJ|damaged")
    _torch_file(tmp_path, b"\x80\x02(ios\nsystem\n.")
    _refused(tmp_path, "operation INST")
    _torch_file(tmp_path, b"\x80\x02\x82\x01.")
    _refused(tmp_path, "operation EXT1")


def _tensor_program(kind="FloatStorage", key="0", numel=4, offset=0, shape=(4,), strides=(1,)):
    """The pickle of {"a": tensor} with the description given."""

    def push(value):
        if isinstance(value, tuple):
            return b"(" + b"".join(map(push, value)) + b"t"
        if isinstance(value, str):
            return b"X" + struct.pack("<I", len(value)) + value.encode()
        if isinstance(value, bytes):
            return value
        packed = value.to_bytes(16, "little", signed=True)
        return b"\x8a\x10" + packed

    identity = ("storage", b"ctorch\n" + kind.encode() + b"\n", key, "cpu", numel)
    ordered = b"ccollections\nOrderedDict\n)R"
    arguments = (push(identity) + b"Q", offset, shape, strides, b"\x89", ordered)
    call = b"ctorch._utils\n_rebuild_tensor_v2\n" + push(arguments) + b"R"
    return b"\x80\x02}" + push("a") + call + b"s."


def test_a_tensor_program_of_ours_is_read(tmp_path):
    numbers = np.arange(4, dtype=np.float32)
    _torch_file(tmp_path, _tensor_program(), {"0": numbers.tobytes()})
    np.testing.assert_array_equal(weights.read(tmp_path)["a"], numbers)
    _torch_file(
        tmp_path,
        _tensor_program(offset=1, shape=(2, 1), strides=(2, 9)),
        {"0": numbers.tobytes()},
    )
    np.testing.assert_array_equal(weights.read(tmp_path)["a"], [[1.0], [3.0]])


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**70},
        {"shape": (5,)},
        {"shape": (-4,)},
        {"shape": (2,), "strides": (4,)},
        {"shape": (2,), "strides": (-1,)},
        {"shape": (2**60,), "strides": (0,)},
        {"shape": (2**40, 2**40), "strides": (0, 0)},
        {"shape": (1,), "strides": (2**70,)},
        {"shape": (2, 2), "strides": (1,)},
        {"shape": 4},
        {"numel": 5},
        {"numel": 2**60, "shape": (2**60,)},
        {"kind": "DoubleStorage"},
        {"key": "1"},
        {"key": "../../etc/passwd"},
        {"key": 0},
        {"kind": "UntypedStorage"},
    ],
)
def test_tensors_that_reach_outside_of_their_storage_are_refused(tmp_path, changes):
    _torch_file(tmp_path, _tensor_program(**changes), {"0": b"\0" * 16})
    _refused(tmp_path, r"pytorch_model\.bin(: its data\.pkl is damaged|: refused)")


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (b"", "damaged"),
        (b"\x80\x02", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02}K\x01K\x02K\x03u.", "damaged"),
        (b"\x80\x02K\x01K\x02R.", "damaged"),
        (b"\x80\x02X\xff\xff\xff\xff", "damaged"),
        (b"\x80\x02}}Ns.", "damaged"),
        (b"\x80\x02K\x01.", "holds a int"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "'a' is a int, not a tensor"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "'a' is a dict, not a tensor"),
        (b"\x80\x02}r\xff\xff\xff\xff.", None),
    ],
)
def test_programs_that_make_no_sense_are_refused(tmp_path, program, match):
    _torch_file(tmp_path, program)
    if match is None:
        # The standard unpickler would take 64 GB for this memo's index.
        assert weights.read(tmp_path) == {}
    else:
        _refused(tmp_path, match)


def test_a_torch_file_before_version_1_6_is_refused_with_the_way_out(tmp_path):
    torch.save(
        {"a": torch.zeros(1)}, tmp_path / weights.TORCH, _use_new_zipfile_serialization=False
    )
    _refused(tmp_path, r"torch before 1\.6.*save_pretrained")


def test_zip_bombs_and_foreign_archives_are_refused(tmp_path):
    _torch_file(tmp_path, _tensor_program(), {"0": b"\0" * 10**6}, zipfile.ZIP_DEFLATED)
    _refused(tmp_path, "compressed members")
    with zipfile.ZipFile(tmp_path / weights.TORCH, "w") as archive:
        archive.writestr("word/document.xml", "text")
    _refused(tmp_path, "not one that torch wrote")


def test_members_said_to_be_larger_than_the_file_are_refused(tmp_path):
    _torch_file(tmp_path, _tensor_program(), {"0": b"\0" * 16})
    content = bytearray((tmp_path / weights.TORCH).read_bytes())
    entry = content.rindex(b"archive/data/0") - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    (tmp_path / weights.TORCH).write_bytes(content)
    _refused(tmp_path, "larger than the file")


def test_big_endian_files_are_refused(tmp_path):
    _torch_file(tmp_path, _tensor_program(), {"0": b"\0" * 16})
    with zipfile.ZipFile(tmp_path / weights.TORCH, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    _refused(tmp_path, "big-endian")


@pytest.mark.parametrize(
    "content",
    [
        b"\x93\x01\x02\x03",
        serialization.to_bytes({"a": "text"}),
        b"\x81\xa1a\xc7\x0a\x01\x93\x91\xce\xff\xff\xff\xff\xa1f\xc4",
        b"\x81" * 3000,
        b"\xdd\xff\xff\xff\xff",
        b"\x81\x01\x02",
    ],
)
def test_msgpack_that_is_no_tree_of_tensors_is_refused(tmp_path, content):
    (tmp_path / weights.MSGPACK).write_bytes(content)
    _refused(tmp_path, r"flax_model\.msgpack is damaged")


def test_reading_imports_neither_pickle_nor_torch_by_name():
    for module in (weights, weights.torch_pickle, convert):
        with open(module.__file__) as file:
            lines = file.read().splitlines()
        imports = [line.split()[1].split(".")[0] for line in lines if line.startswith("import ")]
        imports += [line.split()[1].split(".")[0] for line in lines if line.startswith("from ")]
        assert not {"pickle", "torch", "joblib", "dill"} & set(imports)


# The hub, played by a server on this machine.

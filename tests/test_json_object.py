"""Small JSON files of strangers: read, or refused with the file's name."""

import pytest

from flax_asr import errors, json_object


def test_an_object_is_read_and_no_file_is_none(tmp_path):
    (tmp_path / "a.json").write_text('{"喺": 1}', encoding="utf-8")
    assert json_object.read(tmp_path / "a.json") == {"喺": 1}
    assert json_object.read(tmp_path / "b.json") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list, not a JSON object"),
        (b"{", "cannot be read: Expecting property name"),
        (b"\xff{}", "cannot be read: 'utf-8' codec"),
        (b'{"a": 1, "a": 2}', "cannot be read: a name stands twice"),
        (b"[" * 100_000, "cannot be read: maximum recursion depth"),
        (b" " * (64 * 2**20 + 1), "67108865 bytes are too many"),
    ],
)
def test_what_is_no_object_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(errors.ModelError, match=message) as refusal:
        json_object.read(path)
    assert str(path) in str(refusal.value)

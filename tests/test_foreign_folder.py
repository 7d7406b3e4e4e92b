"""Whatever strangers write into the small files of a model's folder is read, or refused by name."""

import contextlib
import json
import time

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_asr import config, errors, loading, origins, yaml_file

CONFIG = {
    "model_type": "wav2vec2",
    "vocab_size": 7,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "architectures": ["Wav2Vec2ForCTC"],
    "mask_time_prob": 0.1,
    "dtype": "float32",
}
FILES = {
    "config.json": CONFIG,
    "vocab.json": {"[PAD]": 0, "[UNK]": 1, "|": 2, "a": 3, "b": 4},
    "tokenizer_config.json": {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "pad_token": "[PAD]",
        "unk_token": {"content": "[UNK]"},
        "word_delimiter_token": "|",
        "added_tokens_decoder": {"0": {"content": "[PAD]", "special": True}},
        "do_lower_case": False,
    },
    "special_tokens_map.json": {"pad_token": "[PAD]", "unk_token": {"content": "[UNK]"}},
    "added_tokens.json": {"<s>": 5, "</s>": 6},
    "preprocessor_config.json": {"do_normalize": True, "sampling_rate": 16000},
}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def _write(folder, **changed):
    for name, content in (FILES | changed).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    return folder


def _read(folder):
    return origins.read(config.ModelConfig(pretrained=str(folder)))


def test_the_folder_that_is_spoilt_below_is_sound(tmp_path):
    found = _read(_write(tmp_path))
    assert found.vocabulary.size == 7
    assert found.model_config.hidden_size == 16


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_wrong_value_is_read_or_refused(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    content = dict(FILES[name])
    if data.draw(st.integers(0, 9)):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(ANY_JSON)
    else:
        content = data.draw(ANY_JSON)
    folder = _write(tmp_path_factory.mktemp("model"), **{name: content})
    with contextlib.suppress(errors.ModelError, errors.ConfigError):
        _read(folder)


@pytest.mark.parametrize("cleans_up", [True, False])
def test_spaces_before_marks_go_where_transformers_takes_them(tmp_path, cleans_up):
    tokens = ["[PAD]", "[UNK]", "|", *"aemnrstv'.?!,"]
    _write(
        tmp_path,
        **{
            "config.json": CONFIG | {"vocab_size": len(tokens) + 2},
            "vocab.json": {token: place for place, token in enumerate(tokens)},
            "tokenizer_config.json": {
                "tokenizer_class": "Wav2Vec2CTCTokenizer",
                "pad_token": "[PAD]",
                "unk_token": "[UNK]",
                "clean_up_tokenization_spaces": cleans_up,
            },
            "special_tokens_map.json": {},
            "added_tokens.json": {"<s>": len(tokens), "</s>": len(tokens) + 1},
        },
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = _read(tmp_path).vocabulary
    found.write(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in ("sat 's ' at n't 'm 've 're , a . t ? ' !", ". a  .", "a ' ' s .. '"):
        labels = found.encode(text)
        expected = theirs.decode(labels, group_tokens=False)
        assert found.decode(labels) == again.decode(labels, group_tokens=False) == expected
        assert (expected == text) != cleans_up


def test_the_first_name_of_the_tokenizer_is_known(tmp_path):
    first = FILES["tokenizer_config.json"] | {"tokenizer_class": "Wav2Vec2Tokenizer"}
    assert _read(_write(tmp_path, **{"tokenizer_config.json": first})).vocabulary.size == 7


def test_what_could_load_code_or_kernels_does_not_go_on(tmp_path):
    asks = {
        "auto_map": {"AutoModel": "evil--model.Evil"},
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "quantization_config": {"quant_method": "evil"},
        "dtype": "evil",
        "id2label": True,
        "num_labels": 10**12,
        "rope_scaling": "evil",
    }
    found = _read(_write(tmp_path, **{"config.json": CONFIG | asks}))
    assert "evil" not in found.model_config.to_json_string()
    assert found.model_config.hidden_size == 16


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**30},
        {"vocab_size": 10**12},
        {"conv_dim": [8, 10**12]},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": -2},
        {"num_conv_pos_embedding_groups": 0},
        {"conv_stride": [5, 0]},
        {"conv_kernel": [-1, 3]},
    ],
)
def test_sizes_that_make_no_sense_are_refused_before_anything_is_made_of_them(tmp_path, change):
    folder = _write(tmp_path, **{"config.json": CONFIG | change})
    with pytest.raises(errors.ModelError, match=next(iter(change))):
        loading.load(str(folder))


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("content", ["[" * 100_000, "{", "", "\x00", "<html>", '{"a": 1} x'])
def test_what_is_no_json_is_refused_with_the_file_s_name(tmp_path, name, content):
    with pytest.raises(errors.ModelError, match=name.replace(".", r"\.")):
        _read(_write(tmp_path, **{name: content}))


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "seed: &x 1\ntrain: {max_steps: *x}",
        "a: &a [*a]",
        "[" * 100_000,
        "{a: " * 3000,
        "".join(" " * depth + "a:\n" for depth in range(400)),
        "a: " + "x" * 2**18,
    ],
)
def test_yaml_that_explodes_is_refused_at_once(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    start = time.monotonic()
    with pytest.raises(errors.ConfigError, match=r"config\.yaml"):
        yaml_file.read(tmp_path / "config.yaml")
    assert time.monotonic() - start < 20

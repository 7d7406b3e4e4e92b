"""The character vocabulary: labels from text, text from labels, and the tokenizer's files."""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from flax_asr import errors, json_object

# Wav2Vec2CTCTokenizer's defaults for a folder without settings, in its order.
_ASSUMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# Strings that lose a space if a tokenizer cleans up, in transformers' order.
_SPACED_MARKS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens and their ids; characters are code points, also beyond the BMP.

    Attributes:
        tokens: the index of a token is its id, and its column in the logits.
        blank: the id of the blank, which is Hugging Face's padding token.
        unknown: the id for unknown characters; None if text with any is refused.
        delimiter: the token for a space; None if no transcript has one.
        bos, eos: ids of two tokens that old tokenizers have and no CTC model uses; None if absent.
        lower_case: whether the model's capitals are read as lower case.
        cleans_up: whether marks and English endings are joined to the word before them, as in
            transformers' clean_up_tokenization_spaces, which folders of its version 4 may set.
    """

    tokens: tuple[str, ...]
    blank: int
    unknown: int | None = None
    delimiter: str | None = None
    bos: int | None = None
    eos: int | None = None
    lower_case: bool = False
    cleans_up: bool = False

    def __post_init__(self):
        if len(set(self.tokens)) != len(self.tokens):
            twice = [token for token, count in Counter(self.tokens).items() if count > 1]
            raise errors.ModelError(f"vocabulary: these tokens occur twice: {twice[:10]}")
        for name in ("blank", "unknown", "bos", "eos"):
            place = getattr(self, name)
            if place is not None and not 0 <= place < len(self.tokens):
                raise errors.ModelError(
                    f"vocabulary: {name} is {place}, but there are {len(self.tokens)} tokens"
                )
        if self.delimiter is not None and self.delimiter not in self.tokens:
            raise errors.ModelError(f"vocabulary: the delimiter {self.delimiter!r} has no token")

    @classmethod
    def from_transcripts(
        cls, texts: Iterable[str], min_count: int = 1, layout: str = "blank-first"
    ) -> "Vocabulary":
        """The characters of normalised transcripts.

        Args:
            texts: normalised transcripts. A literal "|" counts as the delimiter.
            min_count: rarer characters get no token, and become the unknown token.
            layout: "blank-first": [PAD] (the blank), [UNK], "|" if there is a space, characters
                by code point. "hf-4.17": characters by code point with "|" in the space's place,
                [UNK], [PAD] (the blank), <s>, </s>.

        Raises:
            errors.DataError: no character is left.
            ValueError: the layout is unknown.
        """
        counts = Counter(character for text in texts for character in text)
        spaces = counts.pop(" ", 0) + counts.pop("|", 0)
        characters = sorted(c for c, count in counts.items() if count >= min_count)
        if not characters:
            raise errors.DataError(
                "the transcripts have no characters left: look at text.normalization"
                + (f" and text.min_count {min_count}" if min_count > 1 else "")
            )
        if layout == "hf-4.17":
            # In that version every target ended with a space, so there always was one.
            written = ["|" if c == " " else c for c in sorted([" ", *characters])]
            size = len(written)
            tokens = (*written, "[UNK]", "[PAD]", "<s>", "</s>")
            return cls(tokens, size + 1, size, "|", bos=size + 2, eos=size + 3)
        if layout != "blank-first":
            raise ValueError(f"layout {layout!r}: blank-first or hf-4.17")
        delimiter = "|" if spaces else None
        head = ("[PAD]", "[UNK]", *([delimiter] if delimiter else []))
        return cls((*head, *characters), blank=0, unknown=1, delimiter=delimiter)

    @property
    def size(self) -> int:
        """Number of tokens, which is the width of the logits."""
        return len(self.tokens)

    @property
    def characters(self) -> frozenset[str]:
        """Tokens that are neither special nor the delimiter."""
        return frozenset(self._ids) - {self.delimiter}

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        places = (self.blank, self.unknown, self.bos, self.eos)
        return frozenset(place for place in places if place is not None)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens) if i not in self._special}

    @functools.cached_property
    def _pieces(self) -> re.Pattern[str]:
        several = sorted((token for token in self._ids if len(token) > 1), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, several), "."]), re.DOTALL)

    @functools.cached_property
    def only_capitals(self) -> bool:
        """Whether it has capital letters but no lower-case ones."""
        letters = [token for token in self._ids if len(token) == 1 and token.isalpha()]
        return any(c.isupper() for c in letters) and not any(c.islower() for c in letters)

    def _split(self, text: str) -> list[str]:
        """A normalised transcript split into tokens, and characters without a token."""
        if self.only_capitals:
            text = text.upper()
        if self.delimiter is not None:
            text = text.replace(" ", self.delimiter)
        return self._pieces.findall(text)

    def lacks(self, texts: Iterable[str]) -> Counter[str]:
        """Characters of normalised transcripts without a token, with their counts."""
        pieces = Counter(piece for text in texts for piece in self._split(text))
        return Counter({piece: n for piece, n in pieces.items() if piece not in self._ids})

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Labels of a normalised transcript, without special tokens.

        A vocabulary that has capital letters only (facebook/wav2vec2-base-960h) reads every text
        as capitals.

        Raises:
            errors.DataError: a character has no token and there is no unknown token.
        """
        unknown = -1 if self.unknown is None else self.unknown
        pieces = self._split(text)
        labels = np.array([self._ids.get(piece, unknown) for piece in pieces], np.int32)
        if (labels < 0).any():
            strange = sorted({piece for piece in pieces if piece not in self._ids})
            raise errors.DataError(
                f"these characters have no token: {' '.join(strange[:20])!r}; nor is there one"
                " for unknown characters: change text.normalization, or take another model"
            )
        return labels

    def decode(
        self, ids: Sequence[int] | Int32[np.ndarray, " tokens"], special: str | None = None
    ) -> str:
        """Text of labels that are collapsed already; the blank is dropped.

        Args:
            ids: collapsed labels.
            special: text for the unknown token, bos and eos; by default their names, such as
                "[UNK]", as in transformers.
        """

        def written(place: int) -> str:
            if place == self.blank:
                return ""
            if place in self._special and special is not None:
                return special
            return " " if self.tokens[place] == self.delimiter else self.tokens[place]

        text = "".join(map(written, map(int, ids))).strip()
        text = text.lower() if self.lower_case else text
        for spaced in _SPACED_MARKS if self.cleans_up else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def to_json(self) -> str:
        """The vocabulary as one JSON object."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**(fields | {"tokens": tuple(fields["tokens"])}))

    def write(self, folder: str | os.PathLike) -> None:
        """Writes vocab.json and tokenizer_config.json, for transformers' AutoTokenizer.

        Tokens that do not exist are written as null: if they were left out, the tokenizer would
        add the class's defaults and be longer than the logits.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)

        def token(place: int | None) -> str | None:
            return None if place is None else self.tokens[place]

        settings = {
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "bos_token": token(self.bos),
            "eos_token": token(self.eos),
            "unk_token": token(self.unknown),
            "pad_token": token(self.blank),
            "word_delimiter_token": self.delimiter,
            "replace_word_delimiter_char": " ",
            "do_lower_case": self.lower_case,
            "clean_up_tokenization_spaces": self.cleans_up,
        }
        places = {token: place for place, token in enumerate(self.tokens)}
        for name, content in (("vocab.json", places), ("tokenizer_config.json", settings)):
            written = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (folder / name).write_text(written, encoding="utf-8")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Vocabulary":
        """The vocabulary of a Hugging Face wav2vec2-CTC folder, or of a single vocab.json.

        Args:
            folder: holds vocab.json and, optionally, tokenizer_config.json,
                special_tokens_map.json and added_tokens.json. bos and eos are left out if the
                head, by its config.json, has no column for them. In a vocabulary for several
                languages (MMS), the target_lang of tokenizer_config.json is read.

        Raises:
            errors.ModelError: a file is missing or does not hold a character vocabulary.
        """
        folder = pathlib.Path(folder)
        file = folder / "vocab.json" if folder.is_dir() else folder
        places = json_object.read(file)
        if places is None:
            raise errors.ModelError(f"{file}: no such file; a wav2vec2-CTC folder has a vocab.json")
        settings, special, added, model = {}, {}, {}, {}
        if folder.is_dir():
            model = json_object.read(folder / "config.json") or {}
            settings = json_object.read(folder / "tokenizer_config.json") or {}
            special = json_object.read(folder / "special_tokens_map.json") or {}
            added = json_object.read(folder / "added_tokens.json") or {}
        kind = str(settings.get("tokenizer_class", "Wav2Vec2CTCTokenizer"))
        # The second name is from the first versions of transformers.
        if not kind.startswith(("Wav2Vec2CTC", "Wav2Vec2Tokenizer")):
            raise errors.ModelError(
                f"{folder}: its tokenizer is a {kind}; only Wav2Vec2CTCTokenizer is supported"
            )
        if any(isinstance(value, dict) for value in places.values()):
            places = _one_language(places, settings.get("target_lang"), file)
        places = dict(places) | added
        for place, token in _numbered(settings, folder):
            places.setdefault(_content(token), place)
        names = _special_names(settings, special, places)
        for name in names.values():
            if name is not None and name not in places:
                places[name] = len(places)
        numbers = [place for place in places.values() if type(place) is int]
        if sorted(numbers) != list(range(len(places))):
            raise errors.ModelError(
                f"{file}: the {len(places)} ids are not 0 to {len(places) - 1}, each once"
            )
        _leave_out_headless(names, places, model.get("vocab_size"))
        tokens = sorted(places, key=places.__getitem__)
        if names["pad_token"] is None:
            raise errors.ModelError(f"{folder}: no pad_token, which is the blank of such a model")
        delimiter = settings.get("word_delimiter_token", "|")
        delimiter = _content(delimiter) if delimiter else None
        found = {key: places[name] if name else None for key, name in names.items()}
        return cls(
            tuple(tokens),
            blank=found["pad_token"],
            unknown=found["unk_token"],
            delimiter=delimiter if delimiter in places else None,
            bos=found["bos_token"],
            eos=found["eos_token"],
            lower_case=bool(settings.get("do_lower_case", False)),
            cleans_up=bool(settings.get("clean_up_tokenization_spaces", False)),
        )


def _numbered(settings: dict, folder: pathlib.Path) -> list[tuple[int, object]]:
    """(Id, token) for the tokens that tokenizer_config.json adds."""
    added = settings.get("added_tokens_decoder", {})
    if not isinstance(added, dict) or not all(re.fullmatch(r"\d{1,9}", key) for key in added):
        raise errors.ModelError(
            f"{folder}: added_tokens_decoder in tokenizer_config.json is not a mapping"
        )
    return [(int(key), token) for key, token in added.items()]


def _content(token: object) -> str:
    """A token as text; newer folders write it as an object with flags."""
    return str(token.get("content") if isinstance(token, dict) else token)


def _one_language(nested: dict, language: str | None, file: pathlib.Path) -> dict:
    known = sorted(name for name, value in nested.items() if isinstance(value, dict))
    if language not in known:
        asked = "none is chosen" if language is None else f"{language!r} is not among them"
        raise errors.ModelError(
            f"{file}: a vocabulary for each of {len(known)} languages, and {asked}: "
            f"{', '.join(known[:12])}{', ...' if len(known) > 12 else ''}. Set target_lang in "
            "tokenizer_config.json"
        )
    return nested[language]


def _leave_out_headless(
    names: dict[str, str | None], places: dict[str, int], head_size: object
) -> None:
    """Removes bos and eos if they have no column in the logits.

    transformers adds them to every tokenizer that it reads, also for models made without them
    (mostly before version 4.10).
    """
    if type(head_size) is not int:
        return
    headless = {token for token, place in places.items() if place >= head_size}
    old = {key: names[key] for key in ("bos_token", "eos_token")}
    if headless <= set(old.values()):
        names |= {key: None for key, token in old.items() if token in headless}
        for token in headless:
            del places[token]


def _special_names(settings: dict, special: dict, places: dict) -> dict[str, str | None]:
    """Names of the special tokens, in the order in which transformers adds missing ones."""
    # Before added_tokens_decoder existed, special_tokens_map.json took precedence.
    if "added_tokens_decoder" not in settings:
        settings = settings | special
    names = {}
    for key, assumed in _ASSUMED.items():
        if key in settings:
            names[key] = _content(settings[key]) if settings[key] else None
        elif settings:
            names[key] = assumed
        else:
            # A bare vocab.json: whichever of the two usual spellings it has.
            usual = (assumed, f"[{assumed.strip('<>').upper()}]")
            names[key] = next((name for name in usual if name in places), None)
    return names

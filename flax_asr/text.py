"""Transcripts: normalisation by named steps.

A rule is a list of steps. A step is a name, or a mapping from a name to its argument:

    nfkc, nfc                       Unicode normal forms
    lower, {lower: tr}              lower case, with the dotless i of Turkish and Azerbaijani
    halfwidth                       full-width marks and letters, the ideographic space
    plain_marks                     typographic apostrophes and hyphens become ' and -
    strip_punctuation               removes marks, symbols and control characters
    {strip_punctuation: "'-"}       the same, but keeps these between two letters
    join_unspaced                   no spaces beside Chinese, Japanese, Thai, ... characters
    remove_spaces                   removes all spaces
    spaces                          makes runs of spaces one, and removes those at the ends
    {remove: "abc"}                 removes these characters
    {replace: {"ё": "е"}}           replaces each of these strings, in one pass
    {replace_words: {"e'": "è"}}    the same, if no letter or digit is beside them
    end_with_space                  a space at the end, so that the target ends with "|"
    hf-4.17                         what the speech recognition example of transformers 4.17 did
"""

import dataclasses
import difflib
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flax_asr import errors, languages

_HALFWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_PLAIN_MARKS = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201b\u02bc\u00b4`\u2032\u02b9\uff07", "'")
    | dict.fromkeys("\u2010\u2011\ufe63\uff0d", "-")
)
_UNSPACED_SCRIPTS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f"
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_BESIDE_UNSPACED = re.compile(rf"(?<=[{_UNSPACED_SCRIPTS}])\s+|\s+(?=[{_UNSPACED_SCRIPTS}])")
_SPACES = re.compile(r"\s+")
# Source: the worked example of the Robust Speech Event (Hugging Face, January 2022) passes
# , ? . ! - ; : " “ % ‘ ” � — ’ … – as a class of a regular expression. The hyphen is not escaped
# there, so "!-;" is a range, which removes digits, apostrophes and most ASCII marks too.
_HF_4_17 = re.compile('[,?.!-;:"“%‘”\ufffd—’…–]')
_JOINERS = "\u200c\u200d"
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
_DEFAULT = "default"
"""The name in a list for the steps of languages without their own rule."""


def _lower(text: str, language: str | None) -> str:
    if language is not None and languages.base(language) in ("tr", "az"):
        text = text.replace("\u0130", "i").replace("I", "\u0131")
    # str.lower leaves a combining dot after the i, as some texts have already.
    return text.lower().replace("i\u0307", "i")


@functools.lru_cache(maxsize=65536)
def _kind(character: str) -> str:
    """One of "letter", "digit", "space", "mark" (visible) and "invisible"."""
    category = unicodedata.category(character)
    if character.isspace():
        return "space"
    if category in ("Cc", "Cf", "Cs", "Co") or 0xFE00 <= ord(character) <= 0xFE0F:
        return "invisible"
    if 0xE0100 <= ord(character) <= 0xE01EF:
        return "invisible"
    if category[0] in "PS":
        return "mark"
    # Unassigned code points count as letters, as a newer Unicode may define them.
    return "digit" if category[0] == "N" else "letter"


def _takes_a_mark(character: str) -> bool:
    return _kind(character) in ("letter", "digit") or character in _JOINERS


def _strip_punctuation(text: str, keep: str | None) -> str:
    """Removes marks; a run of them inside a word becomes a space."""
    kept = set(keep or "") | set(_JOINERS)
    result: list[str] = []
    start = 0
    while start < len(text):
        if _kind(text[start]) not in ("mark", "invisible"):
            combines = unicodedata.category(text[start]) in ("Mn", "Me")
            # A joiner here joins a letter to this mark: Bengali "r" with a "y" below.
            if not combines or (result and _takes_a_mark(result[-1])):
                result.append(text[start])
            start += 1
            continue
        end = start
        while end < len(text) and _kind(text[end]) in ("mark", "invisible"):
            end += 1
        run = text[start:end]
        before = _kind(result[-1]) if result else "space"
        after = _kind(text[end]) if end < len(text) else "space"
        if run in kept and before == after == "letter":
            result.append(run)
        elif "space" not in (before, after) and any(_kind(mark) == "mark" for mark in run):
            result.append(" ")
        start = end
    return "".join(result)


@functools.lru_cache(maxsize=64)
def _pattern(pairs: tuple[tuple[str, str], ...], whole_words: bool) -> re.Pattern[str]:
    longest_first = sorted((source for source, _ in pairs), key=len, reverse=True)
    any_of_them = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?<!\w)(?:{any_of_them})(?!\w)" if whole_words else any_of_them)


def _replace(text: str, pairs: tuple[tuple[str, str], ...], whole_words: bool = False) -> str:
    table = dict(pairs)
    return _pattern(pairs, whole_words).sub(lambda match: table[match.group()], text)


@functools.lru_cache(maxsize=64)
def _removal(characters: str) -> dict[int, None]:
    return dict.fromkeys(map(ord, characters))


_Argument = str | tuple[tuple[str, str], ...] | None
# Each step's function and the type of its argument: nothing, a string, a mapping.
_STEPS: dict[str, tuple[Callable[[str, _Argument], str], tuple[type, ...]]] = {
    "nfkc": (lambda text, _: unicodedata.normalize("NFKC", text), (type(None),)),
    "nfc": (lambda text, _: unicodedata.normalize("NFC", text), (type(None),)),
    "lower": (_lower, (type(None), str)),
    "halfwidth": (lambda text, _: text.translate(_HALFWIDTH), (type(None),)),
    "plain_marks": (lambda text, _: text.translate(_PLAIN_MARKS), (type(None),)),
    "strip_punctuation": (_strip_punctuation, (type(None), str)),
    "join_unspaced": (lambda text, _: _BESIDE_UNSPACED.sub("", text), (type(None),)),
    "remove_spaces": (lambda text, _: _SPACES.sub("", text), (type(None),)),
    "spaces": (lambda text, _: _SPACES.sub(" ", text).strip(), (type(None),)),
    "remove": (lambda text, characters: text.translate(_removal(characters)), (str,)),
    "replace": (_replace, (tuple,)),
    "replace_words": (functools.partial(_replace, whole_words=True), (tuple,)),
    "end_with_space": (lambda text, _: text + " ", (type(None),)),
    "hf-4.17": (lambda text, _: _HF_4_17.sub("", text).lower(), (type(None),)),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a rule; `argument` is None, a string, or the pairs of a replacement."""

    name: str
    argument: _Argument = None

    def __call__(self, text: str) -> str:
        return _STEPS[self.name][0](text, self.argument)

    @property
    def spec(self) -> str | dict[str, object]:
        """The step as written in a configuration file."""
        if self.argument is None:
            return self.name
        is_mapping = isinstance(self.argument, tuple)
        return {self.name: dict(self.argument) if is_mapping else self.argument}

    def changes(self, before: str, after: str) -> Iterator[tuple[str, str]]:
        """(Before, after) for each place where this step changed a text."""
        if self.name in ("nfc", "nfkc"):
            for piece in _composed(before, self):
                if self(piece) != piece:
                    yield piece, self(piece)
        elif self.name in ("replace", "replace_words"):
            table = dict(self.argument)
            pattern = _pattern(self.argument, self.name == "replace_words")
            for match in pattern.finditer(before):
                yield match.group(), table[match.group()]
        else:
            for character in (Counter(before) - Counter(after)).elements():
                result = self(character)
                yield character, "" if result == character else result


def _composed(text: str, form: Callable[[str], str]) -> Iterator[str]:
    """The pieces that a normal form treats separately: a character with its combining marks."""
    piece = ""
    for character in text:
        alone = form(piece + character) == form(piece) + form(character)
        if alone and not unicodedata.combining(character):
            yield piece
            piece = ""
        piece += character
    yield piece


@dataclasses.dataclass(frozen=True)
class Change:
    """A step turned `before` into `after` ("" if removed) in `count` places."""

    step: str
    before: str
    after: str
    count: int

    def describe(self) -> str:
        """A description as one line, with invisible characters as escapes."""
        what = f"became {_visible(self.after)}" if self.after else "removed"
        name = unicodedata.name(self.before, "") if len(self.before) == 1 else ""
        return f"{_visible(self.before)} {name} {what}: {self.count} ({self.step})".replace(
            "  ", " "
        )


def shown(characters: Iterable[str]) -> str:
    """The first twenty characters as text, with invisible ones as escapes."""
    visible = [_visible(character) for character in characters]
    return " ".join(visible[:20]) + (" ..." if len(visible) > 20 else "")


def _visible(text: str) -> str:
    return ascii(text) if any(_kind(c) == "invisible" or c.isspace() for c in text) else f"'{text}'"


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """A list of steps, applied in order. Equal lists compare equal.

    Attributes:
        steps: the steps, resolved.
        is_default: whether the language has no rule of its own.
    """

    steps: tuple[Step, ...]
    is_default: bool = False

    def __call__(self, text: str) -> str:
        for step in self.steps:
            text = step(text)
        return text

    @property
    def spec(self) -> list[str | dict[str, object]]:
        """The steps as a configuration spells them: `normalizer(spec)` does the same."""
        return [step.spec for step in self.steps]

    def report(self, texts: Iterable[str]) -> tuple[Change, ...]:
        """Every change that the steps make to these texts, with its count, most frequent first."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for text in texts:
            for step in self.steps:
                result = step(text)
                if result != text:
                    pairs = step.changes(text, result)
                    counts.update((step.name, before, after) for before, after in pairs)
                text = result
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return tuple(Change(*change, count) for change, count in ordered)


def normalizer(spec: str | Sequence[str | Mapping]) -> Normalizer:
    """The normaliser for a language code, a step's name, or a list of steps.

    A list may contain the code of a language that has a rule, to extend it:
    `[zh-HK, {remove: "々"}]`; `default` stands for the steps of languages without one. An empty
    list changes nothing.

    Raises:
        errors.ConfigError: an unknown step or a wrong argument.
    """
    if isinstance(spec, str):
        if spec not in _STEPS and _LANGUAGE.fullmatch(spec):
            steps = tuple(_step(item) for item in languages.rule(spec))
            return Normalizer(steps, is_default=not languages.has_rule(spec))
        return Normalizer((_step(spec, "data.language or text.normalization"),))
    steps = []
    for item in spec:
        if item == _DEFAULT:
            steps.extend(_step(inner) for inner in languages.DEFAULT)
        elif isinstance(item, str) and item not in _STEPS and languages.has_rule(item):
            steps.extend(_step(inner) for inner in languages.rule(item))
        else:
            steps.append(_step(item))
    return Normalizer(tuple(steps))


def _step(item: str | Mapping, option: str = "text.normalization") -> Step:
    if isinstance(item, Mapping):
        if len(item) != 1:
            raise errors.ConfigError(
                f"text.normalization: a step is one name and its argument, got {dict(item)!r}; "
                "write each step as an item of its own"
            )
        ((name, argument),) = item.items()
    else:
        name, argument = item, None
    if name not in _STEPS:
        is_language = _LANGUAGE.fullmatch(str(name))
        known = [*_STEPS, *(() if is_language else languages.RULES)]
        near = difflib.get_close_matches(str(name).lower(), known, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if is_language:
            hint += f"The steps of a language that has no rule of its own are called {_DEFAULT!r}. "
        raise errors.ConfigError(
            f"{option}: there is no step or language {name!r}; {hint}"
            f"Steps: {', '.join(_STEPS)}; or a language code such as zh-HK"
        )
    if isinstance(argument, Mapping):
        argument = tuple((source, target) for source, target in argument.items())
        if not argument or not all(
            isinstance(part, str) and (part or place)
            for pair in argument
            for place, part in enumerate(pair)
        ):
            raise errors.ConfigError(
                f"text.normalization: {name} needs a mapping of strings to strings, got {item!r}"
            )
    if not isinstance(argument, _STEPS[name][1]):
        wanted = {type(None): "no argument", str: "a string", tuple: "a mapping {from: to}"}
        allowed = " or ".join(wanted[kind] for kind in _STEPS[name][1])
        raise errors.ConfigError(f"text.normalization: {name} takes {allowed}, got {argument!r}")
    return Step(name, argument)

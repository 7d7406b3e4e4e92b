"""How the transcripts of each language are written: the steps that normalise them.

The steps themselves are in text.py. A language without a line here gets the default.
"""

from collections.abc import Mapping

Step = str | Mapping[str, object]

# Written without spaces between words (ISO 639 codes, as Common Voice uses them).
_UNSPACED = frozenset(
    {"zh", "yue", "cmn", "nan", "wuu", "hak", "cdo", "gan", "hsn", "lzh", "cpx", "mnp", "cjy"}
    | {"czh", "czo", "ja", "ryu", "th", "lo", "km", "my", "bo", "dz"}
)

_THAI_TONES = "\u0e48\u0e49\u0e4a\u0e4b"
_NIKHAHIT, _SARA_AA, _SARA_AM = "\u0e4d", "\u0e32", "\u0e33"
# The same syllable is typed in three orders, and the vowel "ae" as two times "e".
_THAI_SPELLING = {
    _NIKHAHIT + _SARA_AA: _SARA_AM,
    **{_NIKHAHIT + tone + _SARA_AA: tone + _SARA_AM for tone in _THAI_TONES},
    "\u0e40\u0e40": "\u0e41",
}
# Vowel signs and the elongation mark are written or left out as the writer likes; the signs of
# honour and of reading are those of religious texts, some of which Common Voice has.
_ARABIC_OPTIONAL = "\u0640\u064b\u064c\u064d\u064e\u064f\u0650\u0651\u0652\u0653\u0670" + "".join(
    map(chr, [*range(0x0610, 0x061B), *range(0x0656, 0x0660), *range(0x06D6, 0x06EE)])
)
_ALEF_WASLA, _ALEF = "\u0671", "\u0627"
# Persian letters as they come from an Arabic keyboard.
_PERSIAN_LETTERS = {"\u064a": "\u06cc", "\u0649": "\u06cc", "\u0643": "\u06a9"}
# Vowel points and signs of cantillation, which hardly anyone writes.
_HEBREW_OPTIONAL = "".join(
    map(chr, [*range(0x0591, 0x05BE), 0x05BF, 0x05C1, 0x05C2, 0x05C4, 0x05C5, 0x05C7])
)
# They stand inside of abbreviations and foreign words, and are mostly typed as quotation marks.
_HEBREW_MARKS = {"\u05f3": "'", "\u05f4": '"'}
# In Devanagari joiners change how a cluster is drawn, never how it sounds.
_JOINERS: Step = {"remove": "\u200c\u200d"}
# Accents as they are typed without their keys, where no other word is meant ("po'" is another).
_ITALIAN_ACCENTS = {
    "e'": "è",
    "cioe'": "cioè",
    "citta'": "città",
    "cosi'": "così",
    "gia'": "già",
    "perche'": "perché",
    "pero'": "però",
    "piu'": "più",
    "puo'": "può",
    "sara'": "sarà",
    "universita'": "università",
    "verita'": "verità",
}
# NFKC would make letters of it, and Latin ones in a Cyrillic text.
_NUMERO: Step = {"replace": {"№": " "}}


def _spaced(
    keep: str, *, first: tuple[Step, ...] = (), lower: Step = "lower", last: tuple[Step, ...] = ()
) -> tuple[Step, ...]:
    """Words and spaces; `keep` are the marks that stay between two letters."""
    strip: Step = {"strip_punctuation": keep} if keep else "strip_punctuation"
    return ("plain_marks", _NUMERO, "nfkc", lower, *first, strip, *last, "nfc", "spaces")


_JOINED: tuple[Step, ...] = (
    "plain_marks",
    "nfkc",
    "lower",
    {"remove": "'"},
    "strip_punctuation",
    "join_unspaced",
    "nfc",
    "spaces",
)

# NFKC would take Thai and Lao "am" apart, so these two get the width rule alone.
_THAI: tuple[Step, ...] = (
    "plain_marks",
    "nfc",
    "halfwidth",
    "lower",
    {"replace": _THAI_SPELLING},
    {"remove": "'"},
    "strip_punctuation",
    "join_unspaced",
    "nfc",
    "spaces",
)

DEFAULT = _spaced("'-")

RULES: dict[str, tuple[Step, ...]] = {
    "ar": _spaced("", first=({"remove": _ARABIC_OPTIONAL}, {"replace": {_ALEF_WASLA: _ALEF}})),
    "az": _spaced("-", first=({"remove": "'"},), lower={"lower": "az"}),
    "ca": _spaced("'-·"),
    "de": _spaced("'"),
    "en": _spaced("'"),
    "es": _spaced("'"),
    "eu": _spaced("-"),
    "fa": _spaced("", first=({"remove": _ARABIC_OPTIONAL}, {"replace": _PERSIAN_LETTERS})),
    "fr": _spaced("'-"),
    "he": _spaced("'\"", first=({"remove": _HEBREW_OPTIONAL}, {"replace": _HEBREW_MARKS})),
    "hi": _spaced("-", first=(_JOINERS,)),
    # The marks of a question or a stress stand inside the Armenian word.
    "hy": _spaced("-", first=({"remove": "՛՜՞"},)),
    "it": _spaced("'", first=({"replace_words": _ITALIAN_ACCENTS},)),
    "ja": _JOINED,
    # NFKC would take the single letters of chat language ("ㅋㅋ") apart.
    "ko": (
        "plain_marks",
        "nfc",
        "halfwidth",
        "lower",
        {"remove": "'"},
        "strip_punctuation",
        "nfc",
        "spaces",
    ),
    "lo": _THAI,
    "mr": _spaced("-", first=(_JOINERS,)),
    "ne": _spaced("-", first=(_JOINERS,)),
    "pt": _spaced("'-"),
    "ru": _spaced("-", first=({"replace": {"\u0301": "", "ё": "е"}},)),
    # The colon joins an ending to an abbreviation: "EU:s".
    "sv": _spaced("':"),
    "th": _THAI,
    # The apostrophe before a suffix ("Ankara'da") is not heard.
    "tr": _spaced("", first=({"remove": "'"},), lower={"lower": "tr"}),
    "yue": _JOINED,
    "zh": _JOINED,
    "zh-cn": _JOINED,
    "zh-hk": _JOINED,
    "zh-tw": _JOINED,
}


def base(language: str) -> str:
    """The language of a code without region or script: "zh-HK" -> "zh"."""
    return language.replace("_", "-").lower().split("-")[0]


def has_rule(language: str) -> bool:
    """Whether the table has a line for this language, so that it does not get the default."""
    return language.replace("_", "-").lower() in RULES or base(language) in RULES


def rule(language: str) -> tuple[Step, ...]:
    """The steps for a language: its own line, that of its base language, or the default."""
    code = language.replace("_", "-").lower()
    if code in RULES:
        return RULES[code]
    if base(code) in RULES:
        return RULES[base(code)]
    if writes_without_spaces(code):
        return (*DEFAULT[:-2], "join_unspaced", *DEFAULT[-2:])
    return DEFAULT


def writes_without_spaces(language: str) -> bool:
    """Whether words are not separated in writing, so that a word error rate means nothing."""
    return base(language) in _UNSPACED

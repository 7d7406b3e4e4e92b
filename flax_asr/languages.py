"""Normalisation rules for the transcripts of each language.

The steps are implemented in text.py. A language that is not listed here gets the default.
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
# The same syllable is typed in three orders, and the vowel "ae" as "e" twice.
_THAI_SPELLING = {
    _NIKHAHIT + _SARA_AA: _SARA_AM,
    **{_NIKHAHIT + tone + _SARA_AA: tone + _SARA_AM for tone in _THAI_TONES},
    "\u0e40\u0e40": "\u0e41",
}
# Vowel signs and the elongation mark are optional in writing; honorific and recitation signs occur
# in religious texts, some of which are in Common Voice.
_ARABIC_OPTIONAL = "\u0640\u064b\u064c\u064d\u064e\u064f\u0650\u0651\u0652\u0653\u0670" + "".join(
    map(chr, [*range(0x0610, 0x061B), *range(0x0656, 0x0660), *range(0x06D6, 0x06EE)])
)
_ALEF_WASLA, _ALEF = "\u0671", "\u0627"
# Persian letters as typed on an Arabic keyboard.
_PERSIAN_LETTERS = {"\u064a": "\u06cc", "\u0649": "\u06cc", "\u0643": "\u06a9"}
# Vowel points and cantillation marks, which are rarely written.
_HEBREW_OPTIONAL = "".join(
    map(chr, [*range(0x0591, 0x05BE), 0x05BF, 0x05C1, 0x05C2, 0x05C4, 0x05C5, 0x05C7])
)
# They occur inside abbreviations and foreign words, and are mostly typed as quotation marks.
_HEBREW_MARKS = {"\u05f3": "'", "\u05f4": '"'}
# In Devanagari, joiners change how a cluster is drawn, not how it sounds.
_JOINERS: Step = {"remove": "\u200c\u200d"}
# Malayalam's vowelless letters have an older spelling of three characters.
_MALAYALAM_CHILLU = {
    consonant + "\u0d4d\u200d": chillu
    for consonant, chillu in zip(
        "\u0d23\u0d28\u0d30\u0d32\u0d33\u0d15", "\u0d7a\u0d7b\u0d7c\u0d7d\u0d7e\u0d7f", strict=True
    )
}
# Armenian question and stress marks are inside the word. (NFKC splits the letter yev; the western
# spelling has two letters.)
_ARMENIAN_STRESS: Step = {"remove": "՛՜՞"}
# Accents typed as apostrophes, in words that cannot be another word (as "po'" could).
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
# Replaces an apostrophe that is part of a word's spelling at its end.
_LETTER_APOSTROPHE = "\u02bc"
# Letters typed with another code point because keyboards or fonts lacked the right one: the
# language has only the second of each pair.
# Source: the tables of ftyers/commonvoice-utils; for vi, az and ckb the languages' own alphabets.
_LOOKALIKES = {
    "az": {"\u04d9": "\u0259", "\u01dd": "\u0259"},
    "ba": {"h": "\u04bb"},
    "be": {"i": "\u0456"},
    # The older ae is a heh followed by a joiner.
    "ckb": {"\u0647\u200c": "\u06d5", **_PERSIAN_LETTERS},
    "cv": {"ă": "\u04d1", "ĕ": "\u04d7", "ç": "\u04ab", "ÿ": "\u04f3", "\u04f1": "\u04f3"},
    "kab": {"\u03b3": "\u0263", "ğ": "ǧ"}
    | dict.fromkeys(("\u03b5", "\u03c3", "\u03c2", "\u0511"), "\u025b"),
    "kk": {"i": "\u0456", "\u04ca": "\u04a3"},
    "ky": {"\u04ca": "\u04a3"},
    "mhr": {"ö": "\u04e7", "ä": "\u04d3", "ÿ": "\u04f1"},
    "ro": {"ş": "ș", "ţ": "ț"},
    "sah": {"h": "\u04bb"},
    "uk": {"i": "\u0456"},
    "ur": {**_PERSIAN_LETTERS, "\u0647": "\u06c1"},
    "vi": {"ð": "đ"},
}
# The middle dot of "col·lecció" as it is typed without its key.
_CATALAN_DOTS = {f"l{dot}l": "l·l" for dot in ".\u2022\u2027\u2219\u22c5"}
# NFKC would turn it into letters, Latin ones in a Cyrillic text.
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

# Tibetan cannot be read without the mark between syllables; a stroke ends a syllable too.
_TSHEG, _TIBETAN_STROKES = "\u0f0b", "\u0f0d\u0f0e\u0f0f\u0f11"
_TIBETAN: tuple[Step, ...] = (
    "nfkc",
    "lower",
    {"replace": dict.fromkeys(_TIBETAN_STROKES, _TSHEG)},
    "join_unspaced",
    {"replace": {_TSHEG * 3: _TSHEG, _TSHEG * 2: _TSHEG}},
    {"strip_punctuation": _TSHEG},
    "join_unspaced",
    "nfc",
    "spaces",
)

# NFKC would split Thai and Lao "am", so these two get only the width step.
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
    "az": _spaced(
        "-", first=({"remove": "'"}, {"replace": _LOOKALIKES["az"]}), lower={"lower": "az"}
    ),
    "bo": _TIBETAN,
    "ca": _spaced("'-·", first=({"replace": _CATALAN_DOTS},)),
    "de": _spaced("'"),
    "dz": _TIBETAN,
    "en": _spaced("'"),
    "es": _spaced("'"),
    "eu": _spaced("-"),
    "fa": _spaced("", first=({"remove": _ARABIC_OPTIONAL}, {"replace": _PERSIAN_LETTERS})),
    # The colon joins an ending to an abbreviation here and in Swedish: "EU:n".
    "fi": _spaced("'-:"),
    "fr": _spaced("'-"),
    # One letter, spelt in two ways: "'ya'ya" in Nigeria, "ƴaƴa" in Niger.
    "ha": _spaced("'-", first=({"replace": {"'y": "ƴ"}},)),
    "he": _spaced("'\"", first=({"remove": _HEBREW_OPTIONAL}, {"replace": _HEBREW_MARKS})),
    "hi": _spaced("-", first=(_JOINERS,)),
    "hy": _spaced("-", first=(_ARMENIAN_STRESS,), last=({"replace": {"եւ": "և"}},)),
    "hyw": _spaced("-", first=(_ARMENIAN_STRESS,)),
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
    "ml": _spaced("-", first=({"replace": _MALAYALAM_CHILLU}, _JOINERS)),
    "mr": _spaced("-", first=(_JOINERS,)),
    # The apostrophe stands for the letter għ behind an a: "ta' Malta", "tista'".
    "mt": _spaced(
        "'-",
        first=({"replace": {"a'": "a" + _LETTER_APOSTROPHE}},),
        last=({"replace": {_LETTER_APOSTROPHE: "'"}},),
    ),
    "ne": _spaced("-", first=(_JOINERS,)),
    # The middle dot keeps letters apart here: "in·hèrn".
    "oc": _spaced("'-·"),
    "pt": _spaced("'-"),
    "ru": _spaced("-", first=({"replace": {"\u0301": "", "ё": "е"}},)),
    "sc": _spaced("'-·"),
    "sv": _spaced("':"),
    "th": _THAI,
    # The apostrophe before a suffix ("Ankara'da") is not heard.
    "tr": _spaced("", first=({"remove": "'"},), lower={"lower": "tr"}),
    "ur": _spaced("", first=({"remove": _ARABIC_OPTIONAL}, {"replace": _LOOKALIKES["ur"]})),
    # The turned comma is part of two letters, also at the end ("togʻ", a mountain); the apostrophe
    # is a sign of its own.
    "uz": _spaced("'-", first=({"replace": {"o'": "o\u02bb", "g'": "g\u02bb"}},)),
    "yue": _JOINED,
    "zh": _JOINED,
    "zh-cn": _JOINED,
    "zh-hk": _JOINED,
    "zh-tw": _JOINED,
    **{
        code: _spaced("'-", first=({"replace": pairs},))
        for code, pairs in _LOOKALIKES.items()
        if code not in ("az", "ur")
    },
}


def base(language: str) -> str:
    """The code without region and script: "zh-HK" -> "zh"."""
    return language.replace("_", "-").lower().split("-")[0]


def has_rule(language: str) -> bool:
    """Whether this language has its own rules rather than the default ones."""
    return language.replace("_", "-").lower() in RULES or base(language) in RULES


def rule(language: str) -> tuple[Step, ...]:
    """The steps for a language: its own, those of its base language, or the default ones."""
    code = language.replace("_", "-").lower()
    if code in RULES:
        return RULES[code]
    if base(code) in RULES:
        return RULES[base(code)]
    if writes_without_spaces(code):
        return (*DEFAULT[:-2], "join_unspaced", *DEFAULT[-2:])
    return DEFAULT


def writes_without_spaces(language: str) -> bool:
    """Whether words are not separated in writing, so that a word error rate has no meaning."""
    return base(language) in _UNSPACED

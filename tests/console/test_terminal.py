"""Strangers' text cannot command the terminal that it is printed on."""

import ast
import io
import logging
import pathlib
import unicodedata

import pytest

import flax_asr
from flax_asr import __main__, markdown
from flax_asr.console import progress, terminal
from flax_asr.data import shards
from flax_asr.diagnosis import consultation, findings

EVIL = "a\x1b[2J\x1b]0;owned\x07b\x08\r\x9b31m\u202eevil\u2066\u2028c"
HARMLESS = "a\\x1b[2J\\x1b]0;owned\\x07b\\x08\\r\\x9b31m\\u202eevil\\u2066\\u2028c"


def test_what_commands_a_terminal_becomes_an_escape():
    assert terminal.plain(EVIL) == HARMLESS
    for code in range(0x110000):
        character = chr(code)
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in "\t\n":
            assert terminal.plain(character) == ascii(character)[1:-1]


@pytest.mark.parametrize(
    "text",
    [
        "你好，世界",
        "\u200fשלום\u200e",
        "می\u200cخواهم",
        "👩\u200d🚀",
        "tab\tand\nline",
        "\ufeffe\u0301",
    ],
)
def test_what_ordinary_text_needs_stays(text):
    assert terminal.plain(text) == text


@pytest.mark.parametrize("strictness", ["strict", "surrogateescape"])
def test_what_an_old_locale_lacks_becomes_an_escape(strictness):
    """Of the locale POSIX Python takes the second."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii", errors=strictness)
    terminal.write_what_can_be_written(stream)
    terminal.show("你 a", stream)
    assert written.getvalue() == b"\\u4f60 a\n"


def test_errors_and_log_lines_are_plain(capsys):
    assert __main__.main(["train", "--config", f"{EVIL}.yaml"]) == 2
    said = capsys.readouterr().err
    assert f"{HARMLESS}.yaml" in said
    record = logging.LogRecord("flax_asr", logging.INFO, "", 0, "clip %s", (EVIL,), None)
    assert terminal.Formatter().format(record) == f"clip {HARMLESS}"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_and_its_lines_are_plain(is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    with progress.Progress(2, "listening", "files", stream=stream) as bar:
        bar.write(f"flax-asr: {EVIL}")
        bar.advance(2)
    assert HARMLESS in stream.getvalue()


def test_a_card_carries_no_control_characters():
    assert terminal.plain(markdown.escape(EVIL)) == markdown.escape(EVIL)


def test_findings_of_the_doctor_are_plain():
    entries = [shards.LeftOut(EVIL, "damaged", EVIL)]
    shown = consultation.report({}, list(findings.left_out(entries, 1, "train")))
    assert terminal.plain(shown) == shown


def test_one_module_only_prints():
    printing = {
        path.stem
        for path in pathlib.Path(flax_asr.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    }
    assert printing == {"terminal"}

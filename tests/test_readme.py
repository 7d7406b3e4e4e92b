"""What the documents show is run, or is at least what the program would take.

`console` blocks are run, in order, in a copy of the repository's own data, with less of it;
`python` blocks after them, in one process. `sh` blocks stand under a line "(needs ...)" that says
why they are not run here: their shell must parse, and so must every command of ours in them.
`yaml` blocks are configurations. `python tests/test_readme.py` writes the tables that repeat the
code.
"""

import ast
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from flax_asr import __main__, common_voice, config, trainer_names
from flax_asr.console import option_help
from flax_asr.hosts import cluster, multihost

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)

# Makes a run of minutes one of seconds.
LITTLE = (
    "--train.max_steps 2 --train.eval_steps 2 --train.save_steps 2 --train.global_batch_size 4"
    " --train.per_device_train_batch_size 2 --train.per_device_eval_batch_size 4"
    " --data.num_buckets 1 --data.max_train_clips 24 --data.max_eval_clips 8"
    " --optim.warmup_steps 0"
).split()


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, the line before it."""

    page: pathlib.Path
    language: str
    text: str
    before: str

    @property
    def name(self) -> str:
        return f"{self.page.stem}: {self.text.splitlines()[0][:50]}"


def _blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            lines_before = text[: match.start()].strip().splitlines()
            found.append(Block(page, match[1], match[2], lines_before[-1]))
    return found


BLOCKS = _blocks()
SHELL = [block for block in BLOCKS if block.language == "sh"]
CONSOLE = [block for block in BLOCKS if block.language == "console"]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def _our_commands(text: str) -> list[list[str]]:
    """The words of every command of ours in a piece of shell, `flax-asr` left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(
        r"(?:^|[\s;&|(])(flax-asr|python3? -m flax_asr|python3? train\.py)( [^\n;&|\"]*)?", joined
    )
    return [
        (["train"] if program.endswith("train.py") else []) + shlex.split(words)
        for program, words in found
    ]


def test_every_block_has_a_language_that_says_how_it_is_checked():
    assert {block.language for block in BLOCKS} <= {"sh", "console", "python", "yaml", "text"}


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_a_command_that_is_not_run_says_what_it_needs_and_parses(block, tmp_path):
    assert re.fullmatch(r"\(needs .+\)", block.before), block.before
    parsed = subprocess.run(["bash", "-n"], input=block.text, text=True, timeout=20, check=False)
    assert parsed.returncode == 0
    for words in _our_commands(block.text):
        own, options = __main__.split(words)
        known = __main__._parser().parse_args(own)
        path = getattr(known, "config", None)
        cfg = config.load(_configuration(path, tmp_path) if path else None, options)
        if known.command in ("train", "prepare"):
            cfg.require("output_dir", "data.source", "data.language")


def _configuration(path: str, folder: pathlib.Path) -> pathlib.Path:
    """A recipe, or the file that a page shows before it is used."""
    if (ROOT / path).is_file():
        return ROOT / path
    shown = [block for block in BLOCKS if block.language == "yaml"]
    assert len(shown) == 1, f"{path} is neither a recipe nor the one file that is shown"
    (folder / path).write_text(shown[0].text, encoding="utf-8")
    return folder / path


def test_the_commands_of_ours_are_found():
    found = {words[0] for block in SHELL for words in _our_commands(block.text)}
    assert {"train", "prepare"} <= found
    assert sum(len(_our_commands(block.text)) for block in SHELL) >= 10


def test_the_clip_that_is_listened_to_is_one_of_the_test_split():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"configs/quickstart/\S+\.mp3", text))
    assert named
    for name in named:
        table = ROOT / pathlib.Path(name).parents[1] / "test.tsv"
        assert pathlib.Path(name).name in table.read_text(encoding="utf-8")


def test_a_shown_configuration_loads_and_is_complete():
    shown = [block for block in BLOCKS if block.language == "yaml"]
    assert shown
    for block in shown:
        from ruamel.yaml import YAML

        cfg = config.build(YAML(typ="safe").load(block.text))
        cfg.require("output_dir", "data.source", "data.language")


def test_the_table_of_own_recordings_that_is_shown_is_a_source(tmp_path):
    (shown,) = [block for block in BLOCKS if block.text.startswith("path,")]
    (command,) = [block for block in SHELL if "clips.csv" in block.text]
    ((_, *words),) = _our_commands(command.text)
    cfg = config.load(None, words[words.index("--data.language") :])
    table = tmp_path / cfg.data.source
    table.parent.mkdir()
    table.write_text(shown.text, encoding="utf-8")
    source = common_voice.open_source(str(table), language=cfg.data.language)
    (trained,) = (clip for split in cfg.data.train_splits for clip in source.read(split))
    (scored,) = (clip for split in cfg.data.eval_splits for clip in source.read(split))
    assert (trained.sentence, scored.sentence) == ("Mae hi'n braf heddiw.", "Bore da, bawb.")
    assert trained.audio == str(table.parent / "monday" / "0001.wav")
    assert [clip.refused for clip in source.read(*cfg.data.test_splits)] == [""]


def test_ci_runs_the_readme_s_test_command():
    (command,) = [block.text for block in SHELL if "pytest" in block.text]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, run = re.search(r"(pip install \S+) && python (-m pytest)", command).groups()
    assert install.split()[-1] == "'.[test]'"
    assert "-m pip install" in script
    assert "'.[test]'" in script
    assert run in script


def test_every_extra_that_is_named_exists():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        extra for page in PAGES for extra in re.findall(r"'\.\[(\w+)\]'", page.read_text("utf-8"))
    }
    assert {"test", "tpu", "cuda13"} <= named <= project["optional-dependencies"].keys()


@every_page
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@every_page
def test_options_in_running_text_exist(page):
    sections = {name.partition(".")[0] for name in config.option_types() if "." in name}
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`(?:--)?([a-z]+\.\w+)[ `]", text):
        is_file = name.endswith(".safetensors")
        if name.partition(".")[0] in sections and not is_file:
            inside = [known for known in config.option_types() if known.startswith(f"{name}.")]
            assert name in config.option_types() or inside, name


def test_every_figure_names_the_script_that_prints_it():
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    rows = text.partition("## Figures")[2].partition("\n## ")[0].strip().splitlines()
    header, _, *figures = [row.strip("| ").split(" | ") for row in rows if row.startswith("|")]
    assert figures
    for row in figures:
        said = dict(zip(header, row, strict=True))
        assert re.fullmatch(r"[0-9a-f]{7,}", said["commit"])
        assert said["machine"]
        script = re.fullmatch(r"`python (benchmarks/\w+\.py)( .*)?`", said["command"])
        assert (ROOT / script[1]).is_file()


def test_every_command_that_works_is_in_the_documents():
    text = "".join(page.read_text("utf-8") for page in PAGES)
    homes = {"prepare": "data/prepare.py", "train": "loop.py"}
    for command in __main__.COMMANDS:
        exists = (ROOT / "flax_asr" / homes.get(command, f"{command}.py")).is_file()
        shown = re.search(rf"flax-asr {command}\b", text) is not None
        assert shown or not exists, f"flax-asr {command} is in no document"


def test_the_limits_among_several_hosts_are_those_of_the_code():
    page = (ROOT / "docs" / "several_hosts.md").read_text("utf-8")
    assert f"not heard of for {multihost.LOST_SECONDS:.0f} seconds" in page
    assert f"after {cluster.LOST_SECONDS} seconds if its machine is gone" in page
    assert f"does not start within {cluster.JOINING_SECONDS} seconds" in page
    variables = set(re.findall(r"JAX_(?:COORDINATOR|NUM|PROCESS)_\w+", page))
    assert variables == set(cluster._VARIABLES)


# Tables that repeat the code


def options_table() -> str:
    """Every option with its default and meaning."""
    kinds, defaults = config.option_types(), config.as_dict(config.Config())
    lines = {}
    for line in option_help.listing().splitlines():
        if found := re.fullmatch(r"  --(\S+)  (.*) \(default .*\)", line):
            lines[found[1]] = found[2].removesuffix(".")
    assert lines.keys() == kinds.keys()
    rows = ["| option | default | what it is |", "|---|---|---|"]
    for name, meaning in lines.items():
        value = defaults
        for part in name.split("."):
            value = value[part]
        shown = "null" if value is None else json.dumps(value).replace('"', "")
        rows.append(f"| `{name}` | `{shown}` | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def names_table() -> str:
    """The Trainer's names that are spelt otherwise here."""
    rows = ["| there | here |", "|---|---|"]
    for name, ours in trainer_names.OURS.items():
        code, _, rest = ours.partition(" (")
        plain = re.match(r"nothing|the (option|command)", code)
        rows.append(f"| `{name}` | {code if plain else f'`{code}`'}{' (' + rest if rest else ''} |")
    return "\n".join(rows)


def modules_table() -> str:
    """Every file of the package, folder by folder, with what its docstring begins with."""
    package = ROOT / "flax_asr"
    lines = []
    for folder in sorted({path.parent for path in package.rglob("*.py")}):
        lines += [
            f"## {folder.relative_to(ROOT).as_posix()}/",
            "",
            _summary(folder / "__init__.py"),
        ]
        lines += ["", "| file | what it is |", "|---|---|"]
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                shown = path.name.replace("__", r"\_\_")
                link = f"[{shown}](../{path.relative_to(ROOT).as_posix()})"
                lines.append(f"| {link} | {_summary(path)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _summary(module: pathlib.Path) -> str:
    """The first paragraph of its docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", r"\|")


TABLES = {
    "modules": (ROOT / "docs" / "code.md", modules_table),
    "options": (ROOT / "docs" / "configuration.md", options_table),
    "names": (ROOT / "docs" / "coming_from_transformers.md", names_table),
}


def _table(name: str) -> tuple[pathlib.Path, re.Match]:
    page = TABLES[name][0]
    pattern = rf"(<!-- {name}: .*? -->\n)(.*?)(\n<!-- end of {name} -->)"
    return page, re.search(pattern, page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_documents_says_what_the_code_says(name):
    _, found = _table(name)
    assert found[2] == TABLES[name][1](), "run `python tests/test_readme.py`"


# What is run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the recipes and their data, and an environment that notices TensorFlow."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "train.py", folder)
    _fake_tensorflow(folder / "libraries")
    path = os.pathsep.join([str(folder / "libraries"), str(ROOT)])
    return folder, {**os.environ, "PYTHONPATH": path}


def _fake_tensorflow(folder: pathlib.Path) -> None:
    """A package of that name, installed for all who look, that leaves a mark when imported."""
    (folder / "tensorflow").mkdir(parents=True)
    mark = folder / "imported"
    (folder / "tensorflow" / "__init__.py").write_text(
        f"__version__ = '2.20.0'\nopen({str(mark)!r}, 'a').close()\n"
    )
    (folder / "tensorflow-2.20.0.dist-info").mkdir()
    (folder / "tensorflow-2.20.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tensorflow\nVersion: 2.20.0\n"
    )


def _run(command: list[str], workplace) -> subprocess.CompletedProcess:
    folder, environment = workplace
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def console(workplace):
    """Everything that `console` blocks say, run in order: command -> what came of it."""
    results = {}
    for line in "".join(block.text for block in CONSOLE).splitlines():
        assert line.startswith("$ "), line
        words = shlex.split(line.removeprefix("$ "))
        if words[0] == "flax-asr":
            command = [sys.executable, "-m", "flax_asr", *words[1:]]
        else:
            assert words[0] == "python"
            command = [sys.executable, *words[1:]]
        training = words[1] in ("train", "train.py")
        results[line] = _run([*command, *(LITTLE if training else [])], workplace)
        assert results[line].returncode == 0, f"{line}\n{results[line].stderr[-4000:]}"
    return results


@pytest.mark.slow
def test_the_commands_of_the_console_run(console, workplace):
    folder, _ = workplace
    assert len(console) >= 4
    written = {path.name for path in (folder / "runs" / "quickstart").iterdir()}
    assert {"README.md", "config.yaml", "log.jsonl", "checkpoints", "export"} <= written
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert {"split", "eval_loss", "eval_wer", "eval_cer", "clips"} <= scores[0].keys()
    assert (folder / "my-model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_every_file_that_the_readme_promises_in_a_run_folder_is_there(console, workplace):
    folder, _ = workplace
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = text.partition("| in `output_dir` |")[2].partition("\n\n")[0].splitlines()[2:]
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
            assert list((folder / "runs" / "quickstart").glob(name.rstrip("/"))), name


@pytest.mark.slow
def test_the_python_of_the_documents_runs(console, workplace):
    folder, _ = workplace
    (folder / "blocks.py").write_text("\n".join(block.text for block in PYTHON), encoding="utf-8")
    done = _run([sys.executable, "blocks.py"], workplace)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_nothing_that_the_console_ran_imported_tensorflow(console, workplace):
    folder, _ = workplace
    assert not (folder / "libraries" / "imported").exists()
    seen = _run([sys.executable, "-c", "import tensorflow"], workplace)
    assert seen.returncode == 0
    assert (folder / "libraries" / "imported").exists(), "the test could not have failed"


def _write_tables() -> None:
    for name, (_, make) in TABLES.items():
        page, found = _table(name)
        text = found.string
        page.write_text(text[: found.start(2)] + make() + text[found.end(2) :], encoding="utf-8")


if __name__ == "__main__":
    _write_tables()

"""The plan of the house: imports point one way, and some libraries are named in one file only."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

import flax_asr

PACKAGE = pathlib.Path(flax_asr.__file__).parent

# From the ground up. A module may import from its own layer and from those below.
LAYERS = (
    "atomic errors json_object yaml_file locks loose_ends trainer_names checks options config"
    " languages containers console seals hosts.stopping bucket.store bucket.lease"
    " record.json_lines record.runlog estimate.chips estimate.hlo",
    "metrics alignment vocabulary text compat markdown record.lineage",
    "audio sources common_voice record.curves record.left_out data scoring comparison inventory",
    "diagnosis.survey diagnosis.suspects diagnosis.findings diagnosis.consultation diagnosis.host"
    " diagnosis.spectrograms torch_logits",
    "compilation kept_programs ctc ctc_columns ctc_kernel optim models partition estimate.flops"
    " estimate.forecast record.learning",
    "criterion",
    "step",
    "hosts parallel checkpoint batch_size differences early_stopping run_folder bucket.copies"
    " record.window hyperparameters card origins corpora initial_weights static_shapes experiment"
    " feature_cache",
    "programs",
    "assembly estimate diagnosis bucket.follower bucket.mirror",
    "loading score_files scored_splits evaluate transcribe export training",
    "loop plan doctor",
    "__main__",
)


def _name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def _imported(nodes) -> set[str]:
    """Dotted names that import statements among these nodes bring in."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def _everywhere(module: str) -> set[str]:
    return _imported(ast.walk(_tree(module)))


def _when_loaded(module: str) -> set[str]:
    """What importing the module imports: everything that stands outside functions."""
    waiting, seen = list(_tree(module).body), []
    while waiting:
        node = waiting.pop()
        seen.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return _imported(seen)


def _ours(names: set[str]) -> set[str]:
    """Modules of this package among dotted names; the package itself is ""."""
    inside = {
        name.removeprefix("flax_asr").lstrip(".") for name in names if _root(name) == "flax_asr"
    }
    return {name if name in FILES else name.rpartition(".")[0] for name in inside}


def _root(name: str) -> str:
    return name.partition(".")[0]


@functools.cache
def _reached(module: str) -> frozenset[str]:
    """All modules of this package that a module needs, at whatever remove."""
    waiting, seen = [module], set()
    while waiting:
        for name in _ours(_everywhere(waiting.pop())) - seen:
            seen.add(name)
            waiting.append(name)
    return frozenset(seen)


def _layer(module: str) -> int:
    """A module's place in LAYERS, where a room stands for its modules that are not named.

    The package itself and the rooms' own files, which import nothing, lie at the bottom.
    """
    if not module or FILES[module].name == "__init__.py":
        return 0
    places = {name: n for n, layer in enumerate(LAYERS) for name in layer.split()}
    return places.get(module, places.get(_root(module), 0))


def test_no_module_needs_itself():
    assert {module for module in FILES if module in _reached(module)} == set()


def test_imports_point_one_way():
    upwards = [
        f"{module} needs {needed}"
        for module in FILES
        for needed in _reached(module)
        if _layer(needed) > _layer(module)
    ]
    assert upwards == []


def test_every_module_has_its_layer():
    names = " ".join(LAYERS).split()
    assert len(names) == len(set(names))
    rooms = {module for module, path in FILES.items() if path.name == "__init__.py"}
    modules = {module for module in FILES if module not in rooms}
    assert {m for m in modules if m not in names and _root(m) not in names} == set()
    assert set(names) <= set(FILES)


def test_modules_are_imported_not_their_names():
    packages = {module for module, path in FILES.items() if path.name == "__init__.py"}
    for module in FILES:
        for name in _everywhere(module) - {"flax_asr"}:
            if _root(name) == "flax_asr":
                parent, _, last = name.removeprefix("flax_asr").lstrip(".").rpartition(".")
                assert parent in packages, f"{module} imports {last} from flax_asr.{parent}"
                assert last not in flax_asr.__all__, f"{module} imports {last} from flax_asr"


def _named(module: str, word: str) -> bool:
    """Whether code, not text, of the module says this word."""
    imported = (part for name in _everywhere(module) for part in name.split("."))
    spoken = (
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(_tree(module))
        if isinstance(node, (ast.Attribute, ast.Name))
    )
    return word in (*imported, *spoken)


@pytest.mark.parametrize(
    ("word", "home"),
    [
        ("pmap", "parallel"),
        ("orbax", "checkpoint"),
        ("soundfile", "audio"),
        ("soxr", "audio"),
        ("librosa", "audio"),
        ("datasets", "sources.hub"),
        ("tensorboardX", "record.runlog"),
        ("gcsfs", "bucket.store"),
        ("fsync", "atomic"),
    ],
)
def test_one_file_only_names_it(word, home):
    assert {module for module in FILES if _named(module, word)} <= {home}
    assert _named(home, word)


def test_what_the_system_says_of_a_failure_is_read_in_one_place():
    """It may say nothing, and a message would end in "None"."""
    attributes = {
        module: {ast.unparse(n) for n in ast.walk(_tree(module)) if isinstance(n, ast.Attribute)}
        for module in FILES
    }
    assert {m for m, found in attributes.items() if "error.strerror" in found} == {"errors"}


def test_no_file_under_data_names_jax():
    under_data = [module for module in FILES if _root(module) == "data"]
    assert len(under_data) > 3
    foreign = {"jax", "flax", "optax", "orbax", "torch", "transformers"}
    assert {m for m in under_data if foreign & set(map(_root, _everywhere(m)))} == set()


def test_torch_and_other_heavy_libraries_load_inside_functions():
    heavy = {"torch", "librosa", "datasets", "tensorboardX", "matplotlib", "gcsfs"}
    assert {m for m in FILES if heavy & set(map(_root, _when_loaded(m)))} == set()


def test_tensorflow_is_named_nowhere():
    assert {module for module in FILES if _named(module, "tensorflow")} == set()


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules in memory after a statement in a fresh process."""
    code = (
        f"{statement}\nimport sys; print('LOADED', *{{m.partition('.')[0] for m in sys.modules}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.rpartition("LOADED ")[2].split())


HEAVY = {
    "jax",
    "torch",
    "transformers",
    "tensorflow",
    "flax",
    "optax",
    "orbax",
    "datasets",
    "numpy",
}


def test_importing_the_package_is_light():
    loaded = _loaded_by("import flax_asr")
    assert "flax_asr" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_is_light(arguments):
    loaded = _loaded_by(
        "import contextlib\nfrom flax_asr import __main__\n"
        f"with contextlib.suppress(SystemExit): __main__.main({arguments})"
    )
    assert "flax_asr" in loaded
    assert loaded & HEAVY == set()


def test_loading_the_data_side_loads_no_jax():
    names = [m for m in FILES if m and _layer(m) <= _layer("data")]
    loaded = _loaded_by("\n".join(f"import flax_asr.{name}" for name in names))
    assert loaded & {"jax", "torch", "transformers", "tensorflow", "flax", "datasets"} == set()


def test_the_wall_clock_is_read_only_for_people_and_for_names():
    """It may jump: spans are measured without it, and the newest is the one of the highest step."""
    wall = {"time", "time_ns", "now", "utcnow", "today", "st_mtime", "st_mtime_ns", "getmtime"}
    readers = {
        module
        for module in FILES
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Attribute)
        and node.attr in wall
        and ast.unparse(node.value).partition(".")[0] in ("time", "datetime", "status", "os")
    }
    assert readers == {
        "record.window",  # when an event was logged
        "record.runlog",  # the same, for TensorBoard
        "bucket.copies",  # whether what is unfinished was left by a kill
        "bucket.lease",  # since when a run is at work, in a message
        "run_folder",  # the dated name of an old run
        "hosts.multihost",  # the name of a file that nobody else has
        "bucket.mirror",  # whether a file is another one than before, earlier or later
    }

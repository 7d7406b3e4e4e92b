"""The command line: help, exit statuses, and one clear message for what the user can fix."""

import io
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
import small_saved

import flax_asr
from flax_asr import __main__, config, errors
from flax_asr.console import model_options, terminal
from flax_asr.hosts import cluster

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = str(ROOT / "configs" / "cheap_cpu.yaml")


@pytest.mark.parametrize("command", __main__.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: flax-asr {command}" in shown
    for name in config.option_types():
        takes = {"export": False} | {
            of_a_model: model_options.takes(of_a_model, name)
            for of_a_model in ("evaluate", "transcribe")
        }
        assert (f"--{name} " in shown) == takes.get(command, True), name


@pytest.mark.parametrize("command", __main__.COMMANDS)
def test_the_help_says_where_the_defaults_are_those_of_the_model_s_run(command, capsys):
    with pytest.raises(SystemExit):
        __main__.main([command, "--help"])
    said = "What is not given is read from the run that made the model" in capsys.readouterr().out
    assert said == (command in ("evaluate", "transcribe"))


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command}" in shown for command in __main__.COMMANDS)


@pytest.mark.parametrize("library", ["huggingface_hub", "datasets"])
def test_what_a_library_says_on_the_terminal_itself_is_not_said_twice(library, monkeypatch):
    logger, ours, said = logging.getLogger(library), logging.Handler(), []
    monkeypatch.setattr(ours, "emit", lambda record: said.append(record.msg))
    monkeypatch.setattr(logging.root, "handlers", [ours])
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning("before")
    assert __main__.main(["train", "--config", "absent.yaml"]) == 2
    logger.warning("after")
    assert said == ["before"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("doctor --config=~/a --json=~/a --spectrograms=~/a", ("config", "json", "spectrograms")),
        ("transcribe --model x ~/a", ("audio",)),
        ("export ~/a ~/a", ("run", "out")),
    ],
)
def test_a_tilde_is_the_user_s_home(words, names, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    known = vars(__main__._parser().parse_args(words.split()))
    assert {str(known[name]).strip("[']") for name in names} == {"/home/me/a"}


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == flax_asr.__version__


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "required: COMMAND"),
        ("trian --config {recipe}", "invalid choice: 'trian'"),
        ("export", "required: RUN, OUT"),
        ("transcribe --model x", "required: AUDIO"),
        ("evaluate", "required: --model"),
        ("train --config", "--config: expected one argument"),
        ("train --conf {recipe}", "did you mean --config?"),
        (
            "evaluate --model x --config {recipe}",
            "{recipe}. That option belongs to another command.",
        ),
        ("prepare --restart", "--restart. That option belongs to another command."),
        ("train --config {recipe} more", "unrecognized arguments: more"),
        ("train --data.train_splits train dev", "dev. An option takes one value, a list is"),
        ("train {recipe}", "A configuration file is given as --config {recipe}"),
        ("train --model runs/old", "are given as --model.pretrained runs/old."),
        ("train --config {recipe} --do_train true", "here it is the command `flax-asr train`"),
        ("train --config {recipe} --optim adamw_torch", "the optimiser is AdamW"),
        ("train", "output_dir, data.source and data.language are not set"),
        ("prepare --data.source x", "data.language is not set: write it"),
        ("evaluate --modle x", "did you mean --model?"),
        ("train --config {recipe} --data.trim_silence", "needs a value: one of true, false"),
        ("train --optim.lr_scheduler_type", "needs a value: one of linear, constant, cosine"),
        ("train --config {recipe} --model.remat_policy all", "one of full, dots_saveable"),
        ("train --config nowhere.yaml", "nowhere.yaml: No such file or directory (seen from /"),
        ("train --config {recipe} --optim.learning_rat 1", "did you mean optim.learning_rate?"),
        ("train --config {recipe} --train.learning_rate 1e-4", "it is optim.learning_rate"),
        ("train --config {recipe} --fp16 true", "train.mixed_precision fp16"),
        ("train --config {recipe} --per_device_eval_batch_siz 4", "per_device_eval_batch_size"),
        ("train --config {recipe} --warmup_ratio 0.1", "optim.warmup_fraction"),
        ("train --config {recipe} --train.max_steps", "--train.max_steps needs a value"),
        ("train --config {recipe} --train.max_steps many", "train.max_steps is 'many'"),
        ("train --train.max_steps 3 --train.max_steps 4", "given twice"),
        ("prepare --config {recipe} --data.max_seconds 0", "data.max_seconds is 0"),
        ("export run out --step best", "invalid int value: 'best'"),
        ("export run out --train.max_steps 3", "export takes no option --train.max_steps"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(words, expected, capsys):
    assert __main__.main([word.format(recipe=RECIPE) for word in words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flax-asr: ")
    assert captured.err.count("\n") == 1
    assert expected.format(recipe=RECIPE) in captured.err


@pytest.mark.parametrize("words", [["train"], ["transcribe", "--model", "m", "a.wav"]])
def test_a_current_folder_that_was_deleted_is_one_message_and_status_2(
    words, tmp_path, monkeypatch, capsys
):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert __main__.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "flax-asr: the current folder cannot be used: No such file or directory."
    )
    assert said.count("\n") == 1


def test_options_win_wherever_config_stands():
    before = __main__.split(["train", "--seed", "1", "--config", RECIPE])
    after = __main__.split(["train", "--config", RECIPE, "--seed", "1"])
    assert before == after == (["train", "--config", RECIPE], ["--seed", "1"])
    assert config.load(RECIPE, before[1]).seed == 1


@pytest.fixture
def train_that(monkeypatch):
    """Puts a function in the place of `loop.train`."""

    def replace(function):
        loop = types.SimpleNamespace(train=function)
        monkeypatch.setitem(sys.modules, "flax_asr.loop", loop)
        monkeypatch.setattr(flax_asr, "loop", loop, raising=False)

    return replace


def test_a_finished_command_is_status_0(train_that):
    asked = []
    train_that(lambda cfg, restart: asked.append((cfg, restart)))
    assert __main__.main(["train", "--config", RECIPE, "--restart", "--seed=7"]) == 0
    assert asked == [(config.load(RECIPE, ["--seed", "7"]), True)]


def test_an_interrupted_run_is_status_75(train_that, capsys):
    def stopped(cfg, restart):
        raise errors.Interrupted("stopped after update 3; run the same command to go on.")

    train_that(stopped)
    assert __main__.main(["train", "--config", RECIPE]) == 75
    assert capsys.readouterr().err == "stopped after update 3; run the same command to go on.\n"


@pytest.mark.parametrize(
    "kind",
    ["ConfigError", "DataError", "ModelError", "CheckpointError", "TrainingError", "AudioError"],
)
def test_what_the_user_can_mend_is_status_2(kind, train_that, capsys):
    def refuses(cfg, restart):
        raise getattr(errors, kind)("clip.mp3 is cut short")

    train_that(refuses)
    assert __main__.main(["train", "--config", RECIPE]) == 2
    assert capsys.readouterr().err == "flax-asr: clip.mp3 is cut short\n"


def test_a_command_that_is_broken_off_says_so_without_a_traceback(train_that, capsys):
    def interrupted(cfg, restart):
        raise KeyboardInterrupt

    train_that(interrupted)
    assert __main__.main(["train", "--config", RECIPE]) == 130
    assert capsys.readouterr().err == "flax-asr: stopped.\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("words", ["train flax_asr.loop", "prepare flax_asr.data.prepare"])
def test_a_signal_while_it_still_loads_is_status_75(name, words):
    command, module = words.split()
    code = f"""
import signal, sys
class Signals:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.{name})
sys.meta_path.insert(0, Signals())
from flax_asr import __main__
sys.exit(__main__.main([{command!r}, "--config", {RECIPE!r}, "--data.source", "x",
                        "--data.language", "cy"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (75, "")
    assert f"{name}: stopped. Run the same command to go on." in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_preparation_that_is_stopped_is_status_75_and_goes_on(number, tmp_path):
    corpus = ROOT / "configs" / "quickstart" / "corpus"
    words = f"prepare --data.source {corpus} --data.language yue --output_dir {tmp_path}/run"
    command = [sys.executable, "-m", "flax_asr", *words.split()]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("prepared-*/train/audio-*.bin")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    name = signal.Signals(number).name
    assert said.strip() == f"{name}: stopped. Run the same command to go on."
    assert not list(tmp_path.glob("prepared-*/train/manifest.json"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "train: 510 clips" in done.stdout


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RuntimeError("Unable to initialize backend 'tpu': in use by pid 7.\nmore"), "pid 7."),
        (AssertionError(), "it finds no tpu on this machine."),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        "train --config {recipe} --output_dir {run} --data.source {run} --data.language cy",
        "transcribe --model {model} a.wav",
    ],
)
def test_a_device_that_cannot_be_used_is_one_message_and_status_2(
    failure, said, command, tmp_path, monkeypatch, capsys
):
    def devices():
        raise failure

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    model = tmp_path / "export"
    small_saved.export_folder(model, small_saved.saved())
    places = {"recipe": RECIPE, "model": model, "run": tmp_path / "run"}
    assert __main__.main([word.format(**places) for word in command.split()]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("flax-asr: JAX cannot use its devices: ")
    assert said in message
    assert "JAX_PLATFORMS is tpu" in message


@pytest.mark.parametrize("asked", ["cuda", "cuda,cpu", "tpu"])
def test_another_device_than_is_asked_for_is_not_taken(asked, monkeypatch):
    """JAX passes over CUDA where there is none and another kind will do."""
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    with pytest.raises(errors.ConfigError, match=f"it finds no {asked} on this machine"):
        cluster.devices()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cluster.devices() == jax.devices()


@pytest.mark.parametrize(
    ("asked", "given"), [("cuda", "cuda,cpu"), ("tpu,cpu", "tpu,cpu"), ("cpu", "cpu"), ("", "")]
)
def test_the_host_s_own_processor_is_there_beside_the_device(asked, given, monkeypatch):
    """Reading a checkpoint and checking an export need it."""
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    seen = []
    monkeypatch.setattr(__main__, "main", lambda: seen.append(os.environ["JAX_PLATFORMS"]) or 0)
    monkeypatch.setattr(__main__.hidden, "hide", lambda name: None)
    assert __main__.command() == 0
    assert seen == [given]


def test_a_stream_that_lacks_a_character_gets_an_escape(train_that, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    train_that(lambda cfg, restart: terminal.show("one，two"))
    assert __main__.main(["train", "--config", RECIPE]) == 0
    assert written.getvalue() == b"one\\uff0ctwo\n"


def test_output_that_nobody_reads_ends_the_command_without_a_traceback(
    train_that, monkeypatch, capsys
):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        train_that(lambda cfg, restart: terminal.show("one"))
        assert __main__.main(["train", "--config", RECIPE]) == 141
        stream.write("more")  # which the interpreter's end would do
        stream.flush()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_output_that_does_not_fit_on_the_disk_is_one_message(train_that, monkeypatch, capsys):
    monkeypatch.setattr(__main__.hidden, "hide", lambda name: None)
    monkeypatch.setattr(__main__.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(sys, "argv", ["flax-asr", "train", "--config", RECIPE])
    train_that(lambda cfg, restart: terminal.show("one"))
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert __main__.command() == 2
        stream.write("more")  # which the interpreter's end would do
    message = "flax-asr: the output cannot be written: No space left on device. Send it elsewhere"
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("end", "status"),
    [(errors.Interrupted("stopped"), 75), (errors.DataError("bad"), 2), (KeyboardInterrupt(), 130)],
)
def test_the_status_is_the_same_where_nobody_reads_the_message(
    train_that, monkeypatch, end, status
):
    def ends(cfg, restart):
        raise end

    train_that(ends)
    monkeypatch.setattr(__main__.hidden, "hide", lambda name: None)
    monkeypatch.setattr(__main__.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(sys, "argv", ["flax-asr", "train", "--config", RECIPE])
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert __main__.command() == status
        stream.write("more")  # which the interpreter's end would do
        stream.flush()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed, tmp_path):
    """The file that is opened first would take the place of one, and get what is said there."""
    script = (
        "import os, sys\n"
        "from flax_asr import __main__\n"
        "__main__.main = lambda: int(os.open(sys.argv[1], os.O_CREAT | os.O_RDWR) < 3)\n"
        "sys.exit(__main__.command())"
    )
    words = ["bash", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", script]
    done = subprocess.run([*words, str(tmp_path / "file")], check=False)
    assert done.returncode == 0


def test_what_follows_two_dashes_is_no_option():
    words = ["transcribe", "--model", "m", "--train.mixed_precision", "fp32", "--", "-a.wav", "--b"]
    own, options = __main__.split(words)
    assert options == ["--train.mixed_precision", "fp32"]
    assert __main__._parser().parse_args(own).audio == ["-a.wav", "--b"]


@pytest.mark.parametrize("bug", [ZeroDivisionError, BrokenPipeError])
def test_a_bug_is_not_hidden(train_that, bug):
    """A broken pipe is one too, unless it is that of standard output."""

    def broken(cfg, restart):
        raise bug

    train_that(broken)
    with pytest.raises(bug):
        __main__.main(["train", "--config", RECIPE])


@pytest.mark.parametrize("command", ["evaluate", "transcribe clip.wav"])
@pytest.mark.parametrize("kind", ["folder", "empty", "hub"])
def test_a_model_that_is_not_there_is_one_message_and_status_2(command, kind, tmp_path, capsys):
    model = {"folder": f"{tmp_path}/nowhere", "empty": str(tmp_path), "hub": "nobody/nothing"}[kind]
    assert __main__.main([*command.split(), "--model", model]) == 2
    message = capsys.readouterr().err
    assert model in message
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1


def test_a_source_that_is_not_there_is_one_message_and_status_2(tmp_path, capsys):
    source = f"{tmp_path}/nowhere"
    words = f"prepare --output_dir {tmp_path}/run --data.language cy --data.source {source}"
    assert __main__.main(words.split()) == 2
    message = capsys.readouterr().err
    assert source in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "flax_asr", "train"], [sys.executable, "train.py"]]
)
def test_the_process_ends_with_the_status(command):
    done = subprocess.run(
        [*command, "--config", "nowhere.yaml"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flax-asr: cannot read the configuration nowhere.yaml")
    assert done.stderr.count("\n") == 1


def test_a_process_that_a_signal_ends_says_where(tmp_path):
    shard = tmp_path / "shard"
    shard.write_bytes(bytes(8192))
    reads_a_shard_that_was_cut = f"""
import mmap, os
from flax_asr import __main__
def main():
    with open({str(shard)!r}, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        os.truncate({str(shard)!r}, 0)
        return mapped[5000]
__main__.main = main
__main__.command()
"""
    done = subprocess.run(
        [sys.executable, "-c", reads_a_shard_that_was_cut],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr
    assert "in main" in done.stderr

"""The commands: `flax-asr COMMAND` is `python -m flax_asr COMMAND`. Argument parsing only."""

import argparse
import difflib
import faulthandler
import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

import flax_asr
from flax_asr import config, errors
from flax_asr.console import hidden, model_options, option_help, terminal
from flax_asr.hosts import stopping

USER_ERROR, INTERRUPTED = errors.STATUS, stopping.STATUS
BROKEN_OFF = 128 + signal.SIGINT
"""Exit status of a command ended by Ctrl-C that cannot be resumed; the shells' convention."""
UNREAD = 128 + signal.SIGPIPE
"""Exit status of a command whose output is no longer read, as after `| head`."""

OWN_OPTIONS = frozenset(
    (
        "--config --model --json --restart --legacy --step --topology --every_shape --spectrograms"
        " --help --version"
    ).split()
)

_LIKELY_MEANT = OWN_OPTIONS - {"--step"}  # which is near to too many others

_TAKE_A_MODEL = ("evaluate", "transcribe")

COMMANDS = {
    "prepare": "decode the splits that the configuration names",
    "train": "prepare, train, evaluate, checkpoint, export, write the card; run again to resume",
    "evaluate": "loss, WER and CER of a model on the named splits",
    "transcribe": "the text of audio files of any length",
    "export": "a run's best checkpoint as a transformers folder",
    "plan": "compile the run for a TPU that you do not have yet: does it fit, how fast is it",
    "doctor": "check data and machine before you pay for a run",
}


def command() -> int:
    """Entry point of `flax-asr`; returns the exit status. Keeps torch out of the process.

    transformers' configuration classes import torch wherever it is installed: seconds and hundreds
    of megabytes that no command needs. The check of an export has a process of its own.
    """
    terminal.open_what_was_closed()
    hidden.hide("torch")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns that torch is missing
    # Checkpoints are read, and exports checked, on the CPU, whatever device is asked for.
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and "cpu" not in platforms.split(","):
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"
    # A shard that is cut while it is mapped ends the process by a signal: this prints where it was.
    faulthandler.enable()
    try:
        return main()
    finally:
        for stream in (sys.stdout, sys.stderr):
            terminal.leave(stream)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    terminal.write_what_can_be_written(sys.stdout, sys.stderr)
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(terminal.Formatter())
    logging.basicConfig(level=logging.ERROR, handlers=[log])
    logging.getLogger("flax_asr").setLevel(logging.INFO)
    for library in ("huggingface_hub", "datasets"):  # which show their warnings themselves
        logging.getLogger(library).propagate = False
    try:
        own, options = split(arguments)
        known = _parser().parse_args(own)
        _check_current_folder()
        return _run(known, options)
    except errors.Interrupted as stop:
        terminal.tell(str(stop), sys.stderr)
        return INTERRUPTED
    except errors.FlaxAsrError as error:
        terminal.tell(f"flax-asr: {error}", sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        terminal.tell("flax-asr: stopped.", sys.stderr)
        return BROKEN_OFF
    except BrokenPipeError:
        if not terminal.is_unread(sys.stdout):
            raise
        return UNREAD


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words of the command itself, options of the configuration with their values).

    Raises:
        ConfigError: an option that is nearly one of the command itself.
    """
    own: list[str] = []
    options: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":  # what follows is no option, whatever it looks like
            own += [word, *words]
            break
        name = word.partition("=")[0]
        if not word.startswith("--") or name in OWN_OPTIONS:
            own.append(word)
            continue
        near = difflib.get_close_matches(name, _LIKELY_MEANT, n=1, cutoff=0.75)
        if near and "." not in name and name[2:] not in config.option_types():
            raise errors.ConfigError(f"there is no option {name}: did you mean {near[0]}?")
        options.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            options.append(words.pop(0))
    return own, options


def _check_current_folder() -> None:
    """Raises `ConfigError` if it has been deleted, on which libraries fail while being imported."""
    try:
        os.getcwd()
    except OSError as error:
        raise errors.ConfigError(
            f"the current folder cannot be used: {errors.why(error)}. It may have been deleted: go"
            " to one that is there (`cd`), and run the command again."
        ) from error


def _run(known: argparse.Namespace, options: list[str]) -> int:
    if known.command == "prepare":
        with stopping.Stop():
            cfg = config.load(known.config, options)
            cfg.require("data.source", "data.language")
            from flax_asr.data import prepare

            prepare.command(cfg)
    elif known.command == "train":
        # Before the imports, which take seconds: a machine may be taken away at once.
        with stopping.Stop():
            cfg = config.load(known.config, options)
            from flax_asr import loop

            loop.train(cfg, restart=known.restart)
    elif known.command == "evaluate":
        from flax_asr import evaluate

        evaluate.command(known.model, options, known.json, legacy=known.legacy)
    elif known.command == "transcribe":
        from flax_asr import transcribe

        return transcribe.command(known.model, known.audio, known.json, options)
    elif known.command == "export":
        if options:
            raise errors.ConfigError(f"export takes no option {options[0]}.")
        from flax_asr import export

        export.command(known.run, known.out, known.step)
    elif known.command == "plan":
        from flax_asr import plan

        cfg = config.load(known.config, options)
        plan.command(cfg, known.topology, known.json, known.every_shape)
    else:
        from flax_asr import doctor

        doctor.command(config.load(known.config, options), known.json, known.spectrograms)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flax-asr",
        description="Fine-tune wav2vec 2.0 / XLS-R with CTC in JAX.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=flax_asr.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=_epilog(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in ("prepare", "train", "plan", "doctor"):
            command.add_argument("--config", type=_path, help="the configuration file (YAML)")
        if name in _TAKE_A_MODEL:
            command.add_argument(
                "--model", required=True, help="a run folder, checkpoint, export, or hub id"
            )
        if name in (*_TAKE_A_MODEL, "plan", "doctor"):
            command.add_argument(
                "--json", metavar="FILE", type=_path, help="results for programs; - = stdout"
            )
        _add_own(command, name)
    return parser


def _path(word: str) -> str:
    """With a leading ~ as the user's home: of `--config=~/FILE` no shell makes it."""
    return os.path.expanduser(word)


def _epilog(command: str) -> str | None:
    if command == "export":
        return None
    if command in _TAKE_A_MODEL:
        return option_help.listing(
            functools.partial(model_options.takes, command),
            "What is not given is read from the run that made the model. An export carries its\n"
            "language and normalisation, and is computed in fp32, like models made elsewhere.",
        )
    return option_help.listing()


def _add_own(command: argparse.ArgumentParser, name: str) -> None:
    if name == "train":
        command.add_argument(
            "--restart",
            action="store_true",
            help="keep the old run under a dated name and start anew",
        )
    elif name == "evaluate":
        command.add_argument(
            "--legacy", action="store_true", help="also score as the scripts of 2022 did"
        )
    elif name == "transcribe":
        command.add_argument("audio", nargs="+", metavar="AUDIO", type=_path, help="audio files")
    elif name == "export":
        command.add_argument("run", metavar="RUN", type=_path, help="a run folder")
        command.add_argument("out", metavar="OUT", type=_path, help="the folder to write")
        command.add_argument("--step", type=int, help="which checkpoint; by default the best one")
    elif name == "doctor":
        command.add_argument(
            "--spectrograms",
            metavar="FOLDER",
            type=_path,
            help="pictures of the most suspect training clips",
        )
    elif name == "plan":
        command.add_argument(
            "--topology", required=True, help="chip and shape of the slice: v5e:2x4"
        )
        command.add_argument(
            "--every_shape",
            action="store_true",
            help="compile every program of the run, not only the largest of each kind",
        )


class _Parser(argparse.ArgumentParser):
    """Raises errors as `ConfigError`, like those of the configuration: one line, status 2."""

    def error(self, message: str):
        hint = ""
        if message.startswith("unrecognized"):
            hint = " An option takes one value, a list is written a,b."
            if set(re.findall(r"--\w+", message)) & OWN_OPTIONS:
                hint = " That option belongs to another command."
            elif file := re.search(r"\S+\.ya?ml\b", message):
                hint = f" A configuration file is given as --config {file[0]}."
            if model := re.search(r"--model\b=? ?(\S+)", message):
                hint = f" The weights to start from are given as --model.pretrained {model[1]}."
        raise errors.ConfigError(f"{message}.{hint} See {self.prog} --help.")


if __name__ == "__main__":
    sys.exit(command())

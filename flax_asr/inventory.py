"""The checkpoints of a run folder: which exist, which are sound, which is the best."""

import contextlib
import itertools
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_asr import config, errors, seals
from flax_asr import vocabulary as vocabularies

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE, META = "state", "meta.json"
UNFINISHED, REPLACED, _DAMAGED = ".unfinished-", ".replaced-", "damaged-"


@dataclass(frozen=True)
class Meta:
    """The metadata of a checkpoint.

    Attributes:
        step: number of updates done.
        run: the configuration, as `config.as_dict` returns it.
        model_config: `Wav2Vec2Config.to_dict()`.
        vocabulary: `Vocabulary.to_json()`.
        normalization: the resolved steps.
        do_normalize: whether clips are normalised to zero mean and unit variance.
        use_attention_mask: whether the model gets an attention mask.
        group_rows: rows of a batch group over all devices; fixed when the run starts.
        facts: data and origin for the card, and the number of `updates` of the run.
        metrics: the scores of this step, empty if it was not scored.
        window: figures since the last line of the log.
        log_events: number of events in the log.
    """

    step: int
    run: dict[str, Any]
    model_config: dict[str, Any]
    vocabulary: str
    normalization: Any
    do_normalize: bool
    use_attention_mask: bool
    group_rows: int
    facts: dict[str, Any]
    metrics: dict[str, float | str]
    window: dict[str, Any]
    log_events: int = 0


def unfinished(run: Path, step: int) -> Path:
    """The temporary path of a checkpoint; `run_folder.sweep` removes what a kill leaves there."""
    return run / FOLDER / f"{UNFINISHED}{step}"


def spare(path: Path) -> Path:
    """The path, or the first free one with a number appended: a folder of that name may be one that
    cannot be removed, such as a folder on a network disk with a file still open."""
    names = itertools.chain(
        [path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    )
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def reachable(folder: Path) -> Iterator[Path]:
    """The folder under a path that orbax and tensorstore accept, if need be a symbolic link.

    orbax searches with a pattern that contains the whole path, and so finds nothing in a folder
    `[a]`; tensorstore refuses backslashes.
    """
    path = folder.absolute()
    if not re.search(r"[*?\[\\]", str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="flax-asr-") as place:
        link = Path(place) / "link"
        link.symlink_to(path)
        yield link


def steps(run: Path) -> list[int]:
    """All saved steps, newest first, sound or not."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdecimal()), reverse=True)


def newest_sound(run: Path) -> int | None:
    """The newest step whose checkpoint is sound; None if nothing was saved.

    Raises:
        CheckpointError: there are checkpoints, and none is sound.
    """
    return first_sound(run, steps(run)) if steps(run) else None


def set_aside(run: Path, newer_than: int) -> None:
    """Moves newer, unsound checkpoints aside, as the run will write these steps again."""
    for step in steps(run):
        if step > newer_than:
            damaged = run / FOLDER / f"{_DAMAGED}{step}"
            shutil.rmtree(damaged, ignore_errors=True)
            damaged = spare(damaged)
            (run / FOLDER / str(step)).rename(damaged)
            logger.warning("the damaged checkpoint is kept as %s", damaged)


def is_run(folder: Path) -> bool:
    """Whether this is a run folder with checkpoints."""
    return (folder / "config.yaml").is_file() and bool(steps(folder))


def read_meta(run: Path, step: int) -> Meta:
    """The metadata of a step's checkpoint.

    Raises:
        CheckpointError: it is damaged, or from another version of this package or another step.
    """
    folder = run / FOLDER / str(step)
    seals.verify(folder, META)
    try:
        meta = Meta(**json.loads((folder / META).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise errors.CheckpointError(
            f"{folder / META} was not written by this version of flax_asr: {error}"
        ) from error
    if meta.step != step:
        raise errors.CheckpointError(f"{folder} is the checkpoint of step {meta.step}, renamed")
    return meta


def meta_config(meta: Meta) -> config.Config:
    """The configuration that a checkpoint was made with."""
    return config.build(meta.run)


def check_vocabulary(meta: Meta, ours: vocabularies.Vocabulary) -> None:
    """Raises `CheckpointError` if a checkpoint has other symbols than `ours`."""
    theirs = vocabularies.Vocabulary.from_json(meta.vocabulary)
    if theirs != ours:
        only_there = "".join(sorted(set(theirs.characters) - set(ours.characters)))
        only_here = "".join(sorted(set(ours.characters) - set(theirs.characters)))
        raise errors.CheckpointError(
            f"the checkpoint of step {meta.step} has another vocabulary ({theirs.size} symbols,"
            f" here {ours.size}; only there: {only_there!r}, only here: {only_here!r}). The data,"
            " their normalisation or the file of text.vocabulary have changed: put the old ones"
            " back, or use another --output_dir, or --restart."
        )


def is_sound(run: Path, step: int) -> bool:
    """Whether a checkpoint matches its seal."""
    try:
        seals.verify(run / FOLDER / str(step))
    except errors.CheckpointError:
        return False
    return True


def first_sound(run: Path, candidates: list[int]) -> int:
    """The first of these steps whose checkpoint is sound.

    Raises:
        CheckpointError: none of them is sound, or there are none.
    """
    problems = []
    for step in candidates:
        try:
            seals.verify(run / FOLDER / str(step))
            read_meta(run, step)
        except errors.CheckpointError as error:
            problems.append(str(error))
            logger.warning("the checkpoint of step %d is not used: %s", step, error)
        else:
            return step
    if problems:
        raise errors.CheckpointError(
            f"no checkpoint in {run / FOLDER} is sound: {'; '.join(problems)}. Begin again with"
            " --restart, or restore the folder from a copy."
        )
    raise errors.CheckpointError(f"there is no checkpoint in {run / FOLDER}.")


def score(meta: Meta) -> float | None:
    """The score that chooses the best checkpoint; None if the step was not scored."""
    name = f"eval_{meta.run['train']['metric_for_best_model']}"
    if name in meta.metrics and math.isfinite(meta.metrics[name]):
        return meta.metrics[name]
    return None


def scores(run: Path) -> dict[int, float | None]:
    """The score of every step whose metadata can be read."""
    found = {}
    for step in steps(run):
        with contextlib.suppress(errors.CheckpointError):
            found[step] = score(read_meta(run, step))
    return found


def by_merit(scores: Mapping[int, float | None]) -> list[int]:
    """Scored steps, best first and the earliest first if equal; then the others, newest first."""
    scored = sorted((value, step) for step, value in scores.items() if value is not None)
    others = sorted((step for step, value in scores.items() if value is None), reverse=True)
    return [step for _, step in scored] + others


def superfluous(saved: Collection[int], scores: Mapping[int, float | None], keep: int) -> list[int]:
    """The steps that are neither among the latest `keep` nor the best one."""
    kept = {*sorted(saved, reverse=True)[:keep], *by_merit(scores)[:1]}
    return [step for step in saved if step not in kept]

"""The end of a run: its best checkpoint, and the export, curves and card made from it."""

import logging
from pathlib import Path

from flax_asr import card, checkpoint, config, errors, export, run_folder
from flax_asr.bucket import mirror
from flax_asr.hosts import multihost
from flax_asr.record import curves, runlog

logger = logging.getLogger(__name__)


def best(folder: Path, hosts: multihost.Hosts, mirrored: mirror.Mirrored) -> checkpoint.SavedModel:
    """The best checkpoint, chosen by the first host."""
    if hosts.is_first:
        saved = checkpoint.load_model(folder)
        if hosts.count > 1:
            mirrored.wait()
        hosts.gather(saved.step)
        return saved
    step = hosts.gather(None)[0]
    mirrored.bring(step)
    return checkpoint.load_model(folder, step)


def write(folder: Path, saved: checkpoint.SavedModel, cfg: config.Config, updates: int) -> None:
    """Writes export, curves and card, and marks the run as finished.

    Raises:
        CheckpointError: one of them cannot be written.
    """
    described = card.render(folder.name, saved, runlog.read(folder), is_export=True)
    exported = folder / run_folder.EXPORT
    done = export.write_folder(exported, saved, cfg, saved.meta.facts, described)
    logger.info("%s: %s", exported, done)
    try:
        curves.draw(folder)
        card.write(folder, saved)
        run_folder.mark_finished(folder, updates)
    except OSError as error:
        raise errors.CheckpointError(
            f"cannot write in {folder}: {errors.why(error)}. Make room or fix the folder,"
            " then run the same command again: it finishes from the checkpoints."
        ) from error

"""The checkpoint that a run resumes from, the same on every host."""

from pathlib import Path

from flax_asr import config, errors, inventory, run_folder
from flax_asr.bucket import mirror, store
from flax_asr.hosts import multihost


def point(
    hosts: multihost.Hosts,
    folder: Path,
    cfg: config.Config,
    restart: bool,
    mirrored: mirror.Mirrored,
) -> inventory.Meta | None:
    """The checkpoint that all hosts resume from, chosen by the first one; None for a fresh run.

    Raises:
        CheckpointError: this host does not see the first one's folder.
    """
    if hosts.count == 1:
        return run_folder.resume_point(folder, cfg, restart)
    if not hosts.share(folder) and not store.is_remote(cfg.output_dir):
        raise errors.CheckpointError(
            f"output_dir {folder} is not that of the first host: the checkpoints must be on a disk"
            " that all hosts see, or in a bucket."
        )

    def look() -> int | None:
        past = run_folder.resume_point(folder, cfg, restart)
        mirrored.wait()  # the other hosts read it there
        return None if past is None else past.step

    step = hosts.decided(look)
    mirrored.bring(step)
    return None if step is None else inventory.read_meta(folder, step)

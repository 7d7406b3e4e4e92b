"""Finds a model: a local folder, or the files needed from the Hugging Face hub."""

import os
from pathlib import Path

from flax_asr import errors
from flax_asr.models import weights


def _wanted(names: list[str], with_weights: bool) -> list[str]:
    """The files to download from a hub repository: no code, no folders, one format of weights."""
    top = [name for name in names if "/" not in name]
    wanted = [name for name in top if name.endswith(".json") or name == "vocab.txt"]
    for name in weights.FILES if with_weights else ():
        if name in top:
            stem, _, suffix = name.removesuffix(".index.json").rpartition(".")
            shards = (stem + "-", "." + suffix) if name.endswith(".index.json") else None
            wanted += [n for n in top if n == name or (shards and _is_shard(n, *shards))]
            break
    return wanted


def _is_shard(name: str, start: str, end: str) -> bool:
    return name.startswith(start) and name.endswith(end)


def _unreachable(name: str, why: str) -> errors.ModelError:
    return errors.ModelError(
        f"{name} is neither a folder here nor in the hub's cache, and the hub cannot be reached "
        f"({why}). Connect once, or run `hf download {name} --local-dir FOLDER` elsewhere and give "
        "that folder."
    )


def resolve(
    name: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    with_weights: bool = True,
) -> tuple[Path, str | None]:
    """The folder of a model and, if it is from the Hugging Face hub, its commit.

    A folder is taken as it is. A hub id is downloaded into the hub's cache: the JSON files and,
    with `with_weights`, the weights in one format, never code. If the hub cannot be reached, the
    cache is used.

    Raises:
        ModelError: `name` is no folder, and on the hub it is not found, gated or out of reach.
    """
    name = os.fspath(name)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder, None
    if folder.exists():
        raise errors.ModelError(f"{name} is a file: give the folder that holds the model.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise errors.ModelError(f"{name}: there is no such folder{errors.seen_from(folder)}.")

    import huggingface_hub
    from huggingface_hub import errors as hub

    why = "local files only"
    try:
        if not local_files_only:
            try:
                snapshot = _downloaded(name, revision, cache_dir, token, with_weights)
                return snapshot, snapshot.name
            # No connection, offline mode, the hub's own faults, a full disk.
            except (hub.HTTPError, OSError) as error:
                why = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        cached = huggingface_hub.try_to_load_from_cache(
            name, "config.json", cache_dir=cache_dir, revision=revision
        )
    except hub.HFValidationError as error:
        raise errors.ModelError(f"{name}: neither a folder here nor a hub id.") from error
    if not isinstance(cached, str):
        raise _unreachable(name, why)
    return Path(cached).parent, Path(cached).parent.name


def _downloaded(
    name: str,
    revision: str | None,
    cache_dir: str | os.PathLike | None,
    token: str | bool | None,
    with_weights: bool,
) -> Path:
    """The folder in the cache, after downloading what is missing.

    Raises:
        ModelError: the hub has no such model or revision, or denies access to it.
        HTTPError, OSError: the hub cannot be reached, or the disk cannot be written.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, token=token)
        names = [file.rfilename for file in info.siblings or ()]
        snapshot = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=_wanted(names, with_weights),
        )
    except hub.GatedRepoError as error:
        raise errors.ModelError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with"
            " `hf auth login` or set HF_TOKEN."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise errors.ModelError(
            f"{name}: neither a folder here nor a model on the Hugging Face hub. (A private one"
            " needs `hf auth login` or HF_TOKEN.)"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise errors.ModelError(f"{name} has no revision {revision!r}.") from error
    return Path(snapshot)

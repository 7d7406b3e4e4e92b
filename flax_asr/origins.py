"""The origin of a model's weights, and what is stored with them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Wav2Vec2Config

from flax_asr import audio, config, errors, inventory, json_object, run_folder, vocabulary
from flax_asr.bucket import copies, store
from flax_asr.models import configuration, hub
from flax_asr.record import lineage


@dataclass(frozen=True)
class Origin:
    """The origin of a model's weights.

    Attributes:
        model_config: the model's configuration, with this run's overrides.
        folder: the folder of the weights, None for random ones.
        vocabulary: the symbols of its head, None if it has no head.
        do_normalize: whether clips are normalised to zero mean and unit variance.
        use_attention_mask: whether the model gets an attention mask.
        facts: facts for the card.
    """

    model_config: Wav2Vec2Config
    folder: Path | None
    vocabulary: vocabulary.Vocabulary | None
    do_normalize: bool
    use_attention_mask: bool
    facts: dict[str, Any]

    @property
    def is_checkpoint(self) -> bool:
        """Whether the run resumes from a checkpoint, which holds the whole state."""
        return self.folder is None and self.vocabulary is not None

    def sized(self, symbols: vocabulary.Vocabulary) -> "Origin":
        """The origin with a head for these symbols."""
        sizes = {"vocab_size": symbols.size, "pad_token_id": symbols.blank}
        wanted = Wav2Vec2Config(**(self.model_config.to_dict() | sizes))
        return dataclasses.replace(self, model_config=wanted)


def read(model: config.ModelConfig) -> Origin:
    """Reads configuration, vocabulary and settings of a pretrained folder, run or hub model.

    With `reset_head` the vocabulary need not be readable; it may be one of phonemes, for example.

    Raises:
        ConfigError: an override is not a field of the model's configuration.
        ModelError: the model cannot be read, or has another sampling rate.
    """
    if model.pretrained is None:
        model_config = Wav2Vec2Config()
        folder = revision = None
    else:
        folder, revision = _pretrained_folder(model.pretrained)
        model_config = configuration.read(folder)
    configuration.override(model_config, overrides(model))
    facts = {
        "started_from": model.pretrained,
        "revision": revision,
        "lineage": lineage.behind(folder) if folder is not None else [],
    }
    if folder is not None:
        _check_sampling_rate(folder)
    return _described(model_config, folder, facts, _vocabulary(folder, model.reset_head))


def _vocabulary(folder: Path | None, head_goes: bool) -> vocabulary.Vocabulary | None:
    if folder is None or not (folder / "vocab.json").is_file():
        return None
    try:
        return vocabulary.Vocabulary.from_folder(folder)
    except errors.ModelError as error:
        if head_goes:
            return None
        raise errors.ModelError(
            f"{error}. To train a fresh head on this encoder, set model.reset_head true"
        ) from error


def _check_sampling_rate(folder: Path) -> None:
    path, settings = preprocessor(folder)
    if settings.get("sampling_rate", audio.SAMPLE_RATE_HZ) != audio.SAMPLE_RATE_HZ:
        raise errors.ModelError(
            f"{path}: the model takes audio at {settings['sampling_rate']} Hz; only"
            f" {audio.SAMPLE_RATE_HZ} Hz is supported."
        )


def symbols(place: str) -> vocabulary.Vocabulary:
    """The vocabulary that `text.vocabulary` names: a vocab.json, or that of a model.

    Raises:
        ModelError: there is none.
    """
    if place.endswith(".json") or Path(place).is_file():
        return vocabulary.Vocabulary.from_folder(place)
    return vocabulary.Vocabulary.from_folder(_pretrained_folder(place, with_weights=False)[0])


def _pretrained_folder(name: str, with_weights: bool = True) -> tuple[Path, str | None]:
    """A model's folder and its commit on the hub; of a run, its export."""
    if store.is_remote(name):
        name = str(copies.pretrained(name))
    run = Path(name)
    if run.parent.name == inventory.FOLDER and inventory.is_run(run.parent.parent):
        raise errors.ModelError(
            f"{run} is a checkpoint: export it first with `flax-asr export {run.parent.parent}"
            f" FOLDER --step {run.name}` and give model.pretrained that folder."
        )
    if not inventory.is_run(run):
        return hub.resolve(name, with_weights=with_weights)
    export = run / run_folder.EXPORT
    if not (export / "config.json").is_file():
        raise errors.ModelError(
            f"{run} is a run that has not finished: export it first with"
            f" `flax-asr export {run} FOLDER` and give model.pretrained that folder."
        )
    return export, None


def resumed(meta: inventory.Meta) -> Origin:
    """The origin that is stored in a checkpoint."""
    return Origin(
        model_config=Wav2Vec2Config(**meta.model_config),
        folder=None,
        vocabulary=vocabulary.Vocabulary.from_json(meta.vocabulary),
        do_normalize=meta.do_normalize,
        use_attention_mask=meta.use_attention_mask,
        facts={
            name: meta.facts[name]
            for name in ("started_from", "revision", "lineage", "head")
            if name in meta.facts
        },
    )


def overrides(model: config.ModelConfig) -> dict[str, Any]:
    """Fields of the model's configuration that a run sets."""
    return {"ctc_loss_reduction": "mean", **model.config}


def _described(
    model_config: Wav2Vec2Config,
    folder: Path | None,
    facts: dict,
    symbols: vocabulary.Vocabulary | None,
) -> Origin:
    settings: dict[str, Any] = {"do_normalize": True, "return_attention_mask": None}
    if folder is not None:
        settings |= preprocessor(folder)[1]
    return Origin(
        model_config=model_config,
        folder=folder,
        vocabulary=symbols,
        do_normalize=bool(settings["do_normalize"]),
        use_attention_mask=(
            model_config.feat_extract_norm == "layer"
            if settings["return_attention_mask"] is None
            else bool(settings["return_attention_mask"])
        ),
        facts=facts,
    )


def preprocessor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The settings of a folder's feature extractor, if any, and their file.

    If both files exist, the newer form counts. Source: transformers 5,
    FeatureExtractionMixin.get_feature_extractor_dict.
    """
    # transformers 5 writes this file instead of the other.
    file = folder / "processor_config.json"
    nested = (json_object.read(file) or {}).get("feature_extractor")
    if isinstance(nested, dict):
        return file, nested
    file = folder / "preprocessor_config.json"
    return file, json_object.read(file) or {}

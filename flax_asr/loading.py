"""Loads what `--model` names: a model that can be run, and the facts stored with it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import PyTree
from transformers import Wav2Vec2Config

from flax_asr import (
    checkpoint,
    config,
    criterion,
    errors,
    experiment,
    inventory,
    origins,
    text,
    vocabulary,
)
from flax_asr.bucket import copies, store
from flax_asr.models import configuration, convert, pretrained, wav2vec2, weights
from flax_asr.record import lineage


@dataclass(frozen=True)
class LoadedModel:
    """A model with its head, on the host.

    Attributes:
        config: the model's configuration.
        params: nested numpy arrays.
        vocabulary: the symbols of the head.
        do_normalize: whether clips are normalised to zero mean and unit variance.
        use_attention_mask: whether the model gets an attention mask.
        settings: options of its run, nested, as far as they are stored with the model.
        facts: data and origin for reports, as far as they are known.
        name: the name that the user gave.
        revision: the commit of a hub model.
        run: the run folder that it comes from, if that is on this machine.
        step: the step of the checkpoint, if one was named instead of the best one.
    """

    config: Wav2Vec2Config
    params: PyTree
    vocabulary: vocabulary.Vocabulary
    do_normalize: bool
    use_attention_mask: bool
    settings: dict[str, Any]
    facts: dict[str, Any]
    name: str
    revision: str | None = None
    run: Path | None = None
    step: int | None = None

    @property
    def ignores_padding(self) -> bool:
        """Whether padding does not change the logits of real frames.

        Group norm includes padding in its statistics, and without an attention mask every frame
        attends to padding.
        """
        return self.use_attention_mask and self.config.feat_extract_norm == "layer"

    def writes_by(self, normalizer: text.Normalizer) -> bool:
        """Whether it was trained on transcripts normalised like this, as far as is known."""
        own = self.settings.get("text", {}).get("normalization")
        return own is not None and text.normalizer(own).steps == normalizer.steps

    def objective(self, mixed_precision: str) -> criterion.Objective:
        """The model as `step.evaluate` takes it."""
        return criterion.Objective(
            module=wav2vec2.Wav2Vec2ForCTCModule(
                self.config, dtype=experiment.DTYPES[mixed_precision]
            ),
            config=self.config,
            do_normalize=self.do_normalize,
            use_attention_mask=self.use_attention_mask,
        )


def load(model: str) -> LoadedModel:
    """Loads a run (its best checkpoint), `RUN/checkpoints/STEP`, an export, or any wav2vec2-CTC
    folder or model of the Hugging Face hub.

    Raises:
        ModelError, CheckpointError: it is none of these, or damaged, or has no head.
    """
    folder = copies.model(model) if store.is_remote(model) else Path(os.path.expanduser(model))
    if inventory.is_run(folder):
        return _from_checkpoint(model, folder, None)
    if folder.name.isdecimal() and folder.parent.name == inventory.FOLDER:
        return _from_checkpoint(model, folder.parent.parent, int(folder.name))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise errors.ModelError(
            f"{model} is not a model: it has neither config.json, as a Hugging Face folder has, nor"
            f" config.yaml and {inventory.FOLDER}/, as a run has."
        )
    return _from_hugging_face(model, str(folder) if store.is_remote(model) else model)


def configure(loaded: LoadedModel, overrides: Sequence[str]) -> config.Config:
    """The configuration stored with the model, with the user's options on top.

    Raises:
        ConfigError: an option does not exist, or its value is wrong.
    """
    return config.build(loaded.settings, overrides)


def overflow(mixed_precision: str) -> str:
    """What is said where a model's scores are no numbers: why, or what to do."""
    why = "the weights are damaged or their training went wrong"
    if mixed_precision == "fp16":
        why = "give --train.mixed_precision bf16 or fp32"
    return f"the scores in {mixed_precision} are NaN: {why}"


def _from_checkpoint(model: str, run: Path, step_number: int | None) -> LoadedModel:
    saved = checkpoint.load_model(run, step_number)
    settings = dict(saved.meta.run)
    # The folder may have been moved since.
    remote = store.is_remote(model)
    settings["output_dir"] = model.partition(f"/{inventory.FOLDER}/")[0] if remote else str(run)
    settings["text"] = settings["text"] | {"normalization": saved.normalization}
    return LoadedModel(
        config=saved.model_config,
        params=saved.params,
        vocabulary=saved.vocabulary,
        do_normalize=saved.meta.do_normalize,
        use_attention_mask=saved.meta.use_attention_mask,
        settings=settings,
        facts=saved.meta.facts | {"step": saved.step},
        name=model,
        run=None if remote else run,
        step=step_number,
    )


def _from_hugging_face(model: str, place: str) -> LoadedModel:
    origin = origins.read(config.ModelConfig(pretrained=place))
    with errors.in_model(model):
        wav2vec2.check(origin.model_config)
    tensors = weights.read(origin.folder)
    if not convert.has_head(tensors):
        raise errors.ModelError(
            f"{model} has no CTC head: it is an encoder that outputs no text yet. Train it, with"
            f" --model.pretrained {model}, or name a wav2vec2 model with a CTC head."
        )
    if origin.vocabulary is None:
        raise errors.ModelError(
            f"{model} has no vocab.json, which says what the symbols of its CTC head are: put the"
            " tokenizer's files (vocab.json, tokenizer_config.json) of the model that it comes"
            " from beside its weights."
        )
    if origin.model_config.vocab_size != origin.vocabulary.size:
        raise errors.ModelError(
            f"{model}: by config.json the head has {origin.model_config.vocab_size} symbols, but"
            f" vocab.json {origin.vocabulary.size} with all that the tokenizer adds: the files do"
            " not belong together."
        )
    params = pretrained.from_tensors(tensors, origin.model_config, model, head=True)
    facts = _read_facts(origin.folder)
    settings: dict[str, Any] = {
        "output_dir": str(_place(place, origin.folder)),
        # PyTorch's default.
        "train": {"mixed_precision": "fp32"},
    }
    if facts:
        # The loss that its run minimised; the default is the mean.
        stored = configuration.read(origin.folder).ctc_loss_reduction
        origin.model_config.ctc_loss_reduction = stored
        settings["data"] = {"language": facts["language"]}
        settings["text"] = {"normalization": facts["normalization"]}
    return LoadedModel(
        config=origin.model_config,
        params=params,
        vocabulary=origin.vocabulary,
        do_normalize=origin.do_normalize,
        use_attention_mask=origin.use_attention_mask,
        settings=settings,
        facts=facts or dict(origin.facts),
        name=model,
        revision=origin.facts["revision"],
    )


def _place(model: str, folder: Path) -> Path:
    """The path beside which data is prepared: run, model folder, or (hub) current folder."""
    if not os.path.isdir(os.path.expanduser(model)):
        return Path(model.replace("/", "--"))
    whole = folder.absolute()
    return whole.parent if inventory.is_run(whole.parent) else whole


def _read_facts(folder: Path) -> dict[str, Any]:
    facts = lineage.read(folder)
    if not facts:
        return {}
    missing = {"language", "normalization"} - facts.keys()
    if missing:
        raise errors.ModelError(
            f"{folder / lineage.FILE} lacks {' and '.join(sorted(missing))}: export again."
        )
    return facts

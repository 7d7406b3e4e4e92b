"""Run folders as a run leaves them, but with bytes in the place of arrays."""

import dataclasses
import json

from flax_asr import config, inventory, run_folder, seals, vocabulary
from flax_asr.record import runlog

VOCABULARY = vocabulary.Vocabulary(
    ("[PAD]", "[UNK]", "|", *"abc"), blank=0, unknown=1, delimiter="|"
)
SPLITS = {
    "train": {"release": "cv-corpus-9", "hash": "ab" * 32, "clips": 7, "seconds": 21.5},
    "eval": {"release": "cv-corpus-9", "hash": "cd" * 32, "clips": 3, "seconds": 9.0},
}


def configuration(folder, **sections) -> config.Config:
    """Of a run in this folder; keyword arguments are the sections, as mappings."""
    values = {
        "output_dir": str(folder),
        "data": {"source": "/data/cv", "language": "cy"},
        "train": {"global_batch_size": 8, "per_device_train_batch_size": 4, "max_steps": 6},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return config.build(values)


def meta(cfg: config.Config, step: int, **changes) -> inventory.Meta:
    made = inventory.Meta(
        step=step,
        run=config.as_dict(cfg),
        model_config={},
        vocabulary=VOCABULARY.to_json(),
        normalization=["lower"],
        do_normalize=True,
        use_attention_mask=True,
        group_rows=8,
        facts={"updates": cfg.train.max_steps, "splits": SPLITS},
        metrics={},
        window={},
    )
    return dataclasses.replace(made, **changes)


def save(folder, cfg: config.Config, step: int, **changes) -> None:
    """A sealed checkpoint of `step`."""
    saved = folder / inventory.FOLDER / str(step)
    (saved / inventory.STATE).mkdir(parents=True)
    (saved / inventory.STATE / "arrays").write_bytes(bytes(range(100)))
    content = dataclasses.asdict(meta(cfg, step, **changes))
    (saved / inventory.META).write_text(json.dumps(content), encoding="utf-8")
    seals.write(saved)


def run(folder, cfg: config.Config, steps=(2, 4), finished: bool = False) -> config.Config:
    """A whole run folder; gives the configuration back."""
    folder.mkdir(exist_ok=True)
    run_folder.record(folder, cfg)
    for step in steps:
        save(folder, cfg, step)
    if finished:
        (folder / run_folder.EXPORT).mkdir()
        (folder / run_folder.EXPORT / "config.json").write_text("{}")
        (folder / run_folder.CARD).write_text("# card\n")
        (folder / runlog.FILE).write_text(json.dumps({"step": max(steps), "loss": 1.0}) + "\n")
        run_folder.mark_finished(folder, max(steps))
    return cfg

"""The quick start's run in ours and in a plain PyTorch loop: the same weights, clips and updates.

    python benchmarks/same_run.py [--updates 50] [--mixed-precision bf16] [--json FILE]

What `flax-asr train --config configs/quickstart.yaml` executes, without dropout and with four
micro-batches of four clips an update, beside transformers' `Wav2Vec2ForCTC`, torch's AdamW and
clipping, and transformers' linear schedule, on the same batches (with --mixed-precision bf16 under
autocast). It prints the losses of both, how far they are from each other at the most, and the
parameters that are furthest.
"""

import argparse
import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"

import flax.traverse_util
import jax
import numpy as np
import sidebyside
import torch
import torch_step
import train_step
import transformers

from flax_asr import assembly, config, parallel, step
from flax_asr.data import loader
from flax_asr.models import convert

ROOT = pathlib.Path(__file__).parents[1]
# A key's bias changes no attention weight: its gradient is rounding, which Adam scales up.
WITHOUT_GRADIENT = ("k_proj/bias", "masked_spec_embed")


def configuration(folder: str, updates: int, precision: str) -> config.Config:
    quiet = [f"--model.config.{name}={value}" for name, value in train_step.QUIET.items()]
    options = {
        "output_dir": folder,
        "data.source": ROOT / "configs/quickstart/corpus",
        "model.pretrained": ROOT / "configs/quickstart/encoder",
        "optim.warmup_steps": updates // 5,
        "train.max_steps": updates,
        "train.per_device_train_batch_size": 4,
        "train.mixed_precision": precision,
    }
    named = [f"--{name}={value}" for name, value in options.items()]
    return config.load(ROOT / "configs/quickstart.yaml", [*named, *quiet])


class Loop:
    """PyTorch's side, from the parameters of ours."""

    def __init__(self, made: assembly.Assembly, params):
        self.made, cfg = made, made.cfg
        self.model = transformers.Wav2Vec2ForCTC(made.start.model_config)
        tensors = convert.torch_from_params(params, made.start.model_config)
        weights = {name: torch.tensor(np.array(value)) for name, value in tensors.items()}
        self.model.load_state_dict(weights, strict=True)
        self.model.freeze_feature_encoder()
        self.model.train()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._adamw = torch.optim.AdamW(
            self._trained, lr=cfg.optim.learning_rate, weight_decay=cfg.optim.weight_decay
        )
        self._schedule = transformers.get_linear_schedule_with_warmup(
            self._adamw, cfg.optim.warmup_steps, cfg.train.max_steps
        )

    def update(self, groups) -> float:
        """One update; the mean loss of its clips."""
        cfg = self.made.cfg
        clips = sum(batch.weights.sum() for batch, _ in groups)
        total = 0.0
        for batch, _ in groups:
            real = batch.weights > 0
            own = loader.Batch(*(column[real] for column in batch))
            with torch.autocast("cpu", torch.bfloat16, enabled=cfg.train.mixed_precision == "bf16"):
                loss = self.model(**torch_step.inputs(own)).loss * float(real.sum() / clips)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._trained, cfg.optim.max_grad_norm)
        self._adamw.step()
        self._schedule.step()
        self._adamw.zero_grad()
        return total

    def params(self) -> dict[str, np.ndarray]:
        tensors = {name: value.numpy() for name, value in self.model.state_dict().items()}
        tree = convert.params_from_torch(tensors, self.model.config, head=True)
        return step.flat(tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--mixed-precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--json", metavar="FILE", help="also write one object an update there")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = configuration(folder, arguments.updates, arguments.mixed_precision)
        devices = parallel.Devices(jax.devices()[:1])
        made = assembly.Assembly(cfg, devices, None)
        programs = made.compile()
        state = made.initial_state()
        sums = devices.zero_sums(state.trainable)
        flat = jax.device_get({**state.trainable, **state.frozen})
        theirs = Loop(made, flax.traverse_util.unflatten_dict(flat, sep="/"))
        tokens = made.train_shapes.tokens
        with loader.updates(made.corpus.train, made.plan, 0, 0, 1, tokens=tokens) as batches:
            print("update     ours  PyTorch")
            for number, groups in batches:
                for batch, _ in groups:
                    program = programs["accumulate", batch.audio.shape[1]]
                    for micro in devices.micro_batches(batch, 4):
                        sums = program(state, sums, micro)
                state, sums, metrics = programs["update", 0](state, sums)
                losses = float(metrics.loss), theirs.update(groups)
                rows.append({"update": number + 1, "ours": losses[0], "pytorch": losses[1]})
                if (number + 1) % max(1, arguments.updates // 10) == 0:
                    print(f"{number + 1:6d} {losses[0]:8.4f} {losses[1]:8.4f}", flush=True)
                if number + 1 == arguments.updates:
                    break
    ours, expected = jax.device_get({**state.trainable, **state.frozen}), theirs.params()
    compared = [path for path in ours if not path.endswith(WITHOUT_GRADIENT)]
    away, furthest = max(
        (float(np.abs(ours[path] - expected[path]).max()), path) for path in compared
    )
    relative = max(abs(row["ours"] / row["pytorch"] - 1) for row in rows)
    print(
        f"losses differ by {relative:.1e} of themselves at the most, parameters by"
        f" {away:.1e} ({furthest})"
    )
    differences = {"largest_relative_loss": relative, "largest_parameter": away}
    sidebyside.write_json(arguments.json, [*rows, differences])


if __name__ == "__main__":
    main()

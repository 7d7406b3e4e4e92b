"""The hyperparameters of a run, under the names in the Trainer's cards."""

import dataclasses
from typing import Any

from flax_asr import config, inventory


def describe(meta: inventory.Meta, cfg: config.Config) -> dict[str, Any]:
    """Names and values, in the order of those cards."""
    train, optim = cfg.train, cfg.optim
    devices = max(1, meta.group_rows // train.per_device_train_batch_size)
    accumulation = train.global_batch_size // meta.group_rows
    found: dict[str, Any] = {
        "learning_rate": optim.learning_rate,
        **({"head_learning_rate": optim.head_learning_rate} if optim.head_learning_rate else {}),
        "train_batch_size": train.per_device_train_batch_size,
        "eval_batch_size": train.per_device_eval_batch_size,
        "seed": cfg.seed,
    }
    if devices > 1:
        found |= {"distributed_type": "multi-device", "num_devices": devices}
    if accumulation > 1:
        found["gradient_accumulation_steps"] = accumulation
    found["total_train_batch_size"] = train.global_batch_size
    if devices > 1:
        found["total_eval_batch_size"] = devices * train.per_device_eval_batch_size
    betas = f"({optim.adam_beta1},{optim.adam_beta2})"
    found["optimizer"] = f"Adam with betas={betas} and epsilon={optim.adam_epsilon}"
    if optim.weight_decay:
        found["weight_decay"] = optim.weight_decay
    found["lr_scheduler_type"] = optim.lr_scheduler_type
    if optim.warmup_fraction is None:
        found["lr_scheduler_warmup_steps"] = optim.warmup_steps
    else:
        found["lr_scheduler_warmup_ratio"] = optim.warmup_fraction
    if optim.hold_fraction:
        found["lr_scheduler_hold_ratio"] = optim.hold_fraction
    augment = {
        name: bounds
        for name, bounds in dataclasses.asdict(cfg.data.augment).items()
        if bounds is not None
    }
    if augment:
        found["augmentation"] = ", ".join(
            f"{name} {low:g} to {high:g}" for name, (low, high) in augment.items()
        )
    if cfg.model.freeze_encoder_steps:
        found["freeze_encoder_steps"] = cfg.model.freeze_encoder_steps
    if train.max_steps is not None:
        found["training_steps"] = train.max_steps
    else:
        found["num_epochs"] = float(train.num_train_epochs)
    if train.mixed_precision != "fp32":
        found["mixed_precision_training"] = train.mixed_precision
    return found

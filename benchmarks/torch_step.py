"""PyTorch's way of the same train step: transformers' model in a plain loop.

SDPA attention, clipping and the fused AdamW, as transformers' Trainer does it.
"""

from typing import Any

import numpy as np
import torch
import transformers

from flax_asr import config
from flax_asr.data import loader
from flax_asr.models import convert


class PyTorch:
    """transformers' model in a plain loop.

    Attributes:
        model: in training mode.
        device: where it is.
    """

    def __init__(self, cfg: config.Config, model: transformers.Wav2Vec2Config, device: str = "cpu"):
        torch.manual_seed(0)
        self.device = device
        self.model = transformers.Wav2Vec2ForCTC._from_config(model, attn_implementation="sdpa").to(
            device
        )
        if cfg.model.freeze_feature_encoder:
            self.model.freeze_feature_encoder()
        self.model.train()
        self._bf16 = cfg.train.mixed_precision == "bf16"
        self._max_grad_norm = cfg.optim.max_grad_norm
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(
            self._trained,
            lr=cfg.optim.learning_rate,
            betas=(cfg.optim.adam_beta1, cfg.optim.adam_beta2),
            eps=cfg.optim.adam_epsilon,
            weight_decay=cfg.optim.weight_decay,
            fused=True,
        )

    def params(self) -> Any:
        """The weights as ours."""
        tensors = {
            name: value.detach().cpu().numpy().copy()
            for name, value in self.model.state_dict().items()
        }
        return convert.params_from_torch(tensors, self.model.config, head=True)

    def start(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Starts one update with what `inputs` gave; gives its loss when it is there."""
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self._bf16):
            loss = self.model(**inputs).loss
        loss.backward()
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def update(self, host_batch: loader.Batch) -> float:
        """One update from beginning to end; its loss."""
        return float(self.start(inputs(host_batch)))


def inputs(host_batch: loader.Batch) -> dict[str, torch.Tensor]:
    """As the feature extractor and the collator of the Hugging Face example make them."""
    real = np.arange(host_batch.audio.shape[1]) < host_batch.sample_lengths[:, None]
    waves = host_batch.audio * host_batch.gains[:, None]
    count = host_batch.sample_lengths[:, None]
    mean = np.sum(waves, axis=1, keepdims=True, where=real) / count
    centred = np.where(real, waves - mean, 0)
    variance = np.sum(np.square(centred), axis=1, keepdims=True) / count
    inputs = (centred / np.sqrt(variance + 1e-7)).astype(np.float32)
    tokens = host_batch.labels.shape[1]
    padding = np.arange(tokens) >= host_batch.label_lengths[:, None]
    labels = np.where(padding, -100, host_batch.labels).astype(np.int64)
    arrays = {"input_values": inputs, "attention_mask": real.astype(np.int64), "labels": labels}
    return {name: torch.from_numpy(value) for name, value in arrays.items()}

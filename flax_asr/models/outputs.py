"""Outputs of the model classes: values by name and by index, and jax pytrees."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax
from jaxtyping import Array, Float


class Output(Mapping):
    """A result with named values, as transformers' ModelOutput was.

    Values that are None do not count: they are not found by index, by name or in `to_tuple()`.
    """

    def _present(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self._present().values())

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())


@flax.struct.dataclass
class FlaxCausalLMOutput(Output):
    """What FlaxWav2Vec2ForCTC returns; the last two only when asked for."""

    logits: Float[Array, "batch frames vocab"] = None
    hidden_states: tuple[Float[Array, "batch frames hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads frames frames"], ...] | None = None


@flax.struct.dataclass
class FlaxWav2Vec2BaseModelOutput(Output):
    """What FlaxWav2Vec2Model returns; the last two only when asked for."""

    last_hidden_state: Float[Array, "batch frames hidden"] = None
    extract_features: Float[Array, "batch frames channels"] = None
    hidden_states: tuple[Float[Array, "batch frames hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads frames frames"], ...] | None = None

"""How long a prompt a model can take, and for how long a one it was made: `max_position_embeddings`."""

from __future__ import annotations

from transformers import PreTrainedConfig


def check_positions(max_tokens: int, architecture: PreTrainedConfig) -> None:
    """ValueError where a prompt of so many tokens would reach beyond a table of positions, as models without rotary
    embeddings have it: it is an IndexError in the first long prompt's forward pass.
    """
    positions = _positions(architecture)
    if positions is not None and max_tokens > positions and not _rotary(architecture):
        raise ValueError(
            f"tasks.max_tokens: {max_tokens}: a model of type {architecture.model_type!r} has a table of {positions} "
            f"positions and takes no longer prompt; set it to {positions} at most, or choose another model"
        )


def beyond_positions(tokens: int, architecture: PreTrainedConfig) -> str:
    """A sentence where rotary embeddings go on beyond what they were trained on, else an empty string."""
    positions = _positions(architecture)
    if positions is None or tokens <= positions or not _rotary(architecture):
        return ""
    return (
        f"prompts of {tokens} tokens are longer than the model was made for, {positions} (max_position_embeddings), "
        f"where its answers may be worth nothing; set tasks.max_tokens={positions}, or choose another model"
    )


def _positions(architecture: PreTrainedConfig) -> int | None:
    return getattr(architecture.get_text_config(), "max_position_embeddings", None)


def _rotary(architecture: PreTrainedConfig) -> bool:
    return getattr(architecture.get_text_config(), "rope_parameters", None) is not None

"""A configured model in memory: frozen, in its dtype, on its device, with its tokenizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available, logging

from abmll.config.schema import ModelConfig
from abmll.models.answers import check_supported
from abmll.models.architectures import architecture_config, byte_tokenizer, random_model
from abmll.models.packing import pack_prompts
from abmll.models.quantization import (
    bitsandbytes_config,
    check_quantization,
    keep_trainable,
    pack_shapes,
    quantize,
    weight_bytes,
)
from abmll.models.sharding import load_sharded
from abmll.models.source import Source, resolve


def load_model(config: ModelConfig, device: torch.device | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, frozen and in evaluation mode, and its tokenizer. ValueError, with the remedy, if it cannot be had.

    Where its attention can, it takes packed prompts (`packing.is_packed`).
    """
    device, source = torch.device(device), resolve(config)
    architecture, tokenizer = model_config(config), load_tokenizer(config)  # before the weights: errors cost less here
    dtype, attention = getattr(torch, config.dtype), attention_implementation(config, device, architecture)
    check_quantization(config, device)
    load = partial(_whole, config, source, architecture, dtype, attention)
    if config.sharding == "full":
        model = load_sharded(partial(load, torch.device("cpu")), architecture, device, dtype, attention)
    else:
        model = load(device)
    keep_trainable(model.requires_grad_(False).eval())
    check_supported(model)
    pack_prompts(model)
    return model, tokenizer


def _whole(
    config: ModelConfig,
    source: Source,
    architecture: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
) -> PreTrainedModel:
    """The model with all of its weights on one device."""
    with _model_errors(config, source), _quiet():
        if source.kind == "random":
            model = random_model(architecture, device, dtype, attention)
        else:
            model = _pretrained(config, source, architecture, device, dtype, attention)
        if config.quantization != "none" and source.kind in ("random", "gguf"):
            quantize(model, dtype)
        return model.to(device)


def _pretrained(
    config: ModelConfig,
    source: Source,
    architecture: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
) -> PreTrainedModel:
    """The model of a file, of a folder or from the hub; a GGUF file's is dense, and stays on the host if it is to be
    quantized.
    """
    quantized, gguf = config.quantization != "none", source.kind == "gguf"
    # with accelerate the weights go to the GPU as they are read; without it they pass through host memory. Either way
    # the GPU holds them once.
    direct = device.type != "cpu" and importlib.util.find_spec("accelerate") is not None and not (gguf and quantized)
    how = GgufConfig(dequantize=True) if gguf else bitsandbytes_config(dtype) if quantized else None
    return AutoModelForCausalLM.from_pretrained(
        **source.pretrained,
        revision=config.revision or "main",
        config=architecture,
        quantization_config=how,
        dtype=dtype,
        attn_implementation=attention,
        device_map={"": device} if direct or (quantized and not gguf) else None,
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone; that of random weights is one token a byte."""
    source = resolve(config)
    if source.kind == "random":
        return byte_tokenizer()
    if source.kind == "gguf":
        _require_gguf(config)
    with _model_errors(config, source), _quiet():
        return AutoTokenizer.from_pretrained(**source.pretrained, revision=config.revision or "main")


def model_config(config: ModelConfig) -> PreTrainedConfig:
    """The architecture alone, without weights: reads config.json or the GGUF file's header.

    Dropout and routers' jitter are off, because the only randomness of a run is the posterior's.
    """
    source = resolve(config)
    if source.kind == "random":
        architecture = architecture_config(source.location)
    else:
        if source.kind == "gguf":
            _require_gguf(config)
        with _model_errors(config, source):
            architecture = AutoConfig.from_pretrained(**source.pretrained, revision=config.revision or "main")
    text = architecture.get_text_config()
    for key, value in vars(text).items():
        if key.endswith(("dropout", "pdrop", "jitter_noise")) and isinstance(value, float):
            setattr(text, key, 0.0)
    return architecture


def parameter_count(architecture: PreTrainedConfig) -> int:
    """Number of the model's parameters, tied ones once; counted on the meta device, without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(architecture).parameters())


def describe(config: ModelConfig) -> str:
    """One line about the model, from its architecture alone: type, size, memory of its weights in GB (1e9 bytes)."""
    architecture, source = model_config(config), resolve(config)
    text, count = architecture.get_text_config(), parameter_count(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config.dtype))
    if config.quantization != "none":
        pack_shapes(model, getattr(torch, config.dtype))
    what = {"hub": "from the hub", "folder": "from a folder", "gguf": "from a GGUF file", "random": "random weights"}
    form = config.dtype if config.quantization == "none" else f"{config.quantization} and {config.dtype}"
    form += ", sharded over the ranks" if config.sharding == "full" else ""
    return (
        f"{config.name} ({what[source.kind]}): {architecture.model_type}, {text.num_hidden_layers} layers, "
        f"hidden size {text.hidden_size}, {count / 1e6:,.1f} M parameters, {weight_bytes(model) / 1e9:.2f} GB in {form}"
    )


def attention_implementation(config: ModelConfig, device: torch.device, architecture: PreTrainedConfig) -> str:
    """Transformers' name of the attention: `auto` takes the first of flash-attn, SDPA and eager code that can run."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(architecture), PreTrainedModel)
    obstacles = {}
    if device.type != "cuda":
        obstacles["flash_attention_2"] = f"it needs a CUDA device and this run is on {device.type}"
    elif config.dtype == "float32":
        obstacles["flash_attention_2"] = "it needs a 16-bit dtype: set model.dtype=bfloat16"
    elif not is_flash_attn_2_available():
        obstacles["flash_attention_2"] = "it is not installed: run: pip install flash-attn --no-build-isolation"
    elif not model_class._supports_flash_attn:
        obstacles["flash_attention_2"] = f"{model_class.__name__} does not support it"
    if not model_class._supports_sdpa:
        obstacles["sdpa"] = f"{model_class.__name__} does not support it"
    if config.attention == "auto":
        return next(name for name in ("flash_attention_2", "sdpa", "eager") if name not in obstacles)
    if config.attention in obstacles:
        raise ValueError(
            f"model.attention: {config.attention!r}: {obstacles[config.attention]}; or set model.attention=auto"
        )
    return config.attention


def _require_gguf(config: ModelConfig) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"model.name: {config.name!r}: reading a GGUF file needs {' and '.join(missing)}; "
            f"run: pip install {' '.join(missing)}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, one per load and rank; a download's own bar stays, because it may take minutes."""
    active, hub_active = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if hub_active:  # the line above turned the download's bar off too
        enable_progress_bars()
    try:
        yield
    finally:
        if active:
            logging.enable_progress_bar()


@contextmanager
def _model_errors(config: ModelConfig, source: Source) -> Iterator[None]:
    """Turns what transformers and the hub raise into one ValueError that names the key and the next command."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"model.name: {config.name!r}: {_remedy(config, source, error)} ({reason})") from error


def _remedy(config: ModelConfig, source: Source, error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it brings code of its own, which is never run; name a model whose architecture transformers itself has "
            "(remove `auto_map` from its config.json if it is one of these)"
        )
    if source.kind != "hub":
        return f"{source.location} cannot be loaded"
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"its access is gated; accept the terms at https://huggingface.co/{config.name}, then run: hf auth login"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"it has no revision {config.revision!r}; correct or remove model.revision"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "no such model on the hub; check the spelling, and for a private model run: hf auth login"
    if any(isinstance(cause, OSError) for cause in causes):
        return (
            f"it cannot be read from the hub; where there is a network, run: hf download {config.name}; "
            "without one, set HF_HUB_OFFLINE=1 to use what was downloaded before, or name a local folder"
        )
    return "it cannot be loaded"

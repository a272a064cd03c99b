"""Pretrained parts from a folder or the Hugging Face hub, and errors that say how to get them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas.errors import ConfigError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_READ_WEIGHTS: ContextVar[bool] = ContextVar("read_weights", default=True)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Within this context pretrained parts are built with random weights, from their sizes alone.

    For whoever loads all weights from a checkpoint right afterwards. A part's configuration and
    tokenizer are still read from its folder, so only large files need not be there.
    """
    token = _READ_WEIGHTS.set(False)
    try:
        yield
    finally:
        _READ_WEIGHTS.reset(token)


def weights_wanted() -> bool:
    """Whether pretrained weights are to be read."""
    return _READ_WEIGHTS.get()


def need(module: str, user: str, command: str) -> Any:
    """The imported `module`; raises `ConfigError` with the `command` that installs its package."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        lacking = str(error.name)
        if lacking.partition(".")[0] == package:
            raise ConfigError(f"{user} needs the package {package}: {command}") from error
        # Packages that are installed without their dependencies may lack one that matters.
        raise ConfigError(
            f"{user} needs the package {package}, which needs {lacking}: pip install {lacking}"
        ) from error


def transformers(user: str) -> Any:
    """The library, imported here and not before: it takes 2 s."""
    library = need("transformers", user, "pip install -e '.[vla]'")
    library.utils.logging.disable_progress_bar()
    return library


def locate(path: str | Path, key: str) -> str:
    """The folder that `path` names, or the name of a model on the hub as it is."""
    folder = Path(path).expanduser()
    if folder.exists():
        return str(folder)
    if Path(path).is_absolute() or str(path)[:1] in ("~", ".") or str(path).count("/") != 1:
        raise ConfigError(
            f"{key}={path} does not exist; give the folder that holds the model, or its name on "
            "the Hugging Face hub as OWNER/MODEL"
        )
    return str(path)


def missing(path: str, key: str, error: Exception) -> ConfigError:
    """What is raised where a model could not be read; `error` is the library's own."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(path).exists():
        return ConfigError(f"{key}={path} could not be read as a model: {said}")
    return ConfigError(
        f"{key}={path} is no folder here and could not be had from the Hugging Face hub ({said}). "
        f"Get it with: hf download {path} --local-dir FOLDER (after hf auth login, where its "
        f"licence has to be accepted first), and set {key}=FOLDER"
    )


def read_model(
    name: str, path: str | Path, key: str, dtype: torch.dtype, options: dict[str, Any], **build: Any
) -> Any:
    """The model of class `name` of transformers at `path`, in `dtype`.

    `options` replace values of its configuration, `build` goes to its constructor.
    """
    library, found = transformers(key), locate(path, key)
    model_class = getattr(library, name)
    try:
        # Not left to from_pretrained, which silently makes of another kind of model what it can.
        config = library.AutoConfig.from_pretrained(found)
        _check_kind(config, model_class.config_class, found, key)
        for option, value in options.items():
            setattr(config, option, value)
        if not weights_wanted():
            return model_class(config, **build).to(dtype)
        with _quiet(library):
            model, info = model_class.from_pretrained(
                found, config=config, dtype=dtype, output_loading_info=True, **build
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise missing(found, key, error) from error
    if absent := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{key}={path} lacks {len(absent)} of the model's weights, such as {absent[0]}; "
            "get the complete model"
        )
    return model


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without a table of the weights that are there and not needed; missing ones are an error."""
    logging = library.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_kind(config: Any, wanted: Any, path: str, key: str) -> None:
    if config.model_type != wanted.model_type:
        raise ConfigError(f"{key}={path} is a {config.model_type}; expected {wanted.model_type}")


def choose_dtype(dtype: str | None, key: str) -> torch.dtype:
    """The type of the weights; None is float32."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"{key}={dtype} is not known{nearest(str(dtype), DTYPES)}")
    return DTYPES[dtype or "float32"]


def choose_layers(layers: Any, depth: int, key: str) -> list[int]:
    """Layers counted from 0; negative ones from the end. Raises `ConfigError`."""
    wrong = [n for n in layers if not isinstance(n, int) or not -depth <= n < depth]
    if wrong or not layers:
        raise ConfigError(
            f"{key}={list(layers)} must name layers of 0 to {depth - 1}, or -{depth} to -1 from "
            "the end"
        )
    return [n % depth for n in layers]


def precision(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Any:
    """The context that a part with weights of `dtype` computes in.

    Weights in bfloat16 compute under autocast, which keeps sums that need it in float32. They are
    for parts that are not trained: most updates are smaller than what bfloat16 can tell apart.
    """
    if dtype == torch.float32:
        return contextlib.nullcontext()
    if module.training and any(p.requires_grad for p in module.parameters()):
        raise ConfigError(
            f"{type(module).__name__} has dtype={str(dtype).removeprefix('torch.')} and is trained; "
            "freeze it with an optim.lr_multipliers of 0, or keep float32 weights and set "
            "trainer.precision=bf16"
        )
    return torch.autocast(device.type, dtype=dtype)


def checkpoint_activations(model: Any) -> None:
    """Keep a block's input alone for the backward pass and compute the rest again."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5; the other goes with 6
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # A text model then asks for its inputs' gradients, for the sake of reentrant checkpoints: a
    # frozen one would be gone through backwards for nothing.
    with contextlib.suppress(AttributeError):  # where it has no such hook
        model.disable_input_require_grads()

"""Pretrained models from a folder or the Hugging Face hub, and errors that say how to get them."""

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
    """Build pretrained parts with random weights while in this context.

    For code that loads all weights from a checkpoint afterwards. A part's configuration and
    tokenizer are still read from its folder; only the files of weights may be missing.
    """
    token = _READ_WEIGHTS.set(False)
    try:
        yield
    finally:
        _READ_WEIGHTS.reset(token)


def weights_wanted() -> bool:
    """Return whether pretrained weights are to be read; see `without_weights`."""
    return _READ_WEIGHTS.get()


def require(module: str, user: str, command: str) -> Any:
    """Import and return `module`; raise `ConfigError` if it is not installed.

    `user`: what needs it; `command`: how to install its package, for the message.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = str(error.name)
        if absent.partition(".")[0] == package:
            raise ConfigError(f"{user} needs the package {package}: {command}") from error
        # A package that was installed with --no-deps may miss a dependency.
        raise ConfigError(
            f"{user} needs the package {package}, which needs {absent}: pip install {absent}"
        ) from error


def transformers(user: str) -> Any:
    """Return the library transformers, imported only when needed because that takes 2 s."""
    library = require("transformers", user, "pip install -e '.[vla]'")
    library.utils.logging.disable_progress_bar()
    return library


def locate(path: str | Path, key: str) -> str:
    """Return the folder `path`, or `path` itself if it can be the name of a model on the hub."""
    folder = Path(path).expanduser()
    if folder.exists():
        return str(folder)
    if Path(path).is_absolute() or str(path)[:1] in ("~", ".") or str(path).count("/") != 1:
        raise ConfigError(
            f"{key}={path} does not exist; set the folder that holds the model, or its name on "
            "the Hugging Face hub as OWNER/MODEL"
        )
    return str(path)


def read_error(path: str, key: str, error: Exception) -> ConfigError:
    """Return the error to raise if a model could not be read; `error` is the library's."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(path).exists():
        return ConfigError(f"{key}={path} could not be read as a model: {reason}")
    return ConfigError(
        f"{key}={path} is not a folder, and could not be read from the Hugging Face hub ({reason}). "
        f"Download it with: hf download {path} --local-dir FOLDER (after hf auth login, if its "
        f"licence must be accepted first), and set {key}=FOLDER"
    )


def read_model(
    name: str, path: str | Path, key: str, dtype: torch.dtype, options: dict[str, Any], **build: Any
) -> Any:
    """Read the model at `path`, of the class `name` in transformers, in `dtype`.

    `options` replace values of its configuration; `build` are arguments of its constructor.
    """
    library, found = transformers(key), locate(path, key)
    model_class = getattr(library, name)
    try:
        # Checked here, because from_pretrained loads what it can of another kind of model without
        # an error.
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
        raise read_error(found, key, error) from error
    if absent := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{key}={path} does not hold {len(absent)} of the model's weights, such as "
            f"{absent[0]}; download the complete model"
        )
    return model


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Suppress transformers' table of unused weights; missing weights are an error here anyway."""
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
    """Return the type of the weights by its name; None is float32."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"{key}={dtype} is unknown{nearest(str(dtype), DTYPES)}")
    return DTYPES[dtype or "float32"]


def choose_layers(layers: Any, depth: int, key: str) -> list[int]:
    """Return the layers counted from 0, where negative numbers count from the end.

    Raises `ConfigError`.
    """
    wrong = [n for n in layers if not isinstance(n, int) or not -depth <= n < depth]
    if wrong or not layers:
        raise ConfigError(
            f"{key}={list(layers)} must be a list of layers from 0 to {depth - 1}, or -{depth} to "
            "-1 from the end"
        )
    return [n % depth for n in layers]


def precision(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the context in which a part with weights of `dtype` computes.

    For bfloat16 it is autocast, which keeps sensitive sums in float32. Weights in bfloat16 are for
    frozen parts only: most updates are smaller than the resolution of bfloat16.
    """
    if dtype == torch.float32:
        return contextlib.nullcontext()
    if module.training and any(p.requires_grad for p in module.parameters()):
        raise ConfigError(
            f"{type(module).__name__} has dtype={str(dtype).removeprefix('torch.')} and is trained; "
            "freeze it with an optim.lr_multipliers of 0, or use float32 weights with "
            "trainer.precision=bf16"
        )
    return torch.autocast(device.type, dtype=dtype)


def checkpoint_activations(model: Any) -> None:
    """Keep only each block's input for the backward pass, which computes the rest again."""
    options = {"use_reentrant": False}
    # transformers 5 has the first name, and will drop the second in version 6.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # A text model then requires gradients of its inputs, which only reentrant checkpoints need.
    # For a frozen model that would mean a useless backward pass.
    with contextlib.suppress(AttributeError):  # if no such hook was registered
        model.disable_input_require_grads()

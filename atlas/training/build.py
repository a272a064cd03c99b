"""Building what trains from the settings of a run: data, model, optimizer and schedule."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import nn

from atlas.config.schema import Settings
from atlas.data.protocol import spec_of
from atlas.errors import ConfigError
from atlas.models.protocol import HasImageSize, HasVision
from atlas.protocol import offers
from atlas.schedule import LearningRate, scaling
from atlas.training.feeding import features
from atlas.training.feeding.randomness import seed_everything
from atlas.training.feeding.stream import check_dataset
from atlas.training.optimization import optimizer as optim
from atlas.training.optimization.precision import check_precision
from atlas.training.parts import Parts
from atlas.training.ranks import sharding

CPU = torch.device("cpu")


def build(settings: Settings, world_size: int, device: torch.device) -> Parts:
    """Return the parts of a run; raise `ConfigError` if they cannot be built or do not fit together.

    On the meta device the model is built without memory for its weights, which have no values then.
    """
    check_precision(settings.trainer.precision, device)
    train, val = build_data(settings)
    spec = spec_of(train)
    hollow = device.type == "meta"
    with device if hollow else contextlib.nullcontext():
        model = create_model(settings.model.raw, spec, settings.seed)
    # A model that will be sharded across ranks need not fit one device before it is.
    is_sharded = settings.cluster.is_sharded(world_size)
    model.to(CPU if is_sharded and not hollow else device)
    groups, optimizer = arrange(settings, model, world_size, device)
    if is_sharded:
        sharding.check_shardable(model)
    if settings.data.cache_features:
        features.check(model, [data for data in (train, val) if data is not None])
    return Parts(train, val, spec, model, groups, optimizer)


def arrange(
    settings: Settings, model: nn.Module, world_size: int, device: torch.device
) -> tuple[list[optim.Group], optim.Optimizer]:
    """Freeze what has rate 0; return the groups of parameters and the optimizer over them."""
    groups = optim.group_parameters(model, settings.optim.lr_multipliers or {})
    optim.freeze(groups)
    return groups, build_optimizer(settings, groups, world_size, device)


def doubts(data: Mapping[str, Any], parts: Parts) -> list[str]:
    """Return a sentence about everything that is permitted and probably a mistake."""
    there = (parts.spec or {}).get("image_size")
    model: Any = parts.model
    vision: Any = model.vision if offers(model, HasVision) else None
    seen = vision.image_size if offers(vision, HasImageSize) else None
    if data.get("image_size") is None or not there or not seen:
        return []
    if not any(wanted > pixels for wanted, pixels in zip(seen, there, strict=True)):
        return []
    return [
        f"frames are reduced to data.image_size={list(there)} and enlarged again to "
        f"{list(seen)} for model.vision; data.image_size={list(seen)} keeps what is in them"
    ]


def build_data(settings: Settings) -> tuple[Any, Any | None]:
    """Return the training and the validation set (None if `data.val` is null)."""
    train = create(settings.data.train, "data.train")
    check_dataset(train, "data.train")
    if needs_spec(settings.model.target) and spec_of(train) is None:
        raise ConfigError(
            f"model._target_={settings.model.target} is built from the training set's `spec`, "
            f"and a {type(train).__name__} has none; docs/own.md says what it holds"
        )
    if settings.data.val is None:
        return train, None
    val = create(settings.data.val, "data.val")
    check_dataset(val, "data.val")
    return train, val


def build_model(config: Mapping[str, Any], spec: Mapping[str, Any] | None) -> nn.Module:
    """Return the model of `config`, of which only `model` and `seed` are read.

    `spec` describes the training set, for a model whose constructor takes it.
    """
    return create_model(config["model"], spec, config["seed"])


def create_model(node: Mapping[str, Any], spec: Mapping[str, Any] | None, seed: int) -> nn.Module:
    """Return the model that `node` describes with its initial weights, a function of `seed`.

    A model whose constructor takes `spec` gets the training set's.
    """
    seed_everything(seed)
    extra = {"spec": spec} if _spec_parameter(node["_target_"]) else {}
    model = create(node, "model", **extra)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model._target_={node['_target_']} gives a {type(model).__name__}; "
            "it must give a torch.nn.Module"
        )
    return model


def build_optimizer(
    settings: Settings, groups: list[optim.Group], world_size: int, device: torch.device
) -> optim.Optimizer:
    """Return the optimizer over `groups`, with the run's learning rate."""
    factory = create(settings.optim.optimizer, "optim.optimizer")
    optim.check_fused(factory, device)
    try:
        return optim.Optimizer(groups, factory, rate=learning_rate(settings, world_size))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim.optimizer: {error}") from error


def learning_rate(settings: Settings, world_size: int) -> LearningRate:
    """Return the rule that gives every module its rate in every update."""
    optim = settings.optim
    batch = settings.effective_batch(world_size)
    return LearningRate(
        base=optim.lr * scaling(optim.scale_lr, batch, optim.base_batch_size),
        schedule=create(settings.schedule.raw, "schedule"),
        steps=settings.trainer.steps,
    )


def create(node: Mapping[str, Any], key: str, **extra: Any) -> Any:
    """Return the object that `node` describes; name the configuration's `key` in any error."""
    # `_convert_`: otherwise lists and mappings inside would become OmegaConf's own types.
    config = OmegaConf.create({**node, "_convert_": "all"})
    try:
        return instantiate(config, **extra)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is not None and _raised_inside(cause):
            raise cause from None
        raise ConfigError(f"{key}: {error}") from error


def needs_spec(target: str) -> bool:
    """Return whether the constructor of the model `target` requires `spec`."""
    parameter = _spec_parameter(target)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _spec_parameter(target: str) -> inspect.Parameter | None:
    try:
        return inspect.signature(get_class(target)).parameters.get("spec")
    except Exception:  # no such class: instantiating it raises the better error
        return None


def _raised_inside(cause: BaseException) -> bool:
    """Return whether `cause` was raised in the constructor's own code, not by calling it wrongly."""
    trace = cause.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_code.co_filename if trace else ""
    return bool(where) and "hydra" not in Path(where).parts

"""What a model and its parts offer: `Model` is required, every other protocol here is optional.

A model of your own need not inherit from these classes; having the members is enough. The protocols
of parts are those of `model=vla`, whose parts are groups (`model/vision=…`). Sizes in the shapes: B
samples, V cameras, P patches of an image, H x W pixels, K states of the history, S entries of a state, T
actions of a chunk, A entries of an action, E errors a step of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Model(Protocol):
    """A `torch.nn.Module` that computes its own loss.

    A constructor with a parameter `spec` is given the training set's `spec` (see
    `atlas.data.protocol.HasSpec`). Draw random numbers from torch's generators: they are seeded for
    every micro-batch and every update; those of Python and numpy are not.
    """

    def __call__(self, batch: Any, /) -> Mapping[str, Tensor]:
        """Return `loss`, the mean over the valid elements of the batch, a scalar.

        `weight` (optional) is the number of valid elements; without it, the number of samples. Every
        other scalar is a mean by the same weight, tracked as `train/<name>` and `val/<name>`.
        """
        ...


class Acts(Protocol):
    """A model that can act as a policy."""

    def act(self, batch: Mapping[str, Any], /) -> Tensor:
        """Return chunks of actions [B, T, A] in their own units for a batch of observations.

        The batch holds what the data set's batches hold less the actions. For discrete actions
        return the probability of each.
        """
        ...


class HasVision(Protocol):
    """A model with a part `vision`, whose features `data.cache_features` can keep."""

    vision: Any


class Vision(Protocol):
    """The part `vision`: from views of a scene to a feature for each patch.

    A constructor takes `image_size` [H, W]. `grid`: rows and columns of a view's patches, P = rows x
    columns, row by row. `width`: size of a feature.
    """

    grid: tuple[int, int]
    width: int

    def __call__(self, images: Tensor, /) -> Tensor:
        """Return features [B, V, P, width] of uint8 images [B, V, 3, H, W]."""
        ...


class Encodes(Protocol):
    """A vision whose features can be computed once and kept (`data.cache_features=true`)."""

    grid: tuple[int, int]
    width: int

    def encode(self, images: Tensor, /) -> Tensor:
        """Return features [B, V, P, width] of uint8 images [B, V, 3, H, W], as a call does."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """Return plain values that, with the weights, determine what `encode` returns."""
        ...


class HasImageSize(Protocol):
    """A vision that resizes images to `image_size` [H, W] before it encodes them."""

    image_size: tuple[int, int]


class HasPatchSize(Protocol):
    """An aggregator of `model/vision=vggt` with patches of another size than 14 pixels."""

    patch_size: int


class LangEncoder(Protocol):
    """The part `lang_encoder`: from instructions to vectors.

    A constructor takes `vocabulary` (words).
    """

    width: int

    def __call__(self, texts: list[str], /) -> Tensor:
        """Return a vector for each instruction, [B, width]."""
        ...


class Fusion(Protocol):
    """The part `fusion`: from vision, language and state to one vector.

    A constructor takes `cameras` (V), `grid`, `vision_width`, `language_width` and `state_width`
    (K x S).
    """

    width: int

    def __call__(self, patches: Tensor, language: Tensor, state: Tensor, /) -> Tensor:
        """Return [B, width] for [B, V, P, vision_width], [B, language_width], [B, state_width]."""
        ...


class ActionHead(Protocol):
    """The part `action_head`: from the fused vector to a chunk of actions in normalised units.

    A constructor takes `width`, `horizon` (T) and `action_dim` (A). `discrete`: whether it chooses one
    of A actions at a time.
    """

    discrete: bool

    def __call__(self, features: Tensor, /) -> Tensor:
        """Return the chunk to act with, [B, T, A], for features [B, width]."""
        ...

    def errors(
        self, features: Tensor, actions: Tensor, mask: Tensor, /
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the error of each element, float32 [B, T, E], and further measures by name.

        The mean of the errors over the valid steps is the loss. Measures are float32 [B, T, .]. All
        are exactly 0 where `mask` [B, T] is False.
        """
        ...


class Untraced(Protocol):
    """A module with methods that `trainer.compile` must leave alone, such as Python on text."""

    untraced: tuple[str, ...]

"""DINOv2 with registers as the policy's vision; each view is encoded independently."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from atlas.models import pretrained
from atlas.models.layers.images import MEAN, STD, GridPool, scaled, whole_patches
from atlas.models.vision import VisionEncoder

log = logging.getLogger(__name__)
KEY = "model.vision"


class Dino(VisionEncoder):
    """From images to features of DINOv2's patches (Oquab et al. 2023; Darcet et al. 2024).

    path: a folder or a name on the Hugging Face hub. None: random weights with the sizes in
    `config` (fields of transformers' `Dinov2WithRegistersConfig`). layers: the layers whose
    outputs are concatenated, each after the model's final norm; layers after the last of them are
    removed. grid: [rows, columns] that patches are averaged to; None keeps all. dtype: of the
    weights; None is float32. checkpoint_activations: a backward pass needs less memory and a third
    more time.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image_size: Sequence[int],
        path: str | None = None,
        config: Mapping[str, Any] | None = None,
        resize: Sequence[int] | None = None,
        layers: Sequence[int] = (-1,),
        grid: Sequence[int] | None = None,
        dtype: str | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.dtype = pretrained.choose_dtype(dtype, f"{KEY}.dtype")
        self.model: Any = self._model(path, config or {})
        settings = self.model.config
        self.layers = pretrained.choose_layers(layers, settings.num_hidden_layers, f"{KEY}.layers")
        self.model.encoder.layer = self.model.encoder.layer[: max(self.layers) + 1]
        # The loss does not depend on it. If it needed a gradient, DDP would have to search for
        # unused parameters in every step.
        self.model.embeddings.mask_token.requires_grad_(False)
        if checkpoint_activations:
            pretrained.checkpoint_activations(self.model)
        patch = int(settings.patch_size)
        self.image_size = whole_patches(image_size, resize, patch)
        self.pool = GridPool((self.image_size[0] // patch, self.image_size[1] // patch), grid)
        self.grid, self.width = self.pool.grid, settings.hidden_size * len(self.layers)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def _model(self, path: str | None, config: Mapping[str, Any]) -> Any:
        name = "Dinov2WithRegistersModel"
        if path is not None:
            return pretrained.read_model(name, path, f"{KEY}.path", self.dtype, {})
        if pretrained.weights_wanted():  # otherwise the caller loads all weights afterwards
            log.warning(
                "%s.path is null: DINOv2 starts from random weights; for pretrained weights set "
                "%s.path=facebook/dinov2-with-registers-small, or a folder that holds them",
                KEY,
                KEY,
            )
        library = pretrained.transformers("model=vla_dino")
        sizes = library.Dinov2WithRegistersConfig(**config)
        return getattr(library, name)(sizes).to(self.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 features [..., P, width] of uint8 images [..., 3, H, W]."""
        pixels = (scaled(images.flatten(0, -4), self.image_size) - self.mean) / self.std
        with pretrained.precision(self, self.dtype, images.device):
            output = self.model(pixel_values=pixels.to(self.dtype), output_hidden_states=True)
            # The first hidden state is the embedding of the patches, before the first layer.
            chosen = [self.model.layernorm(output.hidden_states[n + 1]) for n in self.layers]
        leading = 1 + self.model.config.num_register_tokens
        patches = torch.cat(chosen, dim=-1)[:, leading:]
        features: Tensor = self.pool(patches).unflatten(0, images.shape[:-3])
        return features

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the features besides the weights; see `VisionEncoder`."""
        settings = self.model.config
        names = ("num_attention_heads", "num_register_tokens", "patch_size", "hidden_act")
        return {
            "encoder": "Dinov2WithRegisters",
            **{name: getattr(settings, name) for name in names},
            "layer_norm_eps": float(settings.layer_norm_eps),
            "layers": self.layers,
            "image_size": list(self.image_size),
            "grid": list(self.grid),
            "views": "each by itself",
            "dtype": str(self.dtype),
            "preprocessing": "bilinear with antialiasing, mean and deviation of ImageNet",
        }

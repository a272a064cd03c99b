"""The memory that a plan tells is what a training step takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import OWN, ROOT, quick, train, unnamed
from hydra import compose, initialize_config_dir
from torch.profiler import ProfilerActivity, profile

from atlas.config.schema import Settings
from atlas.data.tabletop import Tabletop
from atlas.training.build import CPU, build
from atlas.training.dry_run import memory, plan
from atlas.training.optimization.ema import Ema
from atlas.training.optimization.gradient import Sums
from atlas.training.optimization.precision import autocast
from atlas.training.parts import Parts
from launchers.launch import resolve

SMALL = ("data.episodes=8", "data.val=null", "cluster.device=cpu")
DINO = ("model=vla_dino", "+model.vision.config={hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 2}")  # fmt: skip

ADAMS = tuple(f"~optim.optimizer.{key}" for key in ("betas", "eps", "fused"))


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OWN))


def config(*overrides: str, base: tuple[str, ...] = SMALL) -> Settings:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        given = [f"hydra.searchpath=[file://{OWN}]", *base, *overrides]
        return Settings.of(resolve(compose("config", given)))


def own(*overrides: str) -> Settings:
    return config(*overrides, base=("experiment=quick", "cluster.device=cpu"))


def told(asked: Settings, ranks: int = 1) -> memory.Estimate:
    return memory.estimate(asked, plan.hollow(asked, ranks), ranks)


def step(asked: Settings, parts: Parts) -> Any:
    """Forward and backward of a micro-batch with real numbers; gives the batch."""
    batch = memory.example(asked, parts, asked.data.batch_size)
    parts.model.train()
    with autocast(asked.trainer.precision, CPU):
        out = parts.model(batch)
    Sums(detailed=False).add(out).backward()
    return batch


def allocated(asked: Settings) -> int:
    """The most bytes that torch's allocator had given out at once in a step, as it says itself."""
    parts = build(asked, 1, CPU)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(asked, parts)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


MODELS = [
    (),
    ("trainer.precision=bf16",),
    ("model/action_head=flow_matching", "data.batch_size=3"),
    (*DINO, "model.vision.dtype=bfloat16", "trainer.precision=bf16"),
    (*DINO, "optim.lr_multipliers.vision=1"),
    (*DINO, "optim.lr_multipliers.vision=1", "model.vision.checkpoint_activations=true"),
]


@pytest.mark.parametrize("overrides", MODELS, ids=str)
def test_activations_are_what_the_allocator_gives(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("dino" in text for text in overrides):
        pytest.importorskip("transformers")
    asked = config(*overrides)
    monkeypatch.setattr(memory, "room", lambda: 0)  # for nothing that computes
    found = told(asked)
    assert found.missing == []
    # The allocator's peak has the batch in it, and the gradients that were complete by then.
    few, many = found.sizes["activations"], sum(found.sizes[n] for n in ("activations", "batch", "gradients"))  # fmt: skip
    assert 0.98 * few <= allocated(asked) <= 1.02 * many


def test_activations_are_more_than_what_is_saved_for_the_backward_pass() -> None:
    asked = config()
    parts = build(asked, 1, CPU)
    weights = {p.untyped_storage()._cdata for p in [*parts.model.parameters(), *parts.model.buffers()]}  # fmt: skip
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # kept, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(asked, parts)
    total = sum(storage.nbytes() for storage in saved.values())
    assert total < told(asked).sizes["activations"] < 3 * total


def test_checkpointed_activations_are_fewer() -> None:
    pytest.importorskip("transformers")
    plain, checkpointed = (told(config(*overrides)) for overrides in MODELS[4:])
    assert checkpointed.sizes["activations"] < 0.8 * plain.sizes["activations"]


@pytest.mark.parametrize(
    ("asked", "states"),
    [
        (config("trainer.ema=0.9"), 2),
        (config("optim=sgd"), 1),
        (config("optim=sgd", "~optim.optimizer.nesterov", "optim.optimizer.momentum=0"), 0),
        (own("optim=plain"), 0),  # an optimizer of a person's own
        (config("optim.optimizer._target_=torch.optim.Adafactor", *ADAMS), None),
    ],
    ids=["adamw", "sgd with momentum", "sgd", "own", "adafactor"],
)
def test_weights_and_states_are_counted_to_the_byte(asked: Settings, states: int | None) -> None:
    parts = build(asked, 1, CPU)
    batch = step(asked, parts)
    parts.optimizer.set_rates(1)
    gradients = memory.size_of(parts.optimizer.gradients())
    parts.optimizer.inner.step()
    real = {
        "weights": memory.size_of([*parts.model.parameters(), *parts.model.buffers()]),
        "gradients": gradients,
        "optimizer": memory.size_of([dict(s) for s in parts.optimizer.inner.state.values()]),
        "batch": memory.size_of(batch),
    }
    if asked.trainer.ema:
        real["average"] = memory.size_of(Ema(parts.model, 0.9).state_dict())
    found = told(asked).sizes
    del found["activations"]
    assert found == real
    if states is not None:
        assert found["optimizer"] == pytest.approx(states * gradients, rel=1e-3)


def test_many_samples_are_told_from_few() -> None:
    few, many = config("data.batch_size=8"), config("data.batch_size=24")
    line = told(many).sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "MOST", 24)
        exact = told(many).sizes
    assert line["batch"] == exact["batch"]
    assert line["activations"] == pytest.approx(exact["activations"], rel=0.05)
    assert exact["activations"] > 2.5 * told(few).sizes["activations"]


def test_a_model_that_looks_at_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = own("model._target_=own_parts.Choosy")
    found, plain = told(asked), told(own())
    assert found.missing == [] and found.sizes == plain.sizes
    monkeypatch.setattr(memory, "room", lambda: 0)
    small = told(asked)
    (missing,) = small.missing
    assert "activations" not in small.sizes and unnamed(missing, "activations") == []
    assert "DataDependent" in missing  # torch's name of the error
    assert missing in small.text() and "weights" in small.text()


def test_data_that_cannot_be_read() -> None:
    torn = "+data.train.torn=[0,1,2,3,4,5,6,7,8]"
    found = told(own("data.train._target_=own_parts.Holes", "data.train.samples=9", torn))
    assert "batch" not in found.sizes
    # In the data set's words.
    assert unnamed(found.missing[0], "batch", "OSError: the file ends too early") == []
    assert found.sizes["optimizer"] > 0


@pytest.mark.parametrize("cached", ["null", "true"])
def test_images_are_not_read(monkeypatch: pytest.MonkeyPatch, cached: str) -> None:
    asked = config(f"data.cache_features={cached}", "data.train.augment=0")
    real = Tabletop.batch

    def batch(self: Any, ids: Any, seeds: Any = None, *, images: bool = True) -> Any:
        assert not images
        return real(self, ids, seeds, images=images)

    monkeypatch.setattr(Tabletop, "batch", batch)
    assert told(asked).missing == []


def test_parts_of_a_cut_model() -> None:
    for shape, ranks, rows in (((7, 3), 2, 4), ((7, 3), 8, 1), ((8,), 4, 2), ((8,), 1, 8)):
        tensor = torch.empty(shape)
        assert memory.held(tensor, ranks) == 4 * rows * tensor[0].numel()
    whole, cut = own("model=stack"), own("model=stack", "cluster.sharding=fsdp2")
    one, two = told(whole, 2).sizes, told(cut, 2)
    assert told(cut, 1).sizes == told(whole, 1).sizes  # there is nobody to share with
    for name in ("gradients", "average"):
        assert one[name] / 2 <= two.sizes[name] < 0.6 * one[name]
    assert two.sizes["gathered"] > 0 and "gathered" not in one
    assert two.sizes["activations"] == one["activations"]


def test_what_a_gpu_has_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    found = memory.Estimate({"weights": 3e9, "gradients": 1e9}, {"trained float32": 3e9})
    assert found.text().splitlines()[0].endswith("weights 3.00 GB + gradients 1.00 = 4.00 GB")
    gpu = torch.device("cuda", 0)
    for free, warns in ((3.5e9, True), (5e9, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80e9))
        (told,) = plan.room(found, gpu)
        assert unnamed(told, f"{free / 1e9:.1f} GB", "80.0", gpu) == []
        assert ("warning" in told) == warns
    assert plan.room(found, CPU) == []


def test_a_plan_tells_it_and_writes_nothing(tmp_path: Path) -> None:
    asked = ("dry_run=true", "cluster.device=cpu", "cluster.sharding=fsdp2")
    said = train(*quick(tmp_path / "new", *asked)).stdout
    parts = ("fsdp2", "weights 0.00 MB", "gradients 0.00", "optimizer 0.00", "trained float32 0.00")
    assert unnamed(said, *parts) == []
    assert not (tmp_path / "new").exists()

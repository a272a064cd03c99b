"""What a run does not import, and that it computes the same without it."""

import subprocess
import sys

import pytest
import torch
from commands import ROOT, environment, quick

from atlas.training.optimization.dynamo import bare_step


def test_a_run_that_compiles_nothing_does_not_import_the_compiler(tmp_path):
    code = (
        "import sys; sys.argv = ['train.py', *sys.argv[1:]]\n"
        "import runpy; runpy.run_path('train.py', run_name='__main__')\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *quick(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "factory",
    [
        lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
        lambda p: torch.optim.AdamW(p, 1e-2),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
    ],
)
def test_the_bare_step_is_the_step(factory):
    weights = []
    for bare in (False, True):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(5, 3))
        optimizer = factory([parameter])
        step = bare_step(optimizer) if bare else optimizer.step
        for _ in range(5):
            parameter.grad = torch.randn(5, 3)
            step()
        weights.append(parameter.detach().clone())
    assert torch.equal(*weights)


def test_hooks_are_still_called():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 0.1)
    step, called = bare_step(optimizer), []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    parameter.grad = torch.ones(2)
    step()
    assert called == [1] and parameter[0] < 1

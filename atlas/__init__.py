"""Atlas: one command line becomes one reproducible training run, anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atlas.version import __version__

if TYPE_CHECKING:
    from atlas.policy.policy import Policy, load_policy

__all__ = ["Policy", "__version__", "load_policy"]


def __getattr__(name: str) -> Any:
    # torch is imported by those who ask for a policy, not by everybody who imports atlas.
    if name in ("Policy", "load_policy"):
        from atlas.policy import policy

        return getattr(policy, name)
    raise AttributeError(f"module 'atlas' has no attribute '{name}'")

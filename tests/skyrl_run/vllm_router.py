"""A router that SkyRL's trainer imports before it starts, and does not use here; rewards.py comes with it."""

import sys

import rewards  # noqa: F401

for name in ("launch_router", "router_args"):
    sys.modules[f"vllm_router.{name}"] = sys.modules[__name__]
launch_router = RouterArgs = None

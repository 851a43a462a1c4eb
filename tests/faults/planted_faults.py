"""Five faults, planted in the memory of tests: the campaigns have to find them. Run by ``make planted``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.page import ROOT
from tests.faults.planting import PLANTED

FAULTS = {
    "skipped fsync": (
        ["tests/faults/test_power.py", "--tries-share=0.3"],
        """
from g2rl import checkpoint
checkpoint.sync = lambda path: None
""",
    ),
    "off by one in a mask": (
        ["tests/faults/test_ops.py", "-k", "torch", "--tries-share=0.05"],
        """
import torch
from g2rl_kernels.group_layout import GroupLayout
make = GroupLayout.__init__
def one_more(self, cu_groups, B, m_max):
    make(self, cu_groups, B, m_max)
    self.member = torch.arange(m_max, device=cu_groups.device) <= cu_groups.diff()[:, None]
GroupLayout.__init__ = one_more
""",
    ),
    "swallowed exception": (
        ["tests/faults/test_storage.py", "--tries-share=0.25"],
        """
from g2rl import trainer
save = trainer.save_checkpoint
def quiet(*arguments):
    try:
        return save(*arguments)
    except Exception:
        return None
trainer.save_checkpoint = quiet
""",
    ),
    "stale weights": (
        ["tests/faults/test_kill.py::test_one_process", "--tries-share=0.15"],
        """
from g2rl.rollout import embedded
sync, begun = embedded.TransformersSampler.sync, set()
def once(self):
    if id(self) not in begun:
        begun.add(id(self))
        sync(self)
embedded.TransformersSampler.sync = once
embedded.has_adapter = lambda model: True  # the sampler has a copy, as where its type is another
""",
    ),
    "race": (
        ["tests/faults/test_kill.py::test_one_process", "--tries-share=0.15"],
        """
from g2rl.rollout import embedded
def shared(self):
    self.model = self.policy  # what is sampled ahead is of weights that change meanwhile
embedded.TransformersSampler.sync = shared
""",
    ),
}
"""Each with the campaign that has to find it, as arguments of pytest, and what it changes."""


@pytest.mark.parametrize("fault", FAULTS)
def test_found(fault: str, tmp_path: Path) -> None:
    campaign, code = FAULTS[fault]
    path = tmp_path / "planted.py"
    path.write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *campaign]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {PLANTED: str(path)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-3000:]
    assert "tries failed, the first of them" in done.stdout, done.stdout[-3000:]

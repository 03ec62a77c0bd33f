"""What all tests share: the project on the path, two threads at most, one seed, and very small models."""
import os
import sys
from pathlib import Path

import pytest

if "OMP_WAIT_POLICY" not in os.environ:              # as train.py does, before torch is loaded; the processes that tests start inherit it
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assets")]
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """-> make(vision={...} or None, connector={...}, text={...}, **rest): a Config of a few thousand weights, 4 tokens an image."""
    from model import Config

    def make(vision={}, connector={}, text={}, **rest):
        v = dict(image_size=16, patch_size=8, dim=16, n_layers=3, n_heads=2, ffn_dim=24)
        t = dict(vocab_size=40, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=24, rope_theta=1e4)
        return Config(vision=None if vision is None else {**v, **vision}, connector=dict(connector), text={**t, **text}, **rest)
    return make


@pytest.fixture
def tiny_model(tiny_config):
    """-> make(...as above): a CuMo in eval mode whose weights are loud. At the usual std of 0.02 every block is nearly the
    identity, and a test that compares outputs would hardly notice a wrong one."""
    from model import CuMo

    def make(**kw):
        torch.manual_seed(0)
        model = CuMo(tiny_config(**kw))
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, p.shape[-1] ** -0.5) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.3)
        return model.eval()
    return make

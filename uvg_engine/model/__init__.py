"""The Uni-ViGU model: config, packed layout, blocks, heads, checkpoint formats."""

from uvg_engine.model.checkpoint import (
    from_pretrained,
    load_published,
    published_config,
    save_pretrained,
    save_published,
)
from uvg_engine.model.config import CONFIGS, UniViGUConfig, named_config
from uvg_engine.model.layout import Layout
from uvg_engine.model.tensor_files import CheckpointError
from uvg_engine.model.univigu import PackedOutput, UniViGU

__all__ = [
    "CONFIGS",
    "CheckpointError",
    "Layout",
    "PackedOutput",
    "UniViGU",
    "UniViGUConfig",
    "from_pretrained",
    "load_published",
    "named_config",
    "published_config",
    "save_pretrained",
    "save_published",
]

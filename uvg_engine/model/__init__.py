"""The Uni-ViGU model: config, packed layout, blocks, heads, checkpoint formats."""

from uvg_engine.model.checkpoint import (
    from_pretrained,
    load_pretrained,
    load_published,
    published_config,
    save_pretrained,
    save_published,
)
from uvg_engine.model.config import CONFIGS, UniViGUConfig, named_config
from uvg_engine.model.layout import Layout
from uvg_engine.model.tensor_files import CheckpointError
from uvg_engine.model.text_init import text_from_video
from uvg_engine.model.univigu import PackedOutput, UniViGU
from uvg_engine.model.wan import load_wan, save_wan, wan_config

__all__ = [
    "CONFIGS",
    "CheckpointError",
    "Layout",
    "PackedOutput",
    "UniViGU",
    "UniViGUConfig",
    "from_pretrained",
    "load_pretrained",
    "load_published",
    "load_wan",
    "named_config",
    "published_config",
    "save_pretrained",
    "save_published",
    "save_wan",
    "text_from_video",
    "wan_config",
]

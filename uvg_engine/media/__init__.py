"""Video files, pixel and VAE codecs, tokenizers and text encoders; nothing here knows the model."""

from uvg_engine.media.codec import PixelCodec, WanVAECodec, codec_from_config
from uvg_engine.media.pictures import contact_sheet, save_png, trajectory_picture
from uvg_engine.media.text_encoder import HashTextEncoder, UMT5TextEncoder, text_encoder_from_config
from uvg_engine.media.tokenizer import HFTokenizer, WordTokenizer, tokenizer_from_config
from uvg_engine.media.video import VideoError, read_video, resize_video, write_video

__all__ = [
    "HFTokenizer",
    "HashTextEncoder",
    "PixelCodec",
    "UMT5TextEncoder",
    "VideoError",
    "WanVAECodec",
    "WordTokenizer",
    "codec_from_config",
    "contact_sheet",
    "read_video",
    "resize_video",
    "save_png",
    "text_encoder_from_config",
    "tokenizer_from_config",
    "trajectory_picture",
    "write_video",
]

"""Codecs between video pixels and the latents that the model sees.

Shapes: B samples; frames uint8 [F, H, W, 3]; latent fp32 [C, f, h, w].
`PixelCodec` needs no weights (a truncated block DCT); `WanVAECodec` wraps diffusers' AutoencoderKLWan.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from uvg_engine.media._arguments import arguments, flag, is_positive, of_type


def codec_from_config(config: Mapping[str, Any]) -> PixelCodec | WanVAECodec:
    """The codec that `config["type"]` names: "pixel" or "wan_vae". Raises ValueError for any other."""
    kinds: dict[str, type[PixelCodec] | type[WanVAECodec]] = {"pixel": PixelCodec, "wan_vae": WanVAECodec}
    return of_type("codec", kinds, config).from_config(config)


class PixelCodec:
    """Orthonormal 3-D DCT-II of pixel blocks, lowest frequencies kept, each channel normalised.

    block: (ft, sy, sx) pixels of a block. keep: (kt, ky, kx) frequencies kept per axis, from the lowest.
    mean, std: per channel, length C = 3*kt*ky*kx (channel order: colour, kt, ky, kx); None means 0 and 1; see `fit`.
    Every sum runs in a fixed order over whole planes, so a sample's bits do not depend on its batch.
    """

    def __init__(
        self,
        block: Sequence[int] = (2, 4, 4),
        keep: Sequence[int] = (2, 2, 2),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.block, self.keep = _triple("block", block), _triple("keep", keep)
        if any(k > n for k, n in zip(self.keep, self.block, strict=True)):
            raise ValueError(f"keep must be at most block on every axis, got keep {self.keep}, block {self.block}")
        self.channels = 3 * math.prod(self.keep)
        self.mean = self._stats("mean", mean, 0.0)
        self.std = self._stats("std", std, 1.0)
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {min(self.std)}")
        self._dct = [_dct_rows(k, n) for k, n in zip(self.keep, self.block, strict=True)]

    def latent_shape(self, video: Sequence[int]) -> tuple[int, int, int, int]:
        """(C, f, h, w) of a video of (F, H, W). Raises ValueError where a block does not divide it."""
        video = _triple("video shape", video)
        if any(size % n for size, n in zip(video, self.block, strict=True)):
            raise ValueError(f"frames, height and width must be multiples of the block {self.block}, got {video}")
        f, h, w = (size // n for size, n in zip(video, self.block, strict=True))
        return self.channels, f, h, w

    def video_shape(self, latent: Sequence[int]) -> tuple[int, int, int]:
        """(F, H, W) of a latent of (C, f, h, w)."""
        if len(latent) != 4 or latent[0] != self.channels or min(latent) < 1:
            raise ValueError(f"latent shape must be ({self.channels}, f, h, w), got {tuple(latent)}")
        f, h, w = (int(size) * n for size, n in zip(latent[1:], self.block, strict=True))
        return f, h, w

    def encode(self, frames_FHWc: torch.Tensor) -> torch.Tensor:
        """uint8 [F, H, W, 3] -> fp32 [C, f, h, w] on the same device."""
        _check_frames(frames_FHWc, 4)
        return self.encode_batch(frames_FHWc[None])[0]

    def encode_batch(self, frames_BFHWc: torch.Tensor) -> torch.Tensor:
        """uint8 [B, F, H, W, 3] -> fp32 [B, C, f, h, w]; each sample bitwise as `encode` gives it."""
        raw = self._raw(frames_BFHWc)
        return (raw - self._channel(self.mean, raw)) / self._channel(self.std, raw)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[C, f, h, w] -> uint8 [F, H, W, 3]; dropped frequencies are zero, values are clamped and rounded."""
        if latent.ndim != 4:
            raise ValueError(f"latent must be [C, f, h, w], got {tuple(latent.shape)}")
        return self.decode_batch(latent[None])[0]

    def decode_batch(self, latent: torch.Tensor) -> torch.Tensor:
        """[B, C, f, h, w] -> uint8 [B, F, H, W, 3]. Raises ValueError for a wrong shape or a value not finite."""
        if latent.ndim != 5:
            raise ValueError(f"latent must be [B, C, f, h, w], got {tuple(latent.shape)}")
        num_frames, height, width = self.video_shape(latent.shape[1:])
        _check_finite(latent)
        x = latent.float()
        x = x * self._channel(self.std, x) + self._channel(self.mean, x)
        x = x.unflatten(1, (3, *self.keep))  # B c kt ky kx f h w
        for axis, rows in enumerate(self._dct):
            x = _contract(x, [list(column) for column in zip(*rows, strict=True)], 2 + axis)
        x = x.permute(0, 5, 2, 6, 3, 7, 4, 1).reshape(latent.shape[0], num_frames, height, width, 3)
        return _to_uint8(x)

    def fit(self, videos: Iterable[torch.Tensor], floor: float = 0.02) -> PixelCodec:
        """A codec with means measured on videos (uint8 [F, H, W, 3] or [B, F, H, W, 3] each) and one std for all.

        The std is that of the loudest channel: frequencies keep their proportions, so that noise takes the fine ones
        first and a model decides from coarse to fine. floor: least std, in units of the DCT of [-1, 1] pixels.
        """
        total = torch.zeros(self.channels, dtype=torch.float64)
        square, count = total.clone(), 0
        for frames in videos:
            raw = self._raw(frames if frames.ndim == 5 else frames[None]).double().cpu().transpose(0, 1).flatten(1)
            total, square, count = total + raw.sum(1), square + (raw * raw).sum(1), count + raw.shape[1]
        if not count:
            raise ValueError("videos must hold at least one video, got none")
        mean = total / count
        loudest = float((square / count - mean * mean).clamp_min(0).sqrt().max())
        return PixelCodec(self.block, self.keep, mean.tolist(), [max(loudest, floor)] * self.channels)

    def to_config(self) -> dict[str, Any]:
        """Plain lists and numbers, for json; `from_config` gives the same codec back."""
        return {
            "type": "pixel",
            "block": list(self.block),
            "keep": list(self.keep),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PixelCodec:
        """Inverse of `to_config`. Raises ValueError for an unknown key."""
        return cls(**arguments("codec", "pixel", {"block", "keep", "mean", "std"}, config))

    def _raw(self, frames_BFHWc: torch.Tensor) -> torch.Tensor:
        _check_frames(frames_BFHWc, 5)
        batch = frames_BFHWc.shape[0]
        channels, f, h, w = self.latent_shape(frames_BFHWc.shape[1:4])
        (ft, sy, sx) = self.block
        x = frames_BFHWc.reshape(batch, f, ft, h, sy, w, sx, 3).permute(0, 7, 2, 4, 6, 1, 3, 5)  # B c ft sy sx f h w
        x = x.float().contiguous() / 127.5 - 1.0
        for axis, rows in enumerate(self._dct):
            x = _contract(x, rows, 2 + axis)
        return x.reshape(batch, channels, f, h, w)

    def _stats(self, name: str, values: Sequence[float] | None, default: float) -> tuple[float, ...]:
        rule = f"{name} must be {self.channels} finite numbers"
        try:
            numbers = tuple(map(float, values)) if values is not None else (default,) * self.channels
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{rule}, got {values!r:.80}") from error
        if len(numbers) != self.channels or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{rule}, got {len(numbers)}: {numbers[:8]}")
        return numbers

    @staticmethod
    def _channel(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1, 1)


class WanVAECodec:
    """Wan2.1's video VAE behind the same methods; frames must be 4k+1, height and width multiples of 8.

    path: folder of the VAE in diffusers form (config.json + safetensors), or `vae`: an AutoencoderKLWan at hand.
    normalise: subtract the VAE's latent mean and divide by its std; Uni-ViGU as published does not.
    encode takes the mode of the posterior, so that it is deterministic.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        vae: Any = None,
        normalise: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if (path is None) == (vae is None):
            raise ValueError("give either path or vae, got " + ("neither" if vae is None else "both"))
        self.path, self.normalise = None if path is None else str(path), flag("normalise", normalise)
        self.vae = (_load_wan_vae(str(path)) if vae is None else vae).to(device=device, dtype=dtype).eval()
        self.vae.requires_grad_(False)
        config = self.vae.config
        self.channels = int(config.z_dim)
        self.factor_t = 2 ** sum(bool(flag) for flag in config.temperal_downsample)
        self.factor_s = 2 ** len(config.temperal_downsample) * int(getattr(config, "patch_size", None) or 1)
        stats = torch.tensor([config.latents_mean, config.latents_std], dtype=torch.float32)
        self._mean, self._std = stats.view(2, 1, -1, 1, 1, 1).unbind(0)

    def latent_shape(self, video: Sequence[int]) -> tuple[int, int, int, int]:
        """(C, f, h, w) of a video of (F, H, W). Raises ValueError where the VAE does not serve it."""
        num_frames, height, width = video = _triple("video shape", video)
        if (num_frames - 1) % self.factor_t or height % self.factor_s or width % self.factor_s:
            raise ValueError(
                f"frames must be {self.factor_t}k+1, height and width multiples of {self.factor_s}, got {video}"
            )
        return self.channels, 1 + (num_frames - 1) // self.factor_t, height // self.factor_s, width // self.factor_s

    def video_shape(self, latent: Sequence[int]) -> tuple[int, int, int]:
        """(F, H, W) of a latent of (C, f, h, w)."""
        if len(latent) != 4 or latent[0] != self.channels or min(latent) < 1:
            raise ValueError(f"latent shape must be ({self.channels}, f, h, w), got {tuple(latent)}")
        return 1 + (latent[1] - 1) * self.factor_t, latent[2] * self.factor_s, latent[3] * self.factor_s

    def encode(self, frames_FHWc: torch.Tensor) -> torch.Tensor:
        """uint8 [F, H, W, 3] -> fp32 [C, f, h, w] on the frames' device."""
        _check_frames(frames_FHWc, 4)
        return self.encode_batch(frames_FHWc[None])[0]

    @torch.no_grad()
    def encode_batch(self, frames_BFHWc: torch.Tensor) -> torch.Tensor:
        """uint8 [B, F, H, W, 3] -> fp32 [B, C, f, h, w]."""
        _check_frames(frames_BFHWc, 5)
        self.latent_shape(frames_BFHWc.shape[1:4])
        pixels = frames_BFHWc.permute(0, 4, 1, 2, 3).to(self.vae.device).float() / 127.5 - 1.0
        latent = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float().to(frames_BFHWc.device)
        if self.normalise:
            latent = (latent - self._mean.to(latent.device)) / self._std.to(latent.device)
        return latent

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[C, f, h, w] -> uint8 [F, H, W, 3] on the latent's device."""
        if latent.ndim != 4:
            raise ValueError(f"latent must be [C, f, h, w], got {tuple(latent.shape)}")
        return self.decode_batch(latent[None])[0]

    @torch.no_grad()
    def decode_batch(self, latent: torch.Tensor) -> torch.Tensor:
        """[B, C, f, h, w] -> uint8 [B, F, H, W, 3]."""
        if latent.ndim != 5:
            raise ValueError(f"latent must be [B, C, f, h, w], got {tuple(latent.shape)}")
        self.video_shape(latent.shape[1:])
        _check_finite(latent)
        x = latent.float()
        if self.normalise:
            x = x * self._std.to(x.device) + self._mean.to(x.device)
        pixels = self.vae.decode(x.to(device=self.vae.device, dtype=self.vae.dtype)).sample
        return _to_uint8(pixels.permute(0, 2, 3, 4, 1).float().to(latent.device))

    def to_config(self) -> dict[str, Any]:
        """Plain values for json. Raises ValueError for a codec that was made from an object, not a folder."""
        if self.path is None:
            raise ValueError("a WanVAECodec has a config only when made from a path, got one made from an object")
        return {"type": "wan_vae", "path": self.path, "normalise": self.normalise}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WanVAECodec:
        """Inverse of `to_config`. Raises ValueError for an unknown key or an unreadable folder."""
        return cls(**arguments("codec", "wan_vae", {"path", "normalise"}, config))


def _load_wan_vae(path: str) -> Any:
    try:
        from diffusers import AutoencoderKLWan
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ValueError("the wan_vae codec needs the package diffusers: pip install diffusers") from error
    if not os.path.isdir(path):
        raise ValueError(f"path must be a folder with a diffusers AutoencoderKLWan, got {path!r}")
    try:
        return AutoencoderKLWan.from_pretrained(path, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"path must be a folder with a diffusers AutoencoderKLWan, got {path!r}: {reason}") from error


def _triple(name: str, values: Sequence[int]) -> tuple[int, int, int]:
    numbers = tuple(values) if isinstance(values, Iterable) else ()
    if len(numbers) != 3 or not all(map(is_positive, numbers)):
        raise ValueError(f"{name} must be three positive integers, got {values!r:.80}")
    return int(numbers[0]), int(numbers[1]), int(numbers[2])


def _dct_rows(keep: int, size: int) -> list[list[float]]:
    """First `keep` rows of the orthonormal DCT-II of `size` points."""
    return [
        [math.sqrt((1 if k == 0 else 2) / size) * math.cos(math.pi * (2 * n + 1) * k / (2 * size)) for n in range(size)]
        for k in range(keep)
    ]


def _contract(x: torch.Tensor, rows: list[list[float]], dim: int) -> torch.Tensor:
    """Contract x's axis `dim` (size n) with rows [m][n], one plane at a time: no GEMM, so no batch-dependent order."""
    planes = x.unbind(dim)
    out = []
    for row in rows:
        acc = planes[0] * row[0]
        for plane, weight in zip(planes[1:], row[1:], strict=True):
            acc = acc + plane * weight
        out.append(acc)
    return torch.stack(out, dim)


def _to_uint8(x: torch.Tensor) -> torch.Tensor:
    return ((x + 1.0) * 127.5).clamp(0, 255).round().to(torch.uint8)


def _check_frames(frames: torch.Tensor, ndim: int) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != ndim or frames.shape[-1] != 3:
        want = "[F, H, W, 3]" if ndim == 4 else "[B, F, H, W, 3]"
        raise ValueError(f"frames must be uint8 {want}, got {frames.dtype} {tuple(frames.shape)}")


def _check_finite(latent: torch.Tensor) -> None:
    if not torch.isfinite(latent).all():
        raise ValueError("latent must be finite, got NaN or infinity")

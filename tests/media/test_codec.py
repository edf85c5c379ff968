"""PixelCodec: exact where nothing is dropped, batch-independent, refusing what it does not serve. WanVAECodec: the
wrapper around a tiny random VAE does what diffusers does."""

import json
import math

import pytest
import torch

from uvg_engine.media import PixelCodec, WanVAECodec, codec_from_config


def video(*shape, seed=0):
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [(2, 4, 4), (1, 1, 1), (4, 2, 8), (1, 3, 5)])
def test_all_frequencies_kept_is_lossless(block):
    frames = video(2 * block[0], 3 * block[1], block[2])
    codec = PixelCodec(block, block)
    assert torch.equal(codec.decode(codec.encode(frames)), frames)


def test_dct_is_orthonormal_against_the_definition():
    frames = video(2, 4, 4)
    codec = PixelCodec((2, 4, 4), (2, 3, 1))
    x = frames.double() / 127.5 - 1
    want = torch.zeros(3, 2, 3, 1, dtype=torch.float64)

    def base(k, n, size):
        return math.sqrt((1 if k == 0 else 2) / size) * math.cos(math.pi * (2 * n + 1) * k / (2 * size))

    for t in range(2):
        for y in range(3):
            for i in range(2):
                for j in range(4):
                    for m in range(4):
                        want[:, t, y, 0] += x[i, j, m] * base(t, i, 2) * base(y, j, 4) * base(0, m, 4)
    torch.testing.assert_close(codec.encode(frames).flatten(), want.flatten().float(), rtol=0, atol=2e-6)


def test_dropped_frequencies_leave_the_projection():
    """Encode after decode gives the same latent while nothing is clamped: decode is the adjoint of encode."""
    codec = PixelCodec()
    latent = codec.encode((video(4, 8, 8) // 3) + 80)
    again = codec.encode(codec.decode(latent))
    assert (again - latent).abs().max() < 0.03  # only the rounding to uint8


def test_batch_is_bitwise_the_single():
    frames = video(5, 4, 12, 8)
    codec = PixelCodec().fit([frames])
    latents = codec.encode_batch(frames)
    assert latents.shape == (5, 24, 2, 3, 2) and latents.dtype == torch.float32
    for sample, latent in zip(frames, latents, strict=True):
        assert torch.equal(codec.encode(sample), latent)
    decoded = codec.decode_batch(latents)
    assert torch.equal(decoded[3], codec.decode(latents[3]))
    strided = frames.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(codec.encode_batch(strided), latents)


def test_fit_centres_and_scales_all_channels_alike_with_a_floor():
    frames = (video(16, 4, 16, 16) // 2) + 40
    codec = PixelCodec(keep=(1, 2, 2)).fit([frames[:3], *frames[3:]])
    latents = codec.encode_batch(frames).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(12), atol=1e-4, rtol=0)
    raw = PixelCodec(keep=(1, 2, 2)).encode_batch(frames).transpose(0, 1).flatten(1)
    assert latents.std(1).max() == pytest.approx(1, abs=1e-3) and len(set(codec.std)) == 1
    torch.testing.assert_close(latents.std(1) * codec.std[0], raw.std(1))  # the proportions stay
    flat = PixelCodec().fit([torch.full((2, 4, 4, 3), 9, dtype=torch.uint8)], floor=0.1)
    assert min(flat.std) == max(flat.std) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="at least one video"):
        PixelCodec().fit([])


def test_config_round_trip_through_json():
    codec = PixelCodec().fit([video(4, 8, 8)])
    again = codec_from_config(json.loads(json.dumps(codec.to_config())))
    frames = video(4, 8, 8, seed=1)
    assert torch.equal(codec.encode(frames), again.encode(frames))
    with pytest.raises(ValueError, match="unknown"):
        codec_from_config({"type": "pixel", "blocks": [1, 1, 1]})
    with pytest.raises(ValueError, match="type must be"):
        codec_from_config({"type": "vqgan"})


def test_shapes_and_refusals():
    codec = PixelCodec()
    assert codec.latent_shape((8, 32, 32)) == (24, 4, 8, 8)
    assert codec.video_shape((24, 4, 8, 8)) == (8, 32, 32)
    for shape in [(7, 32, 32), (8, 30, 32), (8, 32, 33), (0, 4, 4), (8, 32)]:
        with pytest.raises(ValueError, match=r"multiples of the block|three positive"):
            codec.latent_shape(shape)
    with pytest.raises(ValueError, match="uint8"):
        codec.encode(video(8, 32, 32).float())
    with pytest.raises(ValueError, match="multiples of the block"):
        codec.encode(video(3, 32, 32))
    with pytest.raises(ValueError, match="latent shape"):
        codec.decode(torch.zeros(23, 1, 1, 1))
    with pytest.raises(ValueError, match="finite"):
        codec.decode(torch.full((24, 1, 1, 1), float("nan")))
    bad_means = [[0.0] * 3, [float("nan")] * 24, [None] * 24, ["loud"] * 24, [10**400] * 24, 5]
    bad_blocks = [(2.5, 4, 4), (True, 4, 4), ("2", 4, 4), (4, 4), 4, None]  # 2.5 was taken as 2
    bad_ones = [{"keep": (3, 2, 2)}, {"std": [0.0] * 24}]
    for bad in [*bad_ones, *({"mean": mean} for mean in bad_means), *({"block": block} for block in bad_blocks)]:
        with pytest.raises(ValueError):
            PixelCodec(**bad)


def test_decode_clamps():
    frames = PixelCodec().decode(torch.full((24, 2, 2, 2), 100.0))
    assert frames.dtype == torch.uint8 and set(frames.unique().tolist()) <= set(range(256))


@pytest.fixture(scope="module")
def wan_vae():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.5] * 4, latents_std=[2.0] * 4
    ).eval()


@torch.no_grad()
def test_wan_codec_is_the_vae(wan_vae):
    frames = video(5, 16, 24)
    codec = WanVAECodec(vae=wan_vae)
    latent = codec.encode(frames)
    assert tuple(latent.shape) == codec.latent_shape((5, 16, 24)) == (4, 2, 2, 3)
    assert codec.video_shape(latent.shape) == (5, 16, 24)
    pixels = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    torch.testing.assert_close(latent, wan_vae.encode(pixels).latent_dist.mode()[0])
    normalised = WanVAECodec(vae=wan_vae, normalise=True)
    torch.testing.assert_close(normalised.encode(frames), (latent - 0.5) / 2.0)
    decoded = codec.decode(latent)
    assert decoded.shape == frames.shape and decoded.dtype == torch.uint8
    shift = normalised.decode((latent - 0.5) / 2.0).int() - decoded.int()
    assert shift.abs().max() <= 1
    for shape in [(4, 16, 16), (5, 12, 16)]:
        with pytest.raises(ValueError, match=r"4k\+1"):
            codec.latent_shape(shape)


def test_wan_codec_from_a_folder(wan_vae, tmp_path):
    wan_vae.save_pretrained(tmp_path / "vae", safe_serialization=True)
    codec = codec_from_config({"type": "wan_vae", "path": str(tmp_path / "vae"), "normalise": True})
    assert codec.to_config() == {"type": "wan_vae", "path": str(tmp_path / "vae"), "normalise": True}
    frames = video(1, 8, 8)
    torch.testing.assert_close(codec.encode(frames), WanVAECodec(vae=wan_vae, normalise=True).encode(frames))
    for nowhere in (str(tmp_path / "nothing"), "Wan-AI/Wan2.1-T2V-1.3B"):  # a name on a hub is no folder
        with pytest.raises(
            ValueError, match=rf"path must be a folder with a diffusers AutoencoderKLWan, got '{nowhere}'$"
        ):
            codec_from_config({"type": "wan_vae", "path": nowhere})
    with pytest.raises(ValueError, match="neither"):
        WanVAECodec()
    with pytest.raises(ValueError, match="normalise must be true or false, got 'no'"):
        WanVAECodec(vae=wan_vae, normalise="no")
    with pytest.raises(ValueError, match="made from a path"):
        WanVAECodec(vae=wan_vae).to_config()

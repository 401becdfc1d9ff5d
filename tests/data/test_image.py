"""Pictures as bytes and files: modes, rotation, any damage."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spiking_mlp_jax.data.image import DamagedImageError, Encoded, decode_crop, decode_image, pillow_array, read_image
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.errors import InputError
from tests.support.small_sources import encoded


def test_decode_modes():
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12
    colour = np.stack([grey, grey[::-1], 255 - grey], axis=-1)
    alpha = np.full((4, 5, 1), 255, np.uint8)
    alpha[0] = 0

    np.testing.assert_array_equal(decode_image(encoded(grey), "x"), grey[..., None])
    np.testing.assert_array_equal(decode_image(encoded(colour), "x"), colour)
    black = colour.copy()
    black[0] = 0
    transparent = np.concatenate([colour, alpha], axis=-1)
    np.testing.assert_array_equal(decode_image(encoded(transparent), "x"), black)
    grey_alpha = np.concatenate([grey[..., None], alpha], axis=-1)
    assert decode_image(encoded(grey_alpha), "x").shape == (4, 5, 1)
    np.testing.assert_array_equal(decode_image(encoded(grey_alpha), "x")[0], 0)
    sixteen = grey.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_image(encoded(sixteen), "x"), grey[..., None])
    np.testing.assert_array_equal(decode_image(encoded(grey > 100), "x"), 255 * (grey > 100)[..., None])


@pytest.mark.parametrize(
    ("mode", "kind", "transparent"),
    [
        ("P", "PNG", False),
        ("P", "PNG", True),
        ("P", "GIF", False),
        ("CMYK", "JPEG", False),
        ("RGB", "JPEG", False),
    ],
)
def test_decode_to_rgb(mode, kind, transparent):
    picture = Image.new("RGB", (6, 4), (200, 100, 0)).convert(mode)
    options = {"transparency": picture.getpixel((0, 0))} if transparent else {}
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    image = decode_image(buffer.getvalue(), "x")
    assert image.shape == (4, 6, 3)
    np.testing.assert_allclose(image[1, 1].astype(int), (0, 0, 0) if transparent else (200, 100, 0), atol=30)


def test_decode_applies_the_camera_rotation():
    wide = np.zeros((2, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(wide, exif=exif), "x").shape == (6, 2, 3)


@given(st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns about odd metadata, then reads or refuses
def test_decode_any_damage(data):
    kind, options = data.draw(st.sampled_from([("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True})]))
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    content = bytearray(encoded(picture, kind, **options))
    del content[data.draw(st.integers(0, len(content))) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content), "the picture")
    except InputError as error:
        assert "the picture" in str(error)
    else:
        assert image.dtype == np.uint8
        assert image.ndim == 3


def test_read_image_names_the_path(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png"):
        read_image(tmp_path / "nowhere.png")
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"cannot decode image .*notes.png"):
        read_image(str(tmp_path / "notes.png"))


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "values",
    [
        GREY.astype(np.int32),
        GREY.astype(np.int32) * 257,
        GREY.astype(np.uint16),
        GREY.astype(np.uint16) * 257,
        GREY.astype(np.float32),
        GREY.astype(np.float32) / 255,
    ],
    ids=["int32, 8 bits", "int32, 16 bits", "uint16, 8 bits", "uint16", "float to 255", "float to 1"],
)
def test_wide_pixels_are_scaled_by_their_range(values):
    np.testing.assert_array_equal(decode_image(encoded(values, "TIFF"), "x.tif")[..., 0], GREY)
    np.testing.assert_array_equal(pillow_array(Image.fromarray(values))[..., 0], GREY)


@pytest.mark.parametrize(
    "values", [GREY.astype(np.float32) - 1, GREY * np.float32("nan"), GREY.astype(np.int32) * 70_000]
)
def test_wide_pixels_of_no_plain_range_are_refused(values):
    with pytest.raises(DamagedImageError, match=r"holds values from .*: save it with 8 or 16 bits"):
        decode_image(encoded(values, "TIFF"), "x.tif")
    with pytest.raises(DamagedImageError, match="a Pillow image holds values"):
        pillow_array(Image.fromarray(values))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + b"\x01" * 10, b"Exif\0\0II", b"Exif\0\0" + b"\xff" * 40]
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_metadata_is_not_a_broken_image(kind, exif):
    lossless = dict(lossless=True) if kind == "WEBP" else {}
    plain = encoded(GREY, kind, **lossless)
    broken = encoded(GREY, kind, exif=b"Exif\0\0" + exif, **lossless)
    np.testing.assert_array_equal(decode_image(broken, "x"), decode_image(plain, "x"))
    crops = [decode_crop(Encoded(x, "x"), lambda height, width: (2, 3, 8, 9), 16) for x in (broken, plain)]
    np.testing.assert_array_equal(*crops)


def png_chunk(kind, content, check=None):
    check = zlib.crc32(kind + content) if check is None else check
    return len(content).to_bytes(4) + kind + content + check.to_bytes(4)


BROKEN_CHUNKS = {
    "profile": png_chunk(b"iCCP", b"x"),
    "profile's checksum": png_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"a" * 200), 7),
    "text's checksum": png_chunk(b"tEXt", b"a\0b", 1),
    "long text": png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50 << 20))),
    "resolution": png_chunk(b"pHYs", b"\0\0"),
    "gamma": png_chunk(b"gAMA", b"\0"),
    "private": png_chunk(b"prVt", b"abc", 5),
}
BROKEN_SEGMENTS = {
    "profile": b"\xff\xe2\x00\x0eICC_PROFILE\0",
    "color transform": b"\xff\xee\x00\x07Adobe",
    "multi-picture": b"\xff\xe2\x00\x0eMPF\0II*\0\x08\0\0\0",
}


@pytest.mark.parametrize(
    "kind, at, broken",
    [("PNG", 33, x) for x in BROKEN_CHUNKS.values()] + [("JPEG", 2, x) for x in BROKEN_SEGMENTS.values()],
    ids=[*BROKEN_CHUNKS, *BROKEN_SEGMENTS],
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_other_broken_metadata_are_left_out(kind, at, broken):
    plain = encoded(np.stack([GREY, GREY[::-1], 255 - GREY], -1), kind)
    damaged = plain[:at] + broken + plain[at:]
    np.testing.assert_array_equal(decode_image(damaged, "x"), decode_image(plain, "x"))
    crops = [decode_crop(Encoded(x, "x"), lambda height, width: (2, 3, 8, 9), 4) for x in (damaged, plain)]
    np.testing.assert_array_equal(*crops)
    with pytest.raises(DamagedImageError):
        decode_image(damaged[: len(damaged) * 2 // 3], "x")


def test_a_line_of_pixels_is_cropped_before_it_is_resized(monkeypatch):
    line = np.full((5000, 1, 1), 7, np.uint8)
    sizes = []
    monkeypatch.setattr(
        "spiking_mlp_jax.data.transforms.resize",
        lambda image, h, w: sizes.append(h * w) or np.ones((h, w, 3), np.uint8),
    )
    for image in (line, line.transpose(1, 0, 2)):
        for mode in ("resize_crop", "resize", "pad"):
            assert fit_image(image, 224, 3, mode).shape == (224, 224, 3)
    assert max(sizes) < 2_000_000


def test_a_small_file_of_many_pixels_is_refused():
    with pytest.raises(DamagedImageError, match=r"has 9000 x 9000 pixels in [\d,]+ bytes"):
        decode_image(encoded(np.zeros((9000, 9000), bool)), "x.png")

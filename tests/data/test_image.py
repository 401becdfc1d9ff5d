"""Pictures as bytes and files: modes, rotation, any damage."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spiking_mlp_jax.data.image import decode_image, read_image
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

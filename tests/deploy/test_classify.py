"""`classify`: pictures of any kind, and that `spiking-mlp predict` says the same of them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageCms

from spiking_mlp_jax import classify, create_model, list_models
from spiking_mlp_jax.cli import main as cli
from spiking_mlp_jax.data.image import DamagedImageError
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.pixels import Pixels
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from tests.support.random_model import CLASSES, meta_for, random_model

MODE = "resize_crop"
RNG = np.random.default_rng(0)
# A photo that is not square, without sharp edges, so that JPEG changes little.
GREY = np.clip(np.add.outer(5 * np.arange(24), 4 * np.arange(31)) + RNG.integers(0, 6, (24, 31)), 0, 255).astype(
    np.uint8
)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = random_model(in_channels=3)
    folder = tmp_path_factory.mktemp("weights")
    weights.save(folder, model, meta_for(model, resize_mode=MODE, eval_resize=20))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return SpikingMLP.from_pretrained(folder)


def expected(model, image):
    """Class names and scores of uint8 [H, W, 3], computed from the definition."""
    fitted = fit_image(image, 16, 3, MODE, 20)
    logits = np.asarray(model((fitted[None].astype(np.float32) / 255 - 0.25) / 0.5), np.float64).mean(0)[0]
    powers = np.exp(logits - logits.max())
    order = np.argsort(-powers)
    return [CLASSES[i] for i in order], (powers / powers.sum())[order]


def rotated(picture):
    """A picture whose EXIF orientation says that it must be turned by 90 degrees to be upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture.transpose(Image.Transpose.ROTATE_90), {"exif": exif}


def kinds():
    """(file name, picture, options of saving, the pixels that it stands for; None: those of the decoded file)."""
    grey, colour = Image.fromarray(GREY), Image.fromarray(COLOUR)
    wide = np.repeat(GREY[..., None], 3, 2)
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:, :10] = 0
    flat = np.where(alpha[..., None] == 255, COLOUR, 0).astype(np.uint8)
    palette = colour.quantize(32)
    yield "colour.png", colour, {}, COLOUR
    yield "rgba.png", Image.fromarray(np.dstack([COLOUR, alpha])), {}, flat
    yield "grey.png", grey, {}, wide
    yield "deep.png", Image.fromarray(GREY.astype(np.uint16) * 257), {}, wide
    yield "palette.png", palette, {}, np.asarray(palette.convert("RGB"))
    yield "upright.png", *rotated(colour), COLOUR
    yield "photo.jpg", *rotated(colour), None
    yield "print.jpg", colour.convert("CMYK"), {"quality": 95}, None
    yield "lab.tiff", ImageCms.profileToProfile(colour, *profiles(), outputMode="LAB"), {}, None


def profiles():
    return ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")


@pytest.mark.parametrize("name, picture, options, pixels", list(kinds()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_picture_of_any_kind_is_its_pixels(name, picture, options, pixels, folder, model, tmp_path, capsys):
    file = tmp_path / name
    picture.save(file, **options)
    if pixels is None:
        # Decoded by Pillow alone: turned upright, in colour.
        opened = Image.open(file).convert("RGB")
        pixels = np.asarray(opened.transpose(Image.Transpose.ROTATE_270) if options.get("exif") else opened)
        assert pixels.shape == COLOUR.shape
        if name.endswith(".jpg"):
            assert np.abs(pixels.astype(int) - COLOUR).mean() < 12
    names, scores = expected(model, pixels)
    by_path, by_image, by_array = classify(model, [file, Image.open(file), pixels])
    assert [guess.name for guess in by_path] == names
    np.testing.assert_allclose([guess.score for guess in by_path], scores, atol=1e-5)
    assert by_path == by_image == by_array
    assert cli.main(["predict", str(folder), str(file), "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)["images"]
    assert [(place["class"], place["label"]) for place in printed["classes"]] == [x[:2] for x in by_path]
    np.testing.assert_allclose([place["score"] for place in printed["classes"]], scores, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"not a picture", "cut.png", "cut.jpg"], ids=str)
def test_a_file_that_is_no_picture(content, model, tmp_path):
    file = tmp_path / "x.png"
    if isinstance(content, str):
        Image.fromarray(COLOUR).save(tmp_path / content)
        content = (tmp_path / content).read_bytes()[:-200]
    file.write_bytes(content)
    with pytest.raises(DamagedImageError, match=r"x\.png"):
        classify(model, [COLOUR, file])


ARRAYS = hnp.arrays(
    st.sampled_from([np.uint8, np.float32, np.int64, np.bool_, np.uint16]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)


@given(ARRAYS)
def test_an_array_is_classified_or_refused(model, array):
    channels = (*array.shape, 1)[2:] if array.ndim == 2 else array.shape[2:]
    right = array.dtype == np.uint8 and array.ndim in (2, 3) and channels in ((1,), (3,), (4,)) and array.size
    if right:
        ((best,),) = classify(model, [array], top=1)
        assert best.name in CLASSES and 0 <= best.score <= 1
    else:
        with pytest.raises(InputError, match="an image must have"):
            classify(model, [array])


def test_grey_and_transparent_arrays(model):
    wide = np.repeat(GREY[..., None], 3, 2)
    opaque = np.dstack([COLOUR, np.full(GREY.shape, 255, np.uint8)])
    first, second, third, fourth, fifth = classify(model, [GREY, GREY[..., None], wide, COLOUR, opaque])
    assert first == second == third != fourth == fifth


@pytest.mark.parametrize(
    "pictures, options, sentence",
    [
        ("picture.png", {}, "put a single one in a list"),
        (COLOUR, {}, "put a single one in a list"),
        ([None], {}, "a path, a Pillow image or a uint8 array"),
        (["a\0b"], {}, "is not a path"),
        (["missing.png"], {}, "No such file"),
        ([COLOUR], {"top": 0}, "top must be"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(pictures, options, sentence, model):
    with pytest.raises(InputError, match=sentence):
        classify(model, pictures, **options)


def test_models_that_cannot(model):
    bare = random_model(in_channels=3)
    with pytest.raises(InputError, match="does not know how images become inputs: set model"):
        classify(bare, [COLOUR])
    bare.pixels = Pixels((0.25,) * 3, (0.5,) * 3)
    assert classify(bare, [COLOUR], top=1)[0][0].name in ("0", "1", "2")
    with pytest.raises(InputError, match="network is a int: give a SpikingMLP"):
        classify(5, [COLOUR])  # pyright: ignore
    with pytest.raises(InputError, match='did you mean "fashion_mnist"'):
        classify("fashion_mnst", [COLOUR])
    for nothing in (None, 5):
        with pytest.raises(InputError, match="expected a folder or the name of a shipped network, got"):
            SpikingMLP.from_pretrained(nothing)  # pyright: ignore
    with pytest.raises(InputError, match="filter must be a pattern"):
        list_models(5)  # pyright: ignore
    with pytest.raises(InputError, match="image_size 30 does not divide"):
        create_model("mlp_spe_t", image_size=30)
    assert classify(model, []) == []


def test_a_known_picture(request):
    model = SpikingMLP.from_pretrained("fashion_mnist")
    (guesses,) = classify(model, [request.config.rootpath / "tests/data/fashion_ankle_boot.png"], top=100)
    assert guesses[0].name == "Ankle boot" and guesses[0].label == 9
    assert len(guesses) == 10 and sum(guess.score for guess in guesses) == pytest.approx(1, abs=1e-6)


def test_many_pictures_are_each_alone(model):
    # More than are computed at a time, and not a multiple of it.
    pictures = [np.roll(COLOUR, 2 * i, 1) for i in range(37)]
    together = classify(model, pictures)
    for i in (0, 31, 32, 36):
        (alone,) = classify(model, [pictures[i]])
        np.testing.assert_allclose([g.score for g in together[i]], [g.score for g in alone], rtol=1e-5)
    assert len({found[0].score for found in together}) > 1

"""Pictures in, class names out."""

import io

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from spiking_mlp_jax import SpikingMLP, classify, cli
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.model import Pixels

SHOE = "tests/data/fashion_ankle_boot.png"


@pytest.fixture(scope="module")
def model():
    return SpikingMLP.from_pretrained("fashion_mnist")


@pytest.fixture(scope="module")
def coloured():
    """A network of colour pictures, for which colours matter."""
    return SpikingMLP.from_pretrained("cifar10")


@pytest.fixture
def photo():
    """A colour picture that is wider than high, [40, 60, 3]."""
    rows, columns = np.mgrid[:40, :60]
    return np.stack([rows * 6, columns * 4, (rows * columns) % 256], -1).astype(np.uint8)


def saved(path, array, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options) if mode else Image.fromarray(array).save(path, **options)
    return path


def same(found, expected):
    assert [guess.label for guess in found] == [guess.label for guess in expected]
    np.testing.assert_array_equal([guess.score for guess in found], [guess.score for guess in expected])


def test_a_known_picture(model, request):
    path = request.config.rootpath / SHOE
    (guesses,) = classify(model, [path], top=3)
    assert guesses[0].name == "Ankle boot" and guesses[0].label == 9
    assert len(guesses) == 3 and guesses[0].score > guesses[1].score > guesses[2].score
    (everything,) = classify(model, [path], top=100)
    assert len(everything) == 10 and sum(guess.score for guess in everything) == pytest.approx(1, abs=1e-6)


def test_the_command_says_the_same(model, request, capsys):
    path = str(request.config.rootpath / SHOE)
    assert cli.main(["predict", "fashion_mnist", path, "--top", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()[-2:]
    (guesses,) = classify(model, [path], top=2)
    assert [line.split() for line in printed] == [
        [f"{100 * guess.score:.2f}", "%", *guess.name.split()] for guess in guesses
    ]


def test_kinds_of_files(coloured, photo, tmp_path):
    (plain,) = classify(coloured, [photo])
    same(classify(coloured, [saved(tmp_path / "a.png", photo)])[0], plain)
    same(classify(coloured, [str(tmp_path / "a.png")])[0], plain)
    same(classify(coloured, [Image.fromarray(photo)])[0], plain)
    # Lying on its side, as cameras save it, and set upright by its orientation.
    for orientation, turned in ((6, np.rot90(photo)), (3, photo[::-1, ::-1]), (8, np.rot90(photo, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path / f"{orientation}.png", np.ascontiguousarray(turned), exif=exif)
        same(classify(coloured, [path])[0], plain)
        with Image.open(path) as picture:
            same(classify(coloured, [picture])[0], plain)
            assert picture.size == turned.shape[1::-1]
    opaque = np.concatenate([photo, np.full((40, 60, 1), 255, np.uint8)], -1)
    same(classify(coloured, [saved(tmp_path / "rgba.png", opaque), opaque])[0], plain)
    same(classify(coloured, [opaque])[0], plain)
    clear = opaque.copy()
    clear[:, :30, 3] = 0
    black = photo.copy()
    black[:, :30] = 0
    same(classify(coloured, [clear])[0], classify(coloured, [black])[0])


def test_a_jpeg_is_its_decoded_pixels(coloured, photo, tmp_path):
    saved(tmp_path / "photo.jpg", photo, quality=80)
    with Image.open(tmp_path / "photo.jpg") as picture:
        decoded = np.array(picture)
    same(classify(coloured, [tmp_path / "photo.jpg"])[0], classify(coloured, [decoded])[0])
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "cmyk.jpg")
    with Image.open(tmp_path / "cmyk.jpg") as picture:
        rgb = np.array(picture.convert("RGB"))
    same(classify(coloured, [tmp_path / "cmyk.jpg"])[0], classify(coloured, [rgb])[0])


def test_grey_pictures(model, coloured, photo, tmp_path):
    grey = photo[..., 1]
    (plain,) = classify(model, [grey])
    same(classify(model, [grey[..., None]])[0], plain)
    same(classify(model, [saved(tmp_path / "grey.png", grey)])[0], plain)
    same(classify(model, [saved(tmp_path / "deep.png", grey.astype(np.uint16) * 257)])[0], plain)
    indexed = Image.fromarray(grey).convert("P")
    indexed.save(tmp_path / "indexed.png")
    same(classify(model, [tmp_path / "indexed.png"])[0], plain)
    # A colour network sees three equal channels.
    same(classify(coloured, [grey])[0], classify(coloured, [np.repeat(grey[..., None], 3, -1)])[0])


def test_many_pictures_are_each_alone(model):
    pictures = [np.full((28, 28), 6 * i, np.uint8) for i in range(37)]
    for found, picture in zip(classify(model, pictures)[::9], pictures[::9], strict=True):
        (alone,) = classify(model, [picture])
        np.testing.assert_allclose([g.score for g in found], [g.score for g in alone], rtol=1e-5)
    assert classify(model, []) == []


def test_without_class_names_numbers(model, photo):
    nameless = SpikingMLP.from_pretrained("fashion_mnist")
    nameless.pixels = Pixels(model.pixels.mean, model.pixels.std)
    (guesses,) = classify(nameless, [photo], top=2)
    assert [guess.name for guess in guesses] == [str(guess.label) for guess in guesses]


def test_mistakes_are_answered_in_a_sentence(model, photo, tmp_path):
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "PNG")
    (tmp_path / "cut.png").write_bytes(file.getvalue()[:200])
    (tmp_path / "text.png").write_text("no picture")
    for picture, sentence in (
        (tmp_path / "none.png", "none.png"),
        (tmp_path, "s a directory"),
        (tmp_path / "cut.png", "Cannot decode image .*cut.png"),
        (tmp_path / "text.png", "Cannot decode image .*text.png"),
        (photo / 255, "float64, but uint8"),
        (np.zeros((2, 3, 4, 5), np.uint8), r"shape \(2, 3, 4, 5\)"),
        (np.zeros((0, 3), np.uint8), r"shape \(0, 3, 1\)"),
        (7, "is a int: give a path, a Pillow image"),
    ):
        with pytest.raises(InputError, match=sentence):
            classify(model, [picture])
    for pictures in (photo, str(tmp_path / "cut.png"), tmp_path):
        with pytest.raises(InputError, match="must be a list"):
            classify(model, pictures)
    for top in (0, True, 1.5):
        with pytest.raises(InputError, match="top must be"):
            classify(model, [photo], top=top)
    bare = SpikingMLP(model.config, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="does not say how pictures become its inputs"):
        classify(bare, [photo])

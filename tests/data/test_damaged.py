"""Images that cannot be decoded are skipped, counted and logged, up to a limit."""

import json

import numpy as np
import pytest
from PIL import Image

from spiking_mlp_jax.data.damaged import Damaged, next_decodable
from spiking_mlp_jax.data.pipeline import eval_batches, train_batches
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.data.transforms import Augment
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.train.config import default_config
from spiking_mlp_jax.train.loop import fit


@pytest.fixture
def folder(tmp_path):
    """40 + 40 pictures of a class each, one empty, one cut off and one no picture: 3 of 80."""
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(40):
                image = np.full((12, 12), 4 * number + label, np.uint8)
                Image.fromarray(image).save(tmp_path / split / name / f"{number:02}.png")
        cat = tmp_path / split / "cat"
        (cat / "05.png").write_bytes(b"")
        (cat / "17.png").write_bytes((cat / "17.png").read_bytes()[:50])
        (tmp_path / split / "dog" / "39.png").write_bytes(b"no picture")
    return tmp_path


def batches_of(folder, limit, workers=0, **more):
    said = []
    source = open_source("folder", "train", folder)
    damaged = Damaged(source, limit, said.append)
    settings = dict(batch_size=8, image_size=12, in_channels=1, augment=Augment(), seed=0, epochs=2, **more)
    return train_batches(source, damaged=damaged, workers=workers, **settings), damaged, said


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_is_taken_instead(folder, workers):
    batches, damaged, said = batches_of(folder, 0.04, workers)
    found = list(batches)
    batches.close()
    assert len(found) == 20 and found[0].keys() == {"image", "label"}
    values = np.concatenate([batch["image"][:, 0, 0, 0] for batch in found[:10]]).tolist()
    wanted = [4 * number + label for label in (0, 1) for number in range(40)]
    # 5 and 17 are replaced by 6 and 18, the last one by the first.
    for lost, instead in ((20, 24), (68, 72), (157, 0)):
        wanted[wanted.index(lost)] = instead
    assert sorted(values) == sorted(wanted)
    assert damaged.seen == {5, 17, 79}
    assert len(said) == 3 and all(line.startswith("warning: skipped corrupt image ") for line in said)
    assert {line.split()[4] for line in said} == {
        f"{folder}/train/{name}" for name in ("cat/05.png", "cat/17.png", "dog/39.png")
    }
    assert said[-1].endswith("(3 of 80 so far)")


def test_too_many(folder):
    batches, damaged, said = batches_of(folder, 0.03)
    with pytest.raises(
        InputError, match=r"cannot decode image .*png: 3 of 80 images are corrupt, more than max_bad_images"
    ):
        list(batches)
    assert len(said) == 2 and len(damaged.seen) == 3
    batches, _, said = batches_of(folder, 0.0)
    with pytest.raises(InputError, match="1 of 80 images are corrupt"):
        list(batches)
    assert not said


def test_resuming_and_other_shares_change_nothing(folder):
    whole = list(batches_of(folder, 1.0)[0])
    resumed, _, _ = batches_of(folder, 1.0)
    for _ in range(7):
        next(resumed)
    state = json.loads(json.dumps(resumed.get_state()))
    resumed, _, _ = batches_of(folder, 1.0)
    resumed.set_state(state)
    shares = [batches_of(folder, 1.0, process_index=index, process_count=2)[0] for index in (0, 1)]
    for ours, theirs in zip(resumed, whole[7:], strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
    for one, other, theirs in zip(*shares, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([one["image"], other["image"]]), theirs["image"])


def test_nothing_but_damaged_images_ends(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for number in range(8):
        (tmp_path / "train" / "cat" / f"{number}.png").write_bytes(b"")
    batches, _, _ = batches_of(tmp_path, 1.0)
    with pytest.raises(InputError, match="cannot decode image"):
        next(batches)


def test_evaluation_leaves_them_out(folder):
    source = open_source("folder", "test", folder)
    settings = dict(batch_size=32, image_size=12, in_channels=1)
    damaged = Damaged(source, 0.04, lambda text: None)
    batches = list(eval_batches(source, damaged=damaged, **settings))
    masks = np.concatenate([batch["mask"] for batch in batches])
    assert set(np.flatnonzero(~masks[:80])) == damaged.seen == {5, 17, 79}
    assert not masks[80:].any() and len(masks) == 96
    assert all(not batch["image"][~batch["mask"]].any() for batch in batches)
    with pytest.raises(InputError, match="cannot decode image"):
        list(eval_batches(source, **settings))


def test_a_run_names_them_in_its_log_and_stops_past_the_limit(folder, tmp_path):
    config = default_config()
    config.update(dataset="folder", data_dir=str(folder), num_classes=2, in_channels=1, image_size=12, patch_size=6)
    config.update(dim=6, depths=(1,), time_steps=1, batch_size=16, eval_batch_size=40, epochs=1, mean=(0.5,))
    config.update(std=(0.5,), max_bad_images=0.04, compilation_cache="off")
    result = fit(config, tmp_path / "run")
    assert result.finished
    log = (tmp_path / "run" / "log.txt").read_text()
    for split in ("train", "test"):
        assert all(
            f"skipped corrupt image {folder}/{split}/{name}" in log
            for name in ("cat/05.png", "cat/17.png", "dog/39.png")
        )
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["images"] == 77
    config.max_bad_images = 0.02
    with pytest.raises(InputError, match="more than max_bad_images"):
        fit(config, tmp_path / "other")


def test_processes_count_together(folder):
    source = open_source("folder", "train", folder)
    met: list[set[int]] = []
    said: list[str] = []

    def union(numbers):
        met.append(set(numbers))
        return {5, 17, 79}  # what all have met

    one = Damaged(source, 0.04, said.append, union)
    assert one.sift({"damaged": np.array([5, -1])}).keys() == set()
    assert one.seen == set() and said == []
    one.share()
    assert met == [{5}] and one.seen == {5, 17, 79} and len(said) == 3
    one.sift({"damaged": np.array([5, -1])})
    one.share()
    assert met == [{5}, set()] and len(said) == 3
    with pytest.raises(InputError, match=r"2 of 80 images are corrupt, more than max_bad_images=0.02"):
        Damaged(source, 0.02, said.append, union).share()


def test_the_next_decodable_image(folder):
    source = open_source("folder", "train", folder)
    assert next_decodable(source, 4)["image"][0, 0, 0] == 16
    assert next_decodable(source, 5)["image"][0, 0, 0] == 24
    assert next_decodable(source, 79)["image"][0, 0, 0] == 0

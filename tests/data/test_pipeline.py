"""Batches: exactness, determinism, resuming, shares of processes."""

import json
import os
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src import xla_bridge

from spiking_mlp_jax.data.pipeline import eval_batches, steps_per_epoch, train_batches
from spiking_mlp_jax.data.sources import open_source
from spiking_mlp_jax.data.transforms import Augment, fit_image
from spiking_mlp_jax.errors import InputError


class Numbered:
    """Image i is 4 x 4 and filled with i % 251; its label is i. Counts how often it is read."""

    class_names = ("all",)

    def __init__(self, count):
        self.count = count
        self.reads = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index, /):
        self.reads += 1
        return {"image": np.full((4, 4, 1), index % 251, np.uint8), "label": np.int32(index)}


def train(source, batch_size=4, epochs=1, seed=0, augment=Augment(), **more):  # noqa: B008 (it is frozen)
    settings = dict(batch_size=batch_size, image_size=4, in_channels=1, seed=seed, epochs=epochs, augment=augment)
    return train_batches(source, **(settings | more))


def labels(batches):
    return [batch["label"].tolist() for batch in batches]


def flat(batches):
    return [label for batch in batches for label in batch]


def assert_same_batches(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine["label"], other["label"])
        np.testing.assert_array_equal(mine["image"], other["image"])


# --- training batches


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_epochs_hold_whole_batches_of_different_images(count, batch_size, epochs, seed):
    source = Numbered(max(count, batch_size))
    steps = steps_per_epoch(source, batch_size)
    batches = labels(train(source, batch_size, epochs, seed))
    assert len(batches) == steps * epochs
    for epoch in range(epochs):
        seen = flat(batches[epoch * steps : (epoch + 1) * steps])
        assert len(seen) == steps * batch_size
        assert len(set(seen)) == len(seen)


def test_batch_format():
    batch = next(train(open_source("fashion_mnist", "test"), image_size=32, in_channels=3))
    assert batch["image"].shape == (4, 32, 32, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4,)
    assert batch["label"].dtype == np.int32


def test_order_depends_on_epoch_and_seed_only():
    source = Numbered(40)
    first = labels(train(source, epochs=3))
    assert first == labels(train(source, epochs=3))
    epochs = [flat(first[at : at + 10]) for at in (0, 10, 20)]
    other = flat(labels(train(source, seed=1)))
    assert all(sorted(order) == list(range(40)) for order in [*epochs, other])
    assert len({tuple(order) for order in [*epochs, other, range(40)]}) == 5


def test_left_over_images_change_with_the_epoch():
    batches = labels(train(Numbered(7), epochs=20))
    assert len(batches) == 20
    assert set(flat(batches)) == set(range(7))


AUGMENT = Augment(crop_padding=2, flip=True)


@pytest.mark.parametrize("step", [0, 1, 7, 8, 9, 15, 16])
def test_resuming_continues_bit_for_bit(step):
    source = open_source("fashion_mnist", "test")

    def start():
        subset = Subset(source, 35)
        return train(subset, epochs=2, augment=AUGMENT, image_size=28)

    whole = start()
    for _ in range(step):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = start()
    if step % 2:
        next(resumed)  # prefetching has begun: restoring must drop what it holds
    resumed.set_state(state)
    rest = list(whole)
    assert len(rest) == 16 - step
    assert_same_batches(resumed, rest)


class Subset:
    class_names = ("any",)

    def __init__(self, source, count):
        self.source, self.count = source, count

    def __len__(self):
        return self.count

    def __getitem__(self, index, /):
        return self.source[index]


def test_restoring_replays_nothing():
    source = Numbered(4000)
    iterator = train(source, epochs=1000)
    iterator.set_state({"batch": 999_000})
    next(iterator)
    iterator.close()
    assert source.reads < 200


def test_repeated_augmentation():
    """Copies come one after the other in the sampler's list, and as far apart as they can in the batch."""
    source, batch_size, copies = Numbered(40), 16, 3
    batches = labels(train(source, batch_size, epochs=2, copies=copies))
    assert len(batches) == 2 * (40 // batch_size)
    for epoch in (0, 1):
        order = flat(labels(train(source, 1, epochs=2)))[40 * epoch : 40 * (epoch + 1)]
        for step in (0, 1):
            slots = [order[slot // copies] for slot in range(step * batch_size, (step + 1) * batch_size)]
            assert batches[2 * epoch + step] == [*slots[0::3], *slots[1::3], *slots[2::3]]
    for batch in batches:
        places = [[at for at, label in enumerate(batch) if label == wanted] for wanted in set(batch)]
        assert max(map(len, places)) == copies
        assert min(np.diff(at).min() for at in places if len(at) > 1) >= batch_size // copies - 1
        assert all(one != other for one, other in zip(batch[::2], batch[1::2], strict=True))


def test_copies_are_augmented_differently_and_come_to_different_processes():
    source = Subset(open_source("fashion_mnist", "test"), 64)
    common = dict(batch_size=32, copies=4, augment=Augment(crop_padding=8), image_size=28)
    whole = next(train(source, **common))
    assert len({image.tobytes() for image in whole["image"]}) > 30
    assert len(set(whole["label"][:8])) > 3
    for index in range(4):
        part = next(train(source, **common, process_index=index, process_count=4))
        np.testing.assert_array_equal(part["label"], whole["label"][:8])
        np.testing.assert_array_equal(part["image"], whole["image"][8 * index : 8 * index + 8])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_global_batch(processes):
    source = Subset(open_source("fashion_mnist", "test"), 60)
    common = dict(batch_size=8, epochs=2, augment=AUGMENT, image_size=28)
    whole = train(source, **common)
    shares = [train(source, **common, process_index=index, process_count=processes) for index in range(processes)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for index, part in enumerate(parts):
            assert part["image"].shape == (8 // processes, 28, 28, 1)
            mine = slice(index * len(part["label"]), (index + 1) * len(part["label"]))
            np.testing.assert_array_equal(part["image"], batch["image"][mine])
            np.testing.assert_array_equal(part["label"], batch["label"][mine])


def test_worker_processes_change_nothing():
    source = open_source("fashion_mnist", "test")
    common = dict(batch_size=2000, epochs=1, augment=AUGMENT, image_size=32)
    expected = list(train(source, **common))
    whole = train(source, **common, workers=2)
    first = [next(whole) for _ in range(2)]
    assert_same_batches(first, expected[:2])
    state = json.loads(json.dumps(whole.get_state()))
    next(whole)
    whole.set_state(state)
    assert_same_batches(whole, expected[2:])
    whole.close()


class Witness:
    """Images whose labels say what the process that reads them can reach: 1 if no device."""

    class_names = ("devices", "none")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        hidden = os.environ.get("JAX_PLATFORMS") == "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        none = hidden and jax.config.jax_platforms == "cpu" and not xla_bridge.backends_are_initialized()
        return {"image": np.zeros((4, 4, 1), np.uint8), "label": np.int32(none)}


def test_workers_never_use_a_device():
    common = dict(batch_size=4, image_size=4, in_channels=1, workers=2)
    batches: Any = train_batches(Witness(), augment=Augment(), seed=0, epochs=1, **common)
    assert [batch["label"].tolist() for batch in batches] == [[1] * 4] * 2
    batches.close()
    assert [batch["label"].tolist() for batch in eval_batches(Witness(), **common)] == [[1] * 4] * 2
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def test_workers_and_processes_may_change_where_a_run_resumes():
    source = open_source("fashion_mnist", "test")
    common = dict(batch_size=1200, epochs=1, augment=AUGMENT, image_size=28, copies=3)
    expected = list(train(source, **common))
    step = 0
    for steps, workers, processes in ((2, 0, 1), (2, 2, 2), (1, 5, 1), (3, 0, 4)):
        shares = [
            train(source, **common, workers=workers, process_index=i, process_count=processes) for i in range(processes)
        ]
        for share in shares:
            share.set_state({"batch": step})
        for _ in range(steps):
            parts = [next(share) for share in shares]
            whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            assert_same_batches([whole], [expected[step]])
            step += 1
        for share in shares:
            share.close()
    assert step == len(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=11), "batch_size must be at most 10, the number of training images, got 11"),
        (dict(batch_size=0), "batch_size must be .*got 0"),
        (dict(batch_size=5, process_count=2), r"multiple of process_count \(2\), got"),
        (dict(process_index=2, process_count=2), "process_index must be .*got 2"),
        (dict(seed=-1), "seed must be .*got -1"),
        (dict(seed=2**32), "seed must be .*got 4294967296"),
        (dict(epochs=0), "epochs must be .*got 0"),
        (dict(workers=-1), "workers must be .*got -1"),
        (dict(copies=0), "repeats must be .*got 0"),
        (dict(copies=5), "repeats must be between 1 and batch_size \\(4\\), got 5"),
        (
            dict(augment=Augment(resize_mode="resize_crop", eval_resize=3)),
            "eval_resize must be 0 or at least image_size .*got 3",
        ),
    ],
)
def test_impossible_training_settings(change, message):
    with pytest.raises(InputError, match=message):
        train(Numbered(10), **change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(crop_padding=-1), "crop_padding must be .*got -1"),
        (
            dict(resize_mode="stretch"),
            'resize_mode must be one of pad, resize, resize_crop, got "stretch"',
        ),
        (dict(eval_resize=-5), "eval_resize must be 0 .*got -5"),
    ],
)
def test_impossible_augmentation(settings, message):
    with pytest.raises(InputError, match=message):
        Augment(**settings)


def test_unreadable_image_stops_the_iterator_with_its_name(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "broken.png").write_bytes(b"no image")
    iterator = train(open_source("folder", "train", tmp_path), batch_size=1)
    with pytest.raises(InputError, match=r"broken.png"):
        next(iterator)


# --- evaluation batches


@given(st.integers(0, 40), st.integers(1, 5), st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_evaluation_counts_each_image_once(count, local, processes):
    batch_size = local * processes
    seen = []
    lengths = set()
    for index in range(processes):
        batches = list(
            eval_batches(
                Numbered(count), batch_size=batch_size, image_size=6, in_channels=3,
                process_index=index, process_count=processes,
            )
        )  # fmt: skip
        lengths.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (local, 6, 6, 3)
            assert batch["image"].dtype == np.uint8
            assert batch["label"].shape == batch["mask"].shape == (local,)
            assert batch["label"].dtype == np.int32
            assert batch["mask"].dtype == np.bool_
            assert not batch["image"][~batch["mask"]].any()
            np.testing.assert_array_equal(batch["image"][:, 3, 3, 0], batch["label"] % 251)
            seen += batch["label"][batch["mask"]].tolist()
    assert lengths == {-(-count // batch_size)}
    assert sorted(seen) == list(range(count))


def test_evaluation_can_be_repeated_and_keeps_the_order():
    batches = eval_batches(Numbered(10), batch_size=4, image_size=4, in_channels=1)
    assert labels(batches) == labels(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]


def test_evaluation_uses_fit_image():
    source = open_source("fashion_mnist", "test")
    settings = dict(image_size=24, in_channels=3, resize_mode="resize_crop", eval_resize=26)
    batch = next(iter(eval_batches(source, batch_size=2, **settings)))
    np.testing.assert_array_equal(batch["image"][1], fit_image(source[1]["image"], 24, 3, "resize_crop", 26))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=3, process_count=2), r"multiple of process_count \(2\), got"),
        (dict(batch_size=2, resize_mode="fit"), 'resize_mode must be .*got "fit"'),
        (
            dict(batch_size=2, resize_mode="resize_crop", eval_resize=3),
            "eval_resize must be 0 or at least image_size .*got 3",
        ),
    ],
)
def test_impossible_evaluation_settings(change, message):
    with pytest.raises(InputError, match=message):
        eval_batches(Numbered(10), image_size=4, in_channels=1, **change)

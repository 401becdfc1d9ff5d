"""A trained network as a folder to share: weights, configuration, model card and checksums."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.interop.model_card import model_card
from spiking_mlp_jax.models import weights
from spiking_mlp_jax.models.spiking_mlp import SpikingMLP
from spiking_mlp_jax.utils.checksums import file_hash, write_sums
from spiking_mlp_jax.utils.files import write_whole

# As the Hub has them: letters, digits, "-", "_" and "." in both parts.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def save_pretrained(
    folder: str | os.PathLike[str],
    model: SpikingMLP,
    meta: dict[str, Any],
    *,
    name: str,
    license: str = "unknown",
    trained_on: str | None = None,
    repo: str | None = None,
) -> None:
    """Writes a folder that can be uploaded to the Hugging Face Hub as it is, over an older one if need be.

    It holds model.safetensors, config.json, README.md (the model card) and SHA256SUMS over these three. Every command
    and `SpikingMLP.from_pretrained` take it, and refuse it once a file does not fit its checksum.

    Args:
        folder: where to; it is made when missing.
        model: a trained network.
        meta: as for `weights.save`, with "data"; "result" with "accuracy" (a share) and "images" is shown on the card.
        name: of the network.
        license: identifier of the weights' licence as the Hub has them, such as "mit" or "cc-by-4.0".
        trained_on: the data in words; None: what meta says, or the data set's name.
        repo: OWNER/NAME on the Hub, for the card's download command.

    Raises:
        InputError: meta without "data", a name, licence, repo or result that cannot be shown, or a folder that cannot
            be written to, or in which a README.md or other files would be lost.
    """
    if "data" not in meta:
        raise InputError('the weights have no "data", which says how pictures become inputs: save them again with it')
    meta = {key: value for key, value in meta.items() if key != "repo"}
    meta |= {"name": name, "license": license}
    meta |= {"trained_on": trained_on} if trained_on else {}
    meta |= {"repo": repo} if repo else {}
    _check(meta)
    folder = Path(folder)
    try:
        _spare_other_files(folder)
        weights.save(folder, model, meta)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}): name another folder") from error
    write_card(folder)


def write_card(folder: Path) -> None:
    """Writes the model card and the checksums of a folder whose config.json has "name" and "license"."""
    write_whole(folder / weights.CARD, [_card(folder)])
    write_sums(folder, (weights.TENSORS, weights.CONFIG, weights.CARD))


def _card(folder: Path) -> bytes:
    config, meta = weights.read_config(folder)
    _check(meta)
    shapes = nnx.state(nnx.eval_shape(lambda: SpikingMLP(config, rngs=nnx.Rngs(0))), nnx.Param)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    hashes = {name: file_hash(folder / name) for name in (weights.TENSORS, weights.CONFIG)}
    return model_card(config, meta, parameters, hashes).encode()


def _spare_other_files(folder: Path) -> None:
    """Refuses a folder in which something would be lost: another program's files, or a card that was edited."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / name).is_file() for name in (weights.TENSORS, weights.OLD_TENSORS)):
        raise InputError(f"{folder} holds other files: name a new folder, or one that this command wrote")
    if os.path.lexists(folder / weights.CARD):
        try:
            own = (folder / weights.CARD).read_bytes() != _card(folder)
        except (InputError, OSError):
            own = True
        if own:
            raise InputError(
                f"{folder / weights.CARD} is not as this package wrote it: move it away, or name a new folder"
            )


def _check(meta) -> None:
    name, license, repo, result = (meta.get(key) for key in ("name", "license", "repo", "result"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f'the name "{name}" cannot be used on the Hub: take letters, digits, "-", "_" and "."')
    if not isinstance(license, str) or not _LICENSE.fullmatch(license):
        raise InputError(
            f'"{license}" is no identifier of a licence: take one such as "mit", "apache-2.0", "cc-by-4.0"'
        )
    parts = repo.split("/") if isinstance(repo, str) else []
    if repo is not None and not (len(parts) == 2 and all(_NAME.fullmatch(part) for part in parts)):
        raise InputError(f'"{repo}" is no repository of the Hub: give OWNER/NAME')
    if result is None:
        return
    accuracy = result.get("accuracy") if isinstance(result, dict) else None
    images = result.get("images") if isinstance(result, dict) else None
    right = isinstance(accuracy, int | float) and not isinstance(accuracy, bool) and 0 <= accuracy <= 1
    if not right or type(images) is not int or images < 1:
        raise InputError(f'"result" needs "accuracy" from 0 to 1 and a number of "images", but it is {result!r}')
    if not isinstance(result.get("dataset", ""), str) or type(result.get("step", 0)) is not int:
        raise InputError(f'"result" has a "dataset" that is no text or a "step" that is no whole number: {result!r}')

"""Receptive fields: what the mixing weights look like, and which pixels move a unit of each stage."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from spiking_mlp_jax.analysis.fields.receptive_field import (
    EffectiveField,
    Mixing,
    choose_units,
    convolution_share,
    default_layers,
    effective_field,
    field_size,
    mixing_weights,
    separable_fields,
)
from spiking_mlp_jax.analysis.report.markup import missing, percent, small_map
from spiking_mlp_jax.analysis.report.measure import Progress
from spiking_mlp_jax.analysis.report.run import Run
from spiking_mlp_jax.data.damaged import next_decodable
from spiking_mlp_jax.data.transforms import fit_image
from spiking_mlp_jax.errors import InputError
from spiking_mlp_jax.models.pixels import normalize

BLOCKS = 8  # of which the weights are shown
LARGE = 64  # pixels a side above which gradients are averaged over fewer images and units
BATCH = 4


def effective_fields(run: Run, progress: Progress) -> list[EffectiveField]:
    """Mean gradients of the middle token's units of each stage.

    Args:
        run: with a source.
        progress: called with what is done, how much of it and of how much.
    """
    source, c = run.source, run.config
    assert source is not None
    images, channels = (16, 8) if c.image_size <= LARGE else (8, 2)
    positions = np.linspace(0, len(source) - 1, images).round().astype(int).tolist()
    fitted = np.stack([fit_image(next_decodable(source, i)["image"], *run.fitting) for i in positions])
    inputs = normalize(fitted, run.data["mean"], run.data["std"])
    layers, found = default_layers(c), []
    for done, layer in enumerate(layers):
        progress("effective fields", done, len(layers))
        units = choose_units(c, layer, channels=channels)
        batches = (inputs[at : at + BATCH] for at in range(0, len(inputs), BATCH))
        found.append(effective_field(run.model, units, batches))
    progress("effective fields", len(layers), len(layers))
    return found


def receptive_fields(run: Run, effective: list[EffectiveField], without: str) -> str:
    """Mixing weights of the blocks, then effective fields.

    Args:
        run: what the page is about.
        effective: from `effective_fields`; [] if they could not be measured.
        without: HTML that says so.
    """
    mixing = mixing_weights(run.model)
    shown = mixing
    if len(mixing) > BLOCKS:
        shown = [mixing[i] for i in np.linspace(0, len(mixing) - 1, BLOCKS).round().astype(int)]
    of = "" if len(shown) == len(mixing) else f" {len(shown)} of {len(mixing)} blocks, evenly spaced."
    blocks = "".join(f'<div class="fields">{"".join(_block(one))}</div>' for one in shown)
    maps = "".join(_effective(one) for one in effective)
    about = ""
    if effective:
        count = len(effective[0].units.channels)
        about = (
            "<p>How strongly each pixel moves the spikes of the middle token: mean squared gradient through the "
            f"surrogates, over {effective[0].images} test images and {count} of the stage's channels; its square "
            f"root is drawn. The images have {run.config.image_size} pixels a side.</p>"
        )
    return (
        "<h3>Mixing weights</h3><p>A block mixes the tokens of a column by one matrix and those of a row by another; "
        "a row of a matrix is what one token takes from all. Blue weights excite, red ones inhibit. The product is the "
        "field that the middle token would have of both together. How much of a matrix's energy one profile for all "
        f"tokens, a convolution, explains is given beside what random weights reach.{of}</p>{blocks}"
        f"<h3>Effective receptive fields</h3>{about}" + (f'<div class="fields">{maps}</div>' if effective else without)
    )


def _block(mixing: Mixing):
    side = len(mixing.height)
    middle = side // 2
    random = percent((2 * side - 1) / side**2, 0)
    for what, matrix in {"height": mixing.height, "width": mixing.width}.items():
        share = percent(convolution_share(matrix), 0)
        yield small_map(matrix, mixing.block, f", along the {what}: {share} convolution (random: {random})")
    yield small_map(separable_fields(mixing.height, mixing.width)[middle, middle], mixing.block, ", product")


def _effective(field: EffectiveField) -> str:
    layer = field.units.layer.removesuffix(".spikes")
    map_of: Float[np.ndarray, "H W"] = field.map()
    try:
        size = field_size(map_of)
    except InputError:
        return missing(f"No pixel moves the middle token of {layer}.")
    told = f": half of it within {size.half:.1f} pixels of its centre, 90\u00a0% within {size.ninety:.1f}"
    return small_map(np.sqrt(map_of), layer, told)

"""What the mixing weights look like."""

from __future__ import annotations

import numpy as np

from spiking_mlp_jax.report.markup import picture, signed_map, text
from spiking_mlp_jax.report.run import Run

BLOCKS = 4


def mixing(run: Run) -> str:
    """Row and column weights of each stage, and their product for the token in the middle."""
    parts = []
    for stage, module in enumerate(run.model.stages):
        rows = np.asarray(module.blocks.token.height.kernel[...])
        columns = np.asarray(module.blocks.token.width.kernel[...])
        depth, side = rows.shape[:2]
        middle = side // 2
        shown = range(depth) if depth <= BLOCKS else np.linspace(0, depth - 1, BLOCKS).round().astype(int).tolist()
        for block in shown:
            product = np.outer(rows[block, middle], columns[block, middle])
            maps = ((rows[block], "rows"), (columns[block], "columns"), (product, "product, middle token"))
            figures = "".join(
                f'<figure class="map">{picture(signed_map(values), f"stage {stage}, block {block}: {what}", "pixels")}'
                f"<figcaption>{text(what)}</figcaption></figure>"
                for values, what in maps
            )
            parts.append(f'<h3>Stage {stage}, block {block}</h3><div class="fields">{figures}</div>')
    return "".join(parts)

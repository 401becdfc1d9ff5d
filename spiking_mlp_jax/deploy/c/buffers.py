"""The memory that exported C writes to."""

from __future__ import annotations

from spiking_mlp_jax.deploy.c.source import Source, itemsize


def buffers(source: Source) -> tuple[str, int]:
    """The static arrays, and their bytes."""
    c = source.c
    grids = [source.grid(i) for i in range(c.stages)]
    dim, side = c.stage_dim(c.stages - 1), c.stage_side(0)
    stem_steps = len(source.arrays["stage0.encode.kernel"])
    held = max([stem_steps * grids[0], *(c.time_steps * grid for grid in grids[1:])])
    bits = (c.time_steps * max(grids) + 7) // 8
    wide = c.expansion * dim
    # A comment, and the arrays that it is of: type, name, count.
    groups = [
        (
            "The potentials of a stage's encoding, which its skip connection adds in each block.",
            [(source.potential, "held", held)],
        ),
        (
            "Spikes of a stage, a bit each: [step][token][channel].",
            [("uint8_t", name, bits) for name in ("spikes", "height_spikes", "width_spikes")],
        ),
        (
            "Spikes of one token.",
            [("uint8_t", "token", (dim + 7) // 8), ("uint8_t", "hidden", (wide + 7) // 8)],
        ),
        (
            "Sums and potentials of one token, or of one row or column.",
            [
                ("int32_t", "sum", max(wide, side, c.num_classes)),
                ("int32_t", "joined", dim),
                ("int32_t", "v_first", max(dim, side)),
                ("int32_t", "v_hidden", wide),
                ("int32_t", "v_last", dim),
                *[("int32_t", "v_identity", dim)] * (c.encoding == "plain"),
            ],
        ),
    ]
    lines, size = [], 0
    for comment, arrays in groups:
        lines.append(f"// {comment}")
        for ctype, name, count in arrays:
            lines.append(f"static {ctype} {name}[{count}];")
            size += count * itemsize(ctype)
    return "\n".join(lines) + "\n", size

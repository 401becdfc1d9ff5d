"""Layers of a folded network as nodes of a NIR graph, in one of two forms.

A NIR node takes one array: Affine maps its last axis, Conv2d convolves [channels, rows, columns], and no node moves
axes. So C channels and S x S tokens are laid out such that every linear layer is one node:

    RowsForm    [C * S, 1, S]: each row of each channel is a channel of one-row images. A Conv2d maps channels and rows
                densely and is shared by the columns; mixing along a row is an Affine batched over the rest.
    DenseForm   [C * S * S]: every map is an Affine [out, in], all neurons of a layer have the same constants. Larger,
                but read by simulators of vectors.

Both are [C, S, S] in C's order, reshaped.
"""

from __future__ import annotations

import numpy as np

from spiking_mlp_jax.interop.nir.graph import Form, PerToken, Size


class RowsForm(Form):
    """Arrays [C * S, 1, S]."""

    name, per_neuron = "rows", True

    def shape(self, size):
        return size.channels * size.side, 1, size.side

    def conv(self, name, source, kernel, bias, size, stride=1, padding=0, per_token=None):
        k, _, fan_in, fan_out = kernel.shape
        side = (size.side + 2 * padding - k) // stride + 1
        # One row of pixels, padded equally on all sides: nir infers shapes for square kernels only.
        pad = max(padding, k - 1 - padding)
        shape = fan_out * side, fan_in * size.side, 2 * pad + 1, 2 * pad + 1

        def build():
            weight = np.zeros((fan_out, side, fan_in, size.side, *shape[2:]), self.dtype)
            columns = slice(pad - padding, pad - padding + k)
            for row in range(side):
                for i in range(k):
                    if 0 <= (read := row * stride + i - padding) < size.side:
                        weight[:, row, :, read, pad, columns] = kernel[i].transpose(2, 1, 0)
            return self.nir.Conv2d(
                (1, size.side),
                weight.reshape(shape),
                stride,
                pad,
                1,
                1,
                self._array(np.repeat(bias, side), shape[:1]),
            )

        self._add(name, source, int(np.prod(shape)) + shape[0], build)
        if per_token is None:
            return name
        scaled = self.shape(Size(fan_out, side))
        return self._affine(
            f"{name}_norm",
            name,
            (*scaled, side),
            lambda: self._over_tokens(per_token.scale, scaled)[..., None] * np.eye(side),
            lambda: self._over_tokens(per_token.offset, scaled),
        )

    def along(self, name, source, kernel, bias, size, axis):
        if axis == "width":
            weight = (*self.shape(size), size.side)
            return self._affine(name, source, weight, lambda: kernel.T, lambda: bias)
        rows = size.channels * size.side

        def build():
            weight = np.kron(np.eye(size.channels, dtype=self.dtype), kernel.T.astype(self.dtype))
            every = self._array(np.tile(bias, size.channels), (rows,))
            return self.nir.Conv2d((1, size.side), weight.reshape(rows, rows, 1, 1), 1, 0, 1, 1, every)

        return self._add(name, source, rows * (rows + 1), build)

    def head(self, name, source, kernel, bias, size):
        flat = f"{name}_tokens"
        self._add(flat, source, 0, lambda: self.nir.Flatten(np.array(self.shape(size)), 0, -1))
        weight = kernel.shape[1], int(np.prod(self.shape(size)))
        return self._affine(name, flat, weight, lambda: np.repeat(kernel.T, size.side**2, 1), lambda: bias)

    def _advice(self, needed):
        return f"use a network with fewer channels or tokens, or raise the limit to {needed:,} MB (--max-dense)"


class DenseForm(Form):
    """Arrays [C * S * S]."""

    name, per_neuron = "dense", False

    def shape(self, size):
        return (size.channels * size.side**2,)

    def conv(self, name, source, kernel, bias, size, stride=1, padding=0, per_token=None):
        k, _, fan_in, fan_out = kernel.shape
        side = (size.side + 2 * padding - k) // stride + 1
        shape = fan_out * side**2, fan_in * size.side**2
        token = PerToken(np.ones(side**2), np.zeros(side**2)) if per_token is None else per_token

        def weight():
            made = np.zeros((fan_out, side, side, fan_in, size.side, size.side), self.dtype)
            scale = token.scale.reshape(side, side)
            for row, column, i, j in np.ndindex(side, side, k, k):
                y, x = row * stride + i - padding, column * stride + j - padding
                if 0 <= y < size.side and 0 <= x < size.side:
                    made[:, row, column, :, y, x] = scale[row, column] * kernel[i, j].T
            return made.reshape(shape)

        return self._affine(
            name, source, shape, weight, lambda: (bias[:, None] * token.scale + token.offset).reshape(-1)
        )

    def along(self, name, source, kernel, bias, size, axis):
        one, every = np.eye(size.side, dtype=self.dtype), np.eye(size.channels, dtype=self.dtype)
        pair = (kernel.T, one) if axis == "height" else (one, kernel.T)
        spread = bias[:, None] if axis == "height" else bias
        tokens = np.broadcast_to(spread, (size.side, size.side)).reshape(-1)
        shape = self.shape(size) * 2
        return self._affine(
            name,
            source,
            shape,
            lambda: np.kron(every, np.kron(*pair).astype(self.dtype)),
            lambda: np.tile(tokens, size.channels),
        )

    def head(self, name, source, kernel, bias, size):
        weight = kernel.shape[1], *self.shape(size)
        return self._affine(name, source, weight, lambda: np.repeat(kernel.T, size.side**2, 1), lambda: bias)

    def _advice(self, needed):
        return f"use rows (without --dense), which is smaller, or raise the limit to {needed:,} MB (--max-dense)"


FORMS: dict[str, type[Form]] = {form.name: form for form in (RowsForm, DenseForm)}

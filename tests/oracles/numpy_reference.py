"""The spiking MLP and its training once more, in plain NumPy, with every derivative written by hand.

It shares no code with the package and is a judge of it: arrays are [T, B, C, H, W], and the parameters lie
in a flat dict under the official state_dict names. Everything is float64, and clarity comes before speed.

A layer is a function x -> (y, backward), where backward takes the derivative of the loss with respect to y
and returns the one with respect to x. Derivatives of parameters go to a dict on the way.
"""

import numpy as np

TIME, BATCH, CHANNEL, HEIGHT, WIDTH = range(5)
EPSILON = 1e-5
STATISTICS_MOMENTUM = 0.1
TAU, THRESHOLD, SURROGATE_ALPHA = 2.0, 1.0, 4.0
TDBN_ALPHA = 1.0


# Functions without names or state


def identity(x):
    """The layer that does nothing."""
    return x, lambda d_y: d_y


def chain(x, *layers):
    """Applies layers one after another."""
    backwards = []
    for layer in layers:
        x, backward = layer(x)
        backwards.append(backward)

    def chain_backward(d_y):
        for backward in reversed(backwards):
            d_y = backward(d_y)
        return d_y

    return x, chain_backward


def leaky_integrate_and_fire(x, tau=TAU, threshold=THRESHOLD, alpha=SURROGATE_ALPHA):
    """Spikes of x [T, ...]: hard reset to 0, sigmoid surrogate, no gradient through the reset."""
    potentials, spikes = np.empty_like(x), np.empty_like(x)
    v = np.zeros_like(x[0])
    for t in range(len(x)):
        potentials[t] = v + (x[t] - v) / tau
        spikes[t] = potentials[t] >= threshold
        v = potentials[t] * (1 - spikes[t])

    def backward(d_spikes):
        sigmoid = 1 / (1 + np.exp(-alpha * (potentials - threshold)))
        d_x = np.empty_like(x)
        d_v = np.zeros_like(x[0])
        for t in reversed(range(len(x))):
            d_h = d_spikes[t] * alpha * sigmoid[t] * (1 - sigmoid[t]) + d_v * (1 - spikes[t])
            d_x[t] = d_h / tau
            d_v = d_h * (1 - 1 / tau)
        return d_x

    return spikes, backward


def linear(x, weight, axis):
    """Multiplies one axis of x by the matrix `weight` [out, in]; backward returns (d_x, d_weight)."""
    y = np.moveaxis(np.tensordot(x, weight, (axis, 1)), -1, axis)
    others = [a for a in range(x.ndim) if a != axis]

    def backward(d_y):
        d_x = np.moveaxis(np.tensordot(d_y, weight, (axis, 0)), -1, axis)
        return d_x, np.tensordot(d_y, x, (others, others))

    return y, backward


def convolution(x, weight, stride, padding):
    """Cross-correlation of x [T, B, C, H, W] with `weight` [O, C, k, k]; backward returns (d_x, d_weight)."""
    kernel = weight.shape[-1]
    rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in x.shape[HEIGHT:])
    padded = np.pad(x, [(0, 0)] * 3 + [(padding, padding)] * 2)

    def taps():
        """For each kernel position, the elements of the padded input that it meets."""
        for i, j in np.ndindex(kernel, kernel):
            row_slice = slice(i, i + stride * (rows - 1) + 1, stride)
            column_slice = slice(j, j + stride * (columns - 1) + 1, stride)
            yield i, j, (..., row_slice, column_slice)

    y = sum(np.einsum("oc,tbchw->tbohw", weight[:, :, i, j], padded[met]) for i, j, met in taps())

    def backward(d_y):
        d_padded, d_weight = np.zeros_like(padded), np.zeros_like(weight)
        for i, j, met in taps():
            d_padded[met] += np.einsum("oc,tbohw->tbchw", weight[:, :, i, j], d_y)
            d_weight[:, :, i, j] = np.einsum("tbohw,tbchw->oc", d_y, padded[met])
        height, width = x.shape[HEIGHT:]
        return d_padded[..., padding : padding + height, padding : padding + width], d_weight

    return y, backward


def standardise(x, mean, var, axes=None):
    """(x - mean) / sqrt(var + eps). `axes`: where mean and var were taken from x itself; None: constants."""
    inverse = 1 / np.sqrt(var + EPSILON)
    z = (x - mean) * inverse

    def backward(d_z):
        if axes is None:
            return d_z * inverse
        d_mean = d_z.mean(axes, keepdims=True)
        d_var = (d_z * z).mean(axes, keepdims=True)
        return inverse * (d_z - d_mean - z * d_var)

    return z, backward


def cross_entropy(logits, labels):
    """Mean cross entropy of the time-mean logits [T, B, K], and its derivative."""
    steps, batch, _ = logits.shape
    scores = logits.mean(0)
    scores = scores - scores.max(1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    hit = np.arange(batch), labels
    d_scores = np.exp(log_p)
    d_scores[hit] -= 1
    return -log_p[hit].mean(), np.broadcast_to(d_scores / (batch * steps), logits.shape)


# Named layers and blocks


class Network:
    """Named layers of one pass: reads the state; collects firing rates, new statistics and gradients."""

    def __init__(self, state, config, train):
        self.state, self.train = state, train
        self.plain = config["model"] != "spe"
        self.norm_kind = config.get("norm", "batch")
        self.rates, self.statistics, self.gradients = {}, {}, {}

    def lif(self, name):
        """LIF neurons."""

        def layer(x):
            spikes, backward = leaky_integrate_and_fire(x)
            self.rates[name] = float(spikes.mean())
            return spikes, backward

        return layer

    def linear(self, name, axis):
        """A matrix along one axis, stored as a matrix or as a 1x1 convolution; a bias where there is one."""
        stored = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")

        def layer(x):
            y, matrix_backward = linear(x, stored.reshape(stored.shape[:2]), axis)
            if bias is not None:
                y = y + np.expand_dims(bias, [a for a in range(y.ndim) if a != axis])

            def backward(d_y):
                d_x, d_weight = matrix_backward(d_y)
                self.gradients[f"{name}.weight"] = d_weight.reshape(stored.shape)
                if bias is not None:
                    self.gradients[f"{name}.bias"] = d_y.sum(tuple(a for a in range(d_y.ndim) if a != axis))
                return d_x

            return y, backward

        return layer

    def conv(self, name, stride, padding=0):
        """A convolution without bias."""
        key = f"{name}.weight"

        def layer(x):
            y, conv_backward = convolution(x, self.state[key], stride, padding)

            def backward(d_y):
                d_x, self.gradients[key] = conv_backward(d_y)
                return d_x

            return y, backward

        return layer

    def norm(self, name, features=(CHANNEL,), layer_norm_over=None):
        """The norm with one BatchNorm feature per position on the axes `features`.

        Where `layer_norm_over` is given and the config asks for LayerNorm, it is a LayerNorm over those axes.
        """
        by_layer = self.norm_kind == "layer" and layer_norm_over is not None

        def layer(x):
            every = range(x.ndim)
            weighted = layer_norm_over if by_layer else features  # the axes of weight and bias
            pooled = weighted if by_layer else tuple(a for a in every if a not in features)  # of the statistics
            unweighted = tuple(a for a in every if a not in weighted)
            shape = [x.shape[a] if a in weighted else 1 for a in every]
            weight, bias = (self.state[f"{name}.{leaf}"] for leaf in ("weight", "bias"))

            if self.train or by_layer:
                mean, var = x.mean(pooled, keepdims=True), x.var(pooled, keepdims=True)
                z, z_backward = standardise(x, mean, var, pooled)
                if not by_layer:
                    self._record(name, mean, var, x.size // mean.size)
            else:
                mean, var = (self.state[f"{name}.running_{leaf}"].reshape(shape) for leaf in ("mean", "var"))
                z, z_backward = standardise(x, mean, var)
            y = z * weight.reshape(shape) + bias.reshape(shape)

            def backward(d_y):
                self.gradients[f"{name}.weight"] = (d_y * z).sum(unweighted).reshape(weight.shape)
                self.gradients[f"{name}.bias"] = d_y.sum(unweighted).reshape(bias.shape)
                return z_backward(d_y * weight.reshape(shape))

            return y, backward

        return lambda x: chain(x, layer, self._norm_scale(name))

    def _norm_scale(self, name):
        """What tdBN and TEBN multiply a BatchNorm's output by."""
        if self.norm_kind == "tdbn":
            return lambda x: (TDBN_ALPHA * THRESHOLD * x, lambda d_y: TDBN_ALPHA * THRESHOLD * d_y)
        if self.norm_kind != "tebn":
            return identity

        def layer(x):
            scale = np.expand_dims(self.state[f"{name}.scale"], tuple(range(1, x.ndim)))

            def backward(d_y):
                self.gradients[f"{name}.scale"] = (d_y * x).sum(tuple(range(1, x.ndim)))
                return d_y * scale

            return x * scale, backward

        return layer

    def _record(self, name, mean, var, count):
        """Running averages, with the unbiased variance."""
        for leaf, now in (("mean", mean), ("var", var * count / (count - 1))):
            key = f"{name}.running_{leaf}"
            self.statistics[key] = (1 - STATISTICS_MOMENTUM) * self.state[key] + STATISTICS_MOMENTUM * now.ravel()
        key = f"{name}.num_batches_tracked"
        self.statistics[key] = self.state[key] + 1


def spiking_patch_encoding(net, name):
    """Three nodes: n1 = c1(x), n2 = c2(x) + c12(LIF(n1)), n3 = c3(x) + n1 + c23(LIF(n2))."""

    def cell(k):
        return net.conv(f"{name}.cell2node.{k}.0", 2, 1), net.norm(f"{name}.cell2node.{k}.1")

    def edge(lif, link):
        return net.lif(f"{name}.{lif}"), net.conv(f"{name}.{link}.0", 1, 1), net.norm(f"{name}.{link}.1")

    def layer(x):
        cells, cell_backwards = zip(*(chain(x, *cell(k)) for k in range(3)), strict=True)
        n1 = cells[0]
        link12, backward12 = chain(n1, *edge("lif.0", "node1_node2"))
        n2 = cells[1] + link12
        link23, backward23 = chain(n2, *edge("lif.1", "node2_node3"))
        n3 = cells[2] + n1 + link23

        def backward(d_y):
            d_n1, d_n2, d_n3 = np.split(d_y, 3, CHANNEL)
            d_n2 = d_n2 + backward23(d_n3)
            d_n1 = d_n1 + d_n3 + backward12(d_n2)
            return sum(back(d) for back, d in zip(cell_backwards, (d_n1, d_n2, d_n3), strict=True))

        return np.concatenate((n1, n2, n3), CHANNEL), backward

    return layer


def downsampling(net, stage, patch_size):
    """What stands before a stage: the stem, spiking patch encoding, or a 2x2 convolution."""
    name = f"to_patch_embedding.{stage}"
    if stage > 0 and not net.plain:
        return spiking_patch_encoding(net, name)
    return lambda x: chain(x, net.conv(f"{name}.0", 2 if stage else patch_size), net.norm(f"{name}.1"))


def token_block(net, name):
    """Mixes along the height and along the width, and fuses both with the identity."""

    def layer(x):
        skip, skip_backward = identity(x)
        if net.plain:
            skip, skip_backward = chain(x, net.norm(f"{name}.BN"), net.lif(f"{name}.activation"))
        down, down_backward = chain(
            x,
            net.linear(f"{name}.proj_h.1", HEIGHT),
            net.norm(f"{name}.proj_h.2", (HEIGHT,), layer_norm_over=(CHANNEL, WIDTH)),
            net.lif(f"{name}.proj_h.3"),
        )
        across, across_backward = chain(
            x,
            net.linear(f"{name}.proj_w.1", WIDTH),
            net.norm(f"{name}.proj_w.2", (WIDTH,), layer_norm_over=(CHANNEL, HEIGHT)),
            net.lif(f"{name}.proj_w.3"),
        )
        joined = np.concatenate((skip, down, across), CHANNEL)
        y, fuse_backward = chain(joined, net.linear(f"{name}.fuse.0", CHANNEL), net.norm(f"{name}.fuse.1"))

        def backward(d_y):
            d_skip, d_down, d_across = np.split(fuse_backward(d_y), 3, CHANNEL)
            return skip_backward(d_skip) + down_backward(d_down) + across_backward(d_across)

        return y, backward

    return layer


def channel_block(net, name):
    """The channel MLP; its BatchNorm features are the tokens."""
    tokens = (HEIGHT, WIDTH)
    return lambda x: chain(
        x,
        net.linear(f"{name}.net.0", CHANNEL),
        net.norm(f"{name}.net.1", tokens, layer_norm_over=(CHANNEL,)),
        net.lif(f"{name}.net.2"),
        net.linear(f"{name}.net.3", CHANNEL),
        net.norm(f"{name}.net.4", tokens, layer_norm_over=(CHANNEL,)),
    )


def stage_blocks(net, stage, blocks):
    """A stage on its potential h: x = LIF(h), then each block with h as its only skip."""

    def block(h, x, n):
        """(h, x) -> x, and backward: d_x -> (d_h, d_x)."""
        token, token_backward = token_block(net, f"token_mix.{n}")(x)
        middle, middle_backward = net.lif(f"token_mix_lif.{n}")(h + token)
        channel, channel_backward = channel_block(net, f"channel_mix.{n}.1")(middle)
        y, y_backward = net.lif(f"channel_mix_lif.{n}")(h + token + channel)

        def backward(d_y):
            d_sum = y_backward(d_y)
            d_h = d_sum + middle_backward(channel_backward(d_sum))  # h and token enter both sums alike
            return d_h, token_backward(d_h)

        return y, backward

    def layer(h):
        x, first_backward = net.lif(f"to_patch_embedding_lif.{stage}")(h)
        backwards = []
        for n in blocks:
            x, backward = block(h, x, n)
            backwards.append(backward)

        def stage_backward(d_x):
            d_h = 0
            for backward in reversed(backwards):
                more, d_x = backward(d_x)
                d_h = d_h + more
            return d_h + first_backward(d_x)

        return x, stage_backward

    return layer


def token_mean(x):
    """[T, B, C, H, W] -> [T, B, C]."""
    count = x.shape[HEIGHT] * x.shape[WIDTH]
    return x.mean((HEIGHT, WIDTH)), lambda d_y: np.broadcast_to(d_y[..., None, None] / count, x.shape)


# The network and its training


def forward(state, images_nchw, config, train):
    """Returns logits [T, B, K], firing rates, new running statistics (none in evaluation), and backward.

    backward(d_logits) returns the gradients of all parameters. All dicts have official names as keys.
    `config` has model ("spe" or "conv"), T, patch_size, depths, and norm: "batch" (or absent), "layer",
    "tdbn" or "tebn".
    """
    net = Network(state, config, train)
    layers, first = [], 0
    for stage, depth in enumerate(config["depths"]):
        layers.append(downsampling(net, stage, config["patch_size"]))
        layers.append(stage_blocks(net, stage, range(first, first + depth)))
        first += depth
    layers += [net.norm("batch_norm"), token_mean, net.linear("mlp_head.1", CHANNEL)]
    logits, network_backward = chain(np.repeat(images_nchw[None], config["T"], TIME), *layers)

    def backward(d_logits):
        network_backward(d_logits)
        return dict(net.gradients)

    return logits, net.rates, net.statistics, backward


def loss_and_gradients(state, images, labels, config):
    """One training-mode pass: the loss, the gradients, and the new running statistics."""
    logits, _, statistics, backward = forward(state, images, config, train=True)
    loss, d_logits = cross_entropy(logits, labels)
    return float(loss), backward(d_logits), statistics


def sgd(state, batches, config, learning_rate, momentum, steps):
    """Trains `state` in place on `steps` pairs (images, labels), PyTorch momentum; returns the losses."""
    losses, buffers = [], {}
    for _, (images, labels) in zip(range(steps), batches, strict=False):
        loss, gradients, statistics = loss_and_gradients(state, images, labels, config)
        for name, gradient in gradients.items():
            buffers[name] = momentum * buffers.get(name, 0) + gradient
            state[name] = state[name] - learning_rate * buffers[name]
        state.update(statistics)
        losses.append(loss)
    return losses

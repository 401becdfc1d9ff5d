"""Optimisers and learning-rate schedules, with PyTorch's meaning of every number."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from spiking_mlp_jax.train.config import Config
from spiking_mlp_jax.utils.settings import usual_settings


def make_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate as a function of the step, counted from 0.

    With w the warm-up's steps, n all steps, e the steps of an epoch and s the step:
    warm-up (s < w): "linear" lr * (f + (1 - f) * s / w); "constant" lr * f; f is warmup_factor.
    Afterwards, with u = s - w: "cosine" lr / 2 * (1 + cos(pi * u / (n - w))); "step"
    lr * gamma^floor(u / (step_epochs * e)); "exponential" lr * gamma^(u / e); "constant" lr.

    Args:
        config: the experiment; learning_rate, schedule, gamma, step_epochs, epochs and warmup_* are used.
        steps_per_epoch: e.

    Returns:
        a function from the step to the learning rate.
    """
    peak = config.learning_rate
    total = max(config.epochs * steps_per_epoch, 1)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    after = {
        "cosine": lambda u: peak * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(u / max(total - warmup, 1), 1.0))),
        # Half a step is added because float32 can land just below a whole number of periods.
        "step": lambda u: peak * config.gamma ** jnp.floor((u + 0.5) / (config.step_epochs * steps_per_epoch)),
        "exponential": lambda u: peak * config.gamma ** (u / steps_per_epoch),
        "constant": lambda u: peak * jnp.ones_like(u / 1),
    }[config.schedule]
    if not warmup:
        return usual_settings()(after)
    start = config.warmup_factor
    before = {
        "linear": optax.linear_schedule(peak * start, peak, warmup),
        "constant": optax.constant_schedule(peak * start),
    }[config.warmup_method]
    return usual_settings()(optax.join_schedules([before, after], [warmup]))


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optimiser of an experiment.

    Gradients are clipped first. "sgd" and "adam" add weight_decay * parameter to the gradient as PyTorch's
    SGD and Adam do; "adamw" shrinks the parameter by learning_rate * weight_decay. Every parameter decays.

    Args:
        config: the experiment.
        steps_per_epoch: steps of an epoch, for the schedule.
    """
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    if config.optimizer == "sgd":
        parts += [*decay, optax.trace(config.momentum)] if config.momentum else decay
    elif config.optimizer == "adam":
        parts += [*decay, optax.scale_by_adam()]
    else:
        parts += [optax.scale_by_adam(), *decay]
    chain = optax.chain(*parts, optax.scale_by_learning_rate(make_schedule(config, steps_per_epoch)))

    return optax.GradientTransformation(chain.init, usual_settings()(chain.update))

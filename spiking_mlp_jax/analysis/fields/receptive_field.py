"""Receptive fields: what in an image makes a unit of the network fire.

    mixing_profiles   the token blocks' weights as 1-D profiles, and their separable 2-D products
    effective_field   input gradients through the surrogates, averaged over images; how large the fields are
    spike_triggered   spike-triggered average and covariance from sums over batches, with shifted spikes as a control
    ridge             linear fields under natural images, whose correlations must be undone
    gabor             Gabor fits and what physiologists read off them
    controls          the untrained network, shuffled pixels
    units, stimuli    which units; white noise and natural images, and the network's answers to them
    field_study       all of it for one network: `spiking-mlp probe receptive-fields`

This module gathers the public functions of those files.
"""

from spiking_mlp_jax.analysis.fields.controls import main_colour, shuffled_pixels, untrained_network
from spiking_mlp_jax.analysis.fields.effective import EffectiveField, FieldSize, effective_field, field_size
from spiking_mlp_jax.analysis.fields.gabor import Gabor, fit_gabor, render
from spiking_mlp_jax.analysis.fields.mixing_profiles import (
    Mixing,
    convolution_share,
    energy_within,
    mean_profile,
    mixing_weights,
    profiles,
    separable_fields,
)
from spiking_mlp_jax.analysis.fields.ridge import LinearFields, linear_fields
from spiking_mlp_jax.analysis.fields.spike_triggered import (
    Covariance,
    Moments,
    Significance,
    average,
    covariance,
    significance,
)
from spiking_mlp_jax.analysis.fields.stimuli import collect, natural_images, record_spikes, white_noise, window
from spiking_mlp_jax.analysis.fields.units import Units, choose_units, default_layers, responses

__all__ = [
    "Covariance",
    "EffectiveField",
    "FieldSize",
    "Gabor",
    "LinearFields",
    "Mixing",
    "Moments",
    "Significance",
    "Units",
    "average",
    "choose_units",
    "collect",
    "convolution_share",
    "covariance",
    "default_layers",
    "effective_field",
    "energy_within",
    "field_size",
    "fit_gabor",
    "linear_fields",
    "main_colour",
    "mean_profile",
    "mixing_weights",
    "natural_images",
    "profiles",
    "record_spikes",
    "render",
    "responses",
    "separable_fields",
    "shuffled_pixels",
    "significance",
    "untrained_network",
    "white_noise",
    "window",
]

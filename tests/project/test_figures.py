"""Figures that only the docs use."""

import numpy as np

from docs.figures import how_it_works
from tests.support.random_model import random_model


def test_mixing_matrices_are_the_weights():
    model = random_model(depths=(2, 1))
    panels = how_it_works.mixing_matrices(model).axes
    assert [axes.get_title().partition("\n")[0] for axes in panels[:3]] == [
        "stage0.block0.height",
        "stage0.block1.height",
        "stage1.block0.height",
    ]
    kernel = np.asarray(model.stages[0].blocks.token.width.kernel[...][1])
    np.testing.assert_array_equal(panels[4].images[0].get_array(), kernel)
    assert len(how_it_works.mixing_matrices(random_model(depths=(9,))).axes) == 2 * 8

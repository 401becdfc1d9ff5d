import numpy as np
import pytest

from spiking_mlp_jax.analysis.format_plots import Ran, formats_figure
from spiking_mlp_jax.errors import InputError


def widths(axes):
    return [bar.get_width() for bar in axes.patches]


def test_bars_show_size_accuracy_and_agreement(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file.bin"
    folder.mkdir()
    (folder / "a").write_bytes(bytes(3000))
    (folder / "b").write_bytes(bytes(1000))
    file.write_bytes(bytes(2500))
    first = np.eye(4, 3)
    other = first.copy()
    other[1] = [0, 0, 0.25]
    figure = formats_figure({"one": Ran(folder, first), "two": Ran(file, other)}, np.array([0, 1, 1, 0]))
    size, right, same, difference = figure.axes
    assert widths(size) == [4.0, 2.5]
    assert widths(right) == [75, 50]
    assert widths(same) == [100, 75]
    assert widths(difference) == [0, 1]
    assert [label.get_text() for label in size.get_yticklabels()] == ["one", "two"]


def test_formats_that_cannot_be_compared(tmp_path):
    with pytest.raises(InputError, match="no formats"):
        formats_figure({}, np.zeros(0, int))
    ran = {"one": Ran(tmp_path, np.zeros((2, 3))), "two": Ran(tmp_path, np.zeros((2, 4)))}
    with pytest.raises(InputError, match=r'"two" answered \(2, 4\) for 2 images, the first \(2, 3\)'):
        formats_figure(ran, np.zeros(2, int))
    with pytest.raises(InputError, match=r'"one" answered .* for 5 images'):
        formats_figure({"one": ran["one"]}, np.zeros(5, int))

"""The axes of an experiment's picture, as matplotlib has them before it draws."""

from matplotlib.axes import Axes

from experiments.study import drawing


def axes_of(plot: drawing.Plot) -> Axes:
    """The axes that the plot has filled."""
    return drawing.figure(plot).axes[0]


def named(axes: Axes) -> list[str]:
    """The names in its legend."""
    return axes.get_legend_handles_labels()[1]

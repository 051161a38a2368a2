"""The one look of every figure: colours, sizes, and how the load of experts is drawn.

Figures of a study are as wide as they are printed: one column of a paper in two columns, or both.
No text in them is smaller than 7 points.

Load is drawn in units of 1/E, the load of every expert at balance, on one scale (`load_norm`) for
all panels and arms that are compared: white at 1/E, blue below, vermilion above, black for an
expert without any assignment.
"""

from collections.abc import Iterable
from typing import Any

import matplotlib.colorbar
import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow, invisible
# on white paper; then again dashed.
COLORS = ('#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#56B4E9', '#000000')
DASHES = ('-', '--')
# In inches, of the narrowest common classes in two columns: \columnwidth and \textwidth.
COLUMN_WIDTH, PAGE_WIDTH = 3.25, 6.75
# Characters in an inch of 'small' and of 'medium' text.
SMALL_PER_INCH, MEDIUM_PER_INCH = 19, 16
STYLE: dict[Any, Any] = {
  'font.size': 8.5,
  'axes.labelsize': 'small',
  'xtick.labelsize': 'small',
  'ytick.labelsize': 'small',
  'figure.labelsize': 'small',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'grid.alpha': 0.3,
  'legend.frameon': False,
  'legend.fontsize': 'small',
  'legend.handlelength': 2.6,
  'legend.columnspacing': 1,
  'pdf.fonttype': 42,
}
# Of figures for a screen.
SCREEN = STYLE | {
  'font.size': 9,
  **dict.fromkeys(['axes.labelsize', 'xtick.labelsize', 'ytick.labelsize'], 'medium'),
  'figure.labelsize': 'large',
  'legend.handlelength': 3,
  'legend.columnspacing': 2,
}
# The value of one seed, next to the mean.
SEED: dict[str, Any] = {
  'ls': 'none',
  'marker': 'o',
  'markersize': 3,
  'markerfacecolor': 'white',
  'markeredgewidth': 0.7,
  'zorder': 3,
}
# The line at 1/E, or at another value that is expected without specialisation.
BALANCE: dict[str, Any] = {'color': '0.25', 'ls': '--', 'lw': 1, 'zorder': 2.5}
DEAD: dict[str, Any] = {'color': 'black', 'ls': 'none', 'marker': 'x', 'markersize': 5}
LOAD_COLORS = matplotlib.colors.LinearSegmentedColormap.from_list(
  'load', [COLORS[0], '#FFFFFF', COLORS[3]], N=257
).with_extremes(under='black', over='#7A2D00')
LOAD_LABEL = 'load, in units of 1/E (black: no assignment)'
# What a load in units of 1/E must exceed so as not to count as none.
_NONE = 1e-9


def load_norm(loads: Iterable[ArrayLike]) -> matplotlib.colors.TwoSlopeNorm:
  """Returns the scale of `LOAD_COLORS` for all loads that are compared, in units of 1/E.

  It ends at the 99.5% quantile, or at 2 if that is less; what exceeds it has a colour of its own.
  """
  values = np.concatenate([np.ravel(np.asarray(load, np.float64)) for load in loads])
  highest = max(2.0, float(np.quantile(values, 0.995)))
  return matplotlib.colors.TwoSlopeNorm(1, _NONE, highest)


def load_bar(
  figure: Figure, image: ScalarMappable, axes: Any, exceeded: bool, **layout: Any
) -> matplotlib.colorbar.Colorbar:
  """Adds the colour bar of loads, with 1/E marked.

  Args:
    figure: to draw in.
    image: one of the panels, in `LOAD_COLORS` by a `load_norm`.
    axes: of the panels that share the scale.
    exceeded: whether a load is above the scale.
    **layout: of `Figure.colorbar`.
  """
  extend = 'both' if exceeded else 'min'
  bar = figure.colorbar(image, ax=axes, label=LOAD_LABEL, extend=extend, **layout)
  highest = image.get_clim()[1]
  assert highest is not None
  above = np.asarray(matplotlib.ticker.MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(1, highest))
  above = above[(above > 0.8 + 0.2 * highest) & (above <= highest)]
  bar.set_ticks([0.5, 1, *above], labels=['0.5', '1', *(f'{value:g}' for value in above)])
  (bar.ax.axhline if bar.orientation == 'vertical' else bar.ax.axvline)(1, **BALANCE)
  return bar


def mark_balance(axes: Axes, num_experts: int) -> None:
  """Draws and labels the line of balance where the y axis is a share of assignments."""
  axes.axhline(1 / num_experts, **BALANCE)
  axes.annotate(
    '1/E',
    (1, 1 / num_experts),
    xycoords=axes.get_yaxis_transform(),
    xytext=(2, 0),
    textcoords='offset points',
    va='center',
    fontsize='small',
  )


def mark_dead(axes: Axes, loads: ArrayLike) -> None:
  """Puts a cross at the foot of each expert without assignments; experts stand along x."""
  dead = np.flatnonzero(np.asarray(loads) == 0)
  if len(dead):  # a line without points upsets the layout
    feet = np.full(len(dead), 0.04)
    axes.plot(dead, feet, transform=axes.get_xaxis_transform(), clip_on=False, **DEAD)

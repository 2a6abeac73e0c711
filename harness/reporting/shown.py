"""A sweep's table as an object for scripts and notebooks: it shows itself as in a paper, and gives numbers, text and figures.

Loads without torch, pandas or Matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.core.errors import ConfigError, unknown_name
from harness.core.sweep import Sweep
from harness.reporting.figures import figures, recipes
from harness.reporting.html import fragment
from harness.reporting.render import frame, render
from harness.reporting.table_data import TableData
from harness.storage.record import Record

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class ShownTable:
    """One table of a sweep.

    A notebook shows it as the paper's table, `print` as Markdown. `frame` has the numbers at full precision. It holds the records
    as they were read: ask for it again after another run.
    """

    def __init__(self, sweep: Sweep, data: TableData, records: Sequence[Record]) -> None:
        self.data = data
        self._sweep, self._records = sweep, tuple(records)

    @property
    def frame(self) -> pandas.DataFrame:
        """One row per row of the table, numbers scaled as printed; captions, notes and commands in `.attrs`."""
        return frame(self.data)

    def latex(self) -> str:
        """The table for a paper of one or two columns; needs the packages booktabs and graphicx."""
        return render(self.data, "latex")

    def markdown(self) -> str:
        """The table as `harness table` prints it."""
        return render(self.data, "md")

    def html(self) -> str:
        """The table as a page of its own."""
        return render(self.data, "html")

    @property
    def figure_names(self) -> list[str]:
        """The names that `figure` takes, the scores against bits first."""
        return list(figures(self._sweep, self._records))

    def figure(self, name: str = "") -> Figure:
        """A figure of the sweep by name; without one, the first: the first score against bits per weight.

        Raises ConfigError for a name that the sweep's results do not make, and where nothing is done yet.
        """
        drawing = recipes(self._sweep, self._records)
        for draw in [drawing[name]] if name in drawing else [] if name else drawing.values():
            figure = draw()
            if figure is not None:
                return figure
        known = self.figure_names
        if not known:
            raise ConfigError(
                f"sweep {self._sweep.name} has no figure yet: none of its cells has a score; run it first"
            )
        raise ConfigError(unknown_name("figure", name, known, f"sweep {self._sweep.name}"))

    def __len__(self) -> int:
        return len(self.data.rows)

    def __str__(self) -> str:
        return self.markdown()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return fragment(self.data)

    def _repr_latex_(self) -> None:
        """None: notebooks render HTML, and MathJax knows no tables."""

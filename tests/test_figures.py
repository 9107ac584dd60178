import matplotlib.pyplot as plt
import pytest

from prototypes_lib import figures
from prototypes_lib.methods import METHODS


def test_colors_of_methods_differ_and_so_do_their_markers():
    assert len(set(figures.METHOD.values())) == len(figures.METHOD)
    assert len(set(figures.MARKER.values())) == len(figures.MARKER)


def test_a_figure_without_alt_text_is_refused():
    with pytest.raises(ValueError, match="alt text"):
        figures.show(plt.figure(), alt="curve")


def test_a_shown_figure_is_closed_and_carries_its_alt_text(monkeypatch):
    seen = {}
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: seen.update(data | metadata))
    figures.use_style()
    fig, axis = plt.subplots()
    axis.plot([0, 1], [0, 1])
    alt = "A straight line from the lower left to the upper right."
    figures.show(fig, alt=alt)
    assert seen["image/png"] == {"alt": alt} and seen["text/plain"] == alt
    assert not plt.fignum_exists(fig.number)


def test_every_method_has_a_look_of_its_own():
    looks = [tuple(figures.look(name).values()) for name in (*METHODS, "untrained")]
    assert len(set(looks)) == len(looks)
    with pytest.raises(ValueError, match="no color"):
        figures.look("byol")


COLUMNS = {"kNN": {"dino": {0: 30.0, 1: 32.0}, "simdino": {0: 35.0}}, "linear": {"dino": {0: 40.0, 1: 40.0}}}


def test_a_comparison_has_a_panel_a_metric_and_a_row_a_method():
    fig = figures.compare(COLUMNS)
    location = plt.rcParams["axes.titlelocation"]
    assert [axis.get_title(loc=location) for axis in fig.axes] == ["kNN", "linear"]
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["dino", "simdino"]
    figures.plt.close(fig)


def test_its_table_has_intervals_where_there_are_seeds_and_blanks_where_there_are_none():
    lines = figures.table(COLUMNS).splitlines()
    assert lines[0] == "| method | kNN | linear |"
    assert lines[2] == "| dino | 31.0 ± 12.7 | 40.0 ± 0.0 |" and lines[3] == "| simdino | 35.0 |  |"

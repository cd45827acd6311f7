"""The frontier as a table and as a figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_rlhf.evaluation import FrontierPoint, plot_frontier, read_frontier, write_frontier
from lightning_rlhf.evaluation.plots import frontier_figure


POINTS = [
    FrontierPoint(0, 0, 0.2, 0.05, 0.0, 0.0, 0.2),
    FrontierPoint(10, 64, 0.5, 0.04, 2.5, 0.2, 0.25),
    FrontierPoint(20, 128, 0.7, None, 1 / 3, None, 0.7 - 0.1 / 3),
]


def test_the_table_reads_back_to_the_last_digit(tmp_path: Path) -> None:
    write_frontier(POINTS, tmp_path / "frontier.csv")
    assert read_frontier(tmp_path / "frontier.csv") == POINTS


def test_a_bad_table_is_named_with_its_row(tmp_path: Path) -> None:
    file = tmp_path / "frontier.csv"
    write_frontier(POINTS, file)
    file.write_text(file.read_text().replace("0.25", "quarter"))
    with pytest.raises(ValueError, match=r"frontier.csv row 2: expected numbers"):
        read_frontier(file)
    file.write_text("step,labels\n1,2\n")
    with pytest.raises(ValueError, match="missing: reward, reward_stderr, kl, kl_stderr, j"):
        read_frontier(file)


def test_the_figure_shows_points_units_errors_and_ends() -> None:
    figure = frontier_figure(POINTS)
    axes, colorbar = figure.axes
    assert "nats per sequence" in axes.get_xlabel()
    assert axes.get_ylabel() == "mean held-out reward"
    assert colorbar.get_ylabel() == "optimizer step"
    (dots, *_) = [collection for collection in axes.collections if len(collection.get_offsets()) == 3]
    assert dots.get_offsets().tolist() == [[point.kl, point.reward] for point in POINTS]
    assert dots.get_array().tolist() == [0, 10, 20]
    start, end = [text.get_text() for text in figure.legends[0].get_texts()]
    assert start == "start: step 0, 0 labels: reward 0.2 ± 0.05, KL 0, J 0.2"
    assert end == "end: step 20, 128 labels: reward 0.7, KL 0.333, J 0.667"


@pytest.mark.parametrize("points", [POINTS, POINTS[:1]])
def test_the_words_overlap_neither_the_axes_nor_each_other(points: list[FrontierPoint]) -> None:
    figure = frontier_figure(points)
    figure.canvas.draw()
    axes, colorbar = figure.axes
    boxes = [
        axes.get_tightbbox(),
        colorbar.get_tightbbox(),
        *(t.get_window_extent() for t in figure.legends[0].get_texts()),
    ]
    for number, box in enumerate(boxes):
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    plot_frontier(POINTS, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_no_points_no_figure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one point"):
        plot_frontier([], tmp_path / "frontier.png")

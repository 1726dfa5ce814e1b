"""What a reader finds on the Axes: numbers, names and order, not only that something is drawn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
)
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.svm import SVC

from mlsys import vis

matplotlib.use("Agg")

CURVES = [vis.plot_roc, vis.plot_precision_recall, vis.plot_calibration]
CLASSIFIER_PLOTS = [*CURVES, vis.plot_confusion_matrix]


@dataclass(frozen=True)
class Case:
    """A fitted model with data it has not seen."""

    model: Any
    X: pd.DataFrame
    y: pd.Series


@pytest.fixture(autouse=True)
def fresh_matplotlib() -> Iterator[None]:
    with matplotlib.rc_context():
        yield
    plt.close("all")


def features(rows: int = 240) -> pd.DataFrame:
    """`sex` decides the labels below, `fare` helps, `noise` does not."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "noise": rng.normal(size=rows),
            "sex": rng.choice(["female", "male"], rows),
            "fare": rng.normal(size=rows),
        }
    )


def merit(X: pd.DataFrame) -> np.ndarray:
    chance = np.random.default_rng(1).normal(scale=0.5, size=len(X))
    return 2.5 * (X["sex"] == "female").to_numpy() + X["fare"].to_numpy() + chance - 1.25


def fit(model: Any, X: Any, y: Any) -> Any:
    encode = make_column_transformer((OneHotEncoder(), ["sex"]), remainder="passthrough")
    return make_pipeline(encode, model).fit(X[:120], y[:120])


@pytest.fixture(scope="module")
def binary() -> Case:
    X = features()
    y = pd.Series((merit(X) > 0.5).astype(int), name="survived")
    return Case(fit(LogisticRegression(), X, y), X[120:], y[120:])


@pytest.fixture(scope="module")
def three() -> Case:
    X = features()
    y = pd.Series(np.array(["low", "mid", "high"])[np.digitize(merit(X), [-0.8, 1.2])])
    return Case(fit(LogisticRegression(), X, y), X[120:], y[120:])


@pytest.fixture(scope="module")
def regression() -> Case:
    X = features()
    y = pd.Series(merit(X))
    return Case(fit(LinearRegression(), X, y), X[120:], y[120:])


def bars(ax: Axes) -> dict[str, float]:
    """The bars from the top of the picture to the bottom, by the names beside them."""
    assert ax.yaxis_inverted()
    names = [label.get_text() for label in ax.get_yticklabels()]
    return dict(zip(names, [bar.get_width() for bar in ax.patches], strict=True))


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def curves(ax: Axes) -> list[Any]:
    """The lines of the classes, without the baseline."""
    return [line for line in ax.get_lines() if line.get_linestyle() != ":"]


def shades(ax: Axes) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def points(ax: Axes) -> np.ndarray:
    """Of shape (n, 2): what is predicted, and what is drawn over it."""
    return np.asarray(ax.collections[0].get_offsets())


# The module


def test_the_public_names_are_these() -> None:
    assert sorted(vis.__all__) == vis.__all__
    assert set(vis.__all__) == {
        "plot_calibration",
        "plot_confusion_matrix",
        "plot_feature_importance",
        "plot_missing_values",
        "plot_precision_recall",
        "plot_residuals",
        "plot_roc",
        "plot_target_balance",
        "set_style",
    }


def test_importing_the_module_imports_no_plotting_and_no_learning() -> None:
    heavy = "{'matplotlib', 'sklearn', 'scipy', 'pandas', 'polars'}"
    code = f"import sys, mlsys.vis; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "call",
    [
        vis.set_style,
        lambda: vis.plot_target_balance([0, 1]),
        lambda: vis.plot_feature_importance(None, pd.DataFrame({"a": [1]}), [1]),
    ],
)
def test_without_matplotlib_the_error_says_how_to_install_it(
    call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="uv sync --group notebook"):
        call()


# Style


def test_the_style_is_taken_by_figures_that_are_drawn_after_it() -> None:
    vis.set_style()
    figure, ax = plt.subplots()
    assert not ax.spines["top"].get_visible()
    assert figure.get_layout_engine() is not None
    ax.set_title("A title")
    assert ax.get_title(loc="left") == "A title"


def test_lines_of_the_style_differ_in_greyscale_and_by_their_dashes() -> None:
    vis.set_style()
    cycle = plt.rcParams["axes.prop_cycle"].by_key()
    greys = [np.dot(to_rgb(color), (0.299, 0.587, 0.114)) for color in cycle["color"]]
    assert min(abs(np.diff(greys))) > 0.1
    assert len(set(cycle["linestyle"])) == len(cycle["linestyle"])


def test_plots_leave_matplotlib_as_they_found_it(binary: Case, regression: Case) -> None:
    before = dict(plt.rcParams)
    for plot in CLASSIFIER_PLOTS:
        plot(binary.model, binary.X, binary.y)
    vis.plot_residuals(regression.model, regression.X, regression.y)
    vis.plot_missing_values(binary.X)
    vis.plot_target_balance(binary.y)
    vis.plot_feature_importance(binary.model, binary.X, binary.y, n_repeats=1)
    assert dict(plt.rcParams) == before


def test_every_plot_draws_on_the_axes_it_is_given_and_opens_no_other_figure(
    binary: Case, regression: Case
) -> None:
    vis.set_style()
    figure, axes = plt.subplots(2, 4, figsize=(18, 9))
    axes = list(axes.flat)
    drawn = [plot(binary.model, binary.X, binary.y, ax=axes.pop()) for plot in CLASSIFIER_PLOTS]
    drawn += [vis.plot_residuals(regression.model, regression.X, regression.y, ax=axes.pop())]
    drawn += [vis.plot_missing_values(binary.X, ax=axes.pop())]
    drawn += [vis.plot_target_balance(binary.y, ax=axes.pop())]
    drawn += [
        vis.plot_feature_importance(binary.model, binary.X, binary.y, n_repeats=1, ax=axes.pop())
    ]
    figure.canvas.draw()
    assert drawn == figure.axes[::-1]
    assert plt.get_fignums() == [figure.number]


# Target balance


@pytest.mark.parametrize(
    "target",
    [
        pd.Series([1, 0, 0, 0, None, 0, 1, 1], dtype="Int64"),
        pd.Series([1, 0, 0, 0, None, 0, 1, 1]),
        pl.Series([1, 0, 0, 0, None, 0, 1, 1]),
        pl.DataFrame({"target": [1, 0, 0, 0, None, 0, 1, 1]}),
        np.array([1, 0, 0, 0, np.nan, 0, 1, 1]),
        np.array([[1, 0, 0, 0, np.nan, 0, 1, 1]]).T,
        [1, 0, 0, 0, None, 0, 1, 1],
    ],
    ids=["Int64", "float64", "polars", "one column", "numpy", "(n, 1)", "list"],
)
def test_a_bar_is_as_long_as_its_class_has_rows_and_nulls_have_one_too(target: Any) -> None:
    ax = vis.plot_target_balance(target)
    assert list(bars(ax).items()) == [("0", 4), ("1", 3), ("(missing)", 1)]
    assert texts(ax) == ["4 (50.0%)", "3 (37.5%)", "1 (12.5%)"]
    assert [bar.get_hatch() for bar in ax.patches] == [None, None, "///"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["no", "yes", "yes"], {"no": 1, "yes": 2}),
        ([True, False, True], {"False": 1, "True": 2}),
        (pd.Series([True, None, False], dtype="boolean"), {"False": 1, "True": 1, "(missing)": 1}),
        (pd.Series(["b", "a", "b"], dtype="category"), {"a": 1, "b": 2}),
        (pl.Series(["b", None, "b"]), {"b": 2, "(missing)": 1}),
        ([0.5, 0.5, 1.0], {"0.5": 2, "1": 1}),
        (["a", 1, "a"], {"1": 1, "a": 2}),
        ([None, None], {"(missing)": 2}),
    ],
)
def test_classes_of_any_type_are_counted_in_the_order_of_their_values(
    target: Any, expected: dict
) -> None:
    assert list(bars(vis.plot_target_balance(target)).items()) == list(expected.items())


def test_rarer_classes_share_one_bar_that_looks_different() -> None:
    target = [
        name for name, rows in zip("abcde", (1, 5, 4, 2, 3), strict=True) for _ in range(rows)
    ]
    ax = vis.plot_target_balance(target, top=3)
    assert list(bars(ax).items()) == [("b", 5), ("c", 4), ("3 rarer classes", 6)]
    assert ax.patches[2].get_facecolor() != ax.patches[1].get_facecolor()


def test_the_title_names_the_target() -> None:
    assert vis.plot_target_balance(pd.Series([0], name="Survived")).get_title().endswith("Survived")
    assert vis.plot_target_balance([0]).get_title() == "Rows of each class"


def test_names_with_dollar_signs_are_no_formulas() -> None:
    ax = vis.plot_target_balance(pd.Series(["$5 to $10"], name="$ or $"))
    ax.figure.canvas.draw()
    assert ax.get_yticklabels()[0].get_text() == r"\$5 to \$10"


@pytest.mark.parametrize(
    ("target", "mend"),
    [
        ([], "no rows"),
        (np.linspace(0, 1, 50), "histogram"),
        (pd.DataFrame({"a": [1], "b": [2]}), "2 columns. Draw one at a time"),
    ],
)
def test_a_target_without_classes_is_refused_with_what_to_do(target: Any, mend: str) -> None:
    with pytest.raises(ValueError, match=mend):
        vis.plot_target_balance(target)
    assert plt.get_fignums() == []


# Missing values


HOLES = {"full": [1, 2, 3, 4], "age": [1.0, None, 3.0, 4.0], "cabin": [None, None, None, "C1"]}


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame(HOLES),
        pl.DataFrame(HOLES),
        pl.DataFrame(HOLES | {"age": [1.0, float("nan"), 3.0, 4.0]}),
    ],
    ids=["pandas", "polars", "polars with NaN"],
)
def test_columns_with_missing_values_are_drawn_from_the_worst_to_the_best(frame: Any) -> None:
    ax = vis.plot_missing_values(frame)
    assert list(bars(ax).items()) == [("cabin", 0.75), ("age", 0.25)]
    assert texts(ax) == ["75.0% (3)", "25.0% (1)"]
    assert ax.get_title() == "Missing values in 2 of 3 columns"


def test_columns_of_an_array_are_named_by_their_position() -> None:
    ax = vis.plot_missing_values(np.array([[1, np.nan], [2, 3]]))
    assert bars(ax) == {"x1": 0.5}


@pytest.mark.parametrize("frame", [pd.DataFrame({"a": [1, 2]}), pl.DataFrame({"a": ["x", "y"]})])
def test_a_frame_without_missing_values_says_so(frame: Any) -> None:
    ax = vis.plot_missing_values(frame)
    assert texts(ax) == ["No missing values in 1 column and 2 rows"]
    assert not ax.axison
    assert not ax.patches


def test_of_a_wide_frame_the_worst_columns_are_drawn_and_the_others_counted() -> None:
    holes = np.where(np.arange(1000)[:, None] < np.arange(300), np.nan, 1.0)
    frame = pd.DataFrame(holes, columns=[f"sensor_{i}" for i in range(300)])
    ax = vis.plot_missing_values(frame)
    assert list(bars(ax)) == [f"sensor_{i}" for i in range(299, 269, -1)]
    assert "the 30 columns with the most of them, of 299" in ax.get_xlabel()
    assert "299 of 300 columns" in ax.get_title()


def test_a_share_that_would_round_to_nothing_is_not_shown_as_nothing() -> None:
    ax = vis.plot_missing_values(pd.DataFrame({"a": [None] + [1.0] * 4999}))
    assert texts(ax) == ["<0.1% (1)"]


def test_long_names_keep_their_beginning_and_their_end() -> None:
    names = [f"reading_of_a_sensor_in_the_engine_room_number_{i}" for i in range(3)]
    ax = vis.plot_missing_values(pd.DataFrame(np.nan, index=[0], columns=names))
    shown = list(bars(ax))
    assert len(set(shown)) == 3
    assert all(name.startswith("reading_of") and len(name) <= 32 for name in shown)


def test_numbers_beside_the_bars_end_inside_the_axes() -> None:
    ax = vis.plot_missing_values(pd.DataFrame({"a": [None] * 40_000}))
    ax.figure.canvas.draw()
    assert ax.texts[0].get_window_extent().x1 <= ax.get_window_extent().x1


# Feature importance


def test_the_column_that_decides_comes_first_and_a_string_column_has_one_bar(
    binary: Case,
) -> None:
    ax = vis.plot_feature_importance(binary.model, binary.X, binary.y, n_repeats=5)
    assert list(bars(ax)) == ["sex", "fare", "noise"]
    sizes = list(bars(ax).values())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0.2 > abs(sizes[2])
    assert "Drop in accuracy" in ax.get_xlabel()
    assert "mean of 5 shuffles" in ax.get_xlabel()


def test_the_spread_is_the_standard_deviation_of_the_shuffles(binary: Case) -> None:
    from sklearn.inspection import permutation_importance

    found = permutation_importance(binary.model, binary.X, binary.y, n_repeats=5, random_state=0)
    ax = vis.plot_feature_importance(binary.model, binary.X, binary.y, n_repeats=5)
    [lines] = ax.collections
    segments = lines.get_segments()
    halves = [(segment[1][0] - segment[0][0]) / 2 for segment in segments]
    order = [1, 2, 0]
    assert halves == pytest.approx(found.importances_std[order])
    assert list(bars(ax).values()) == pytest.approx(found.importances_mean[order])


def test_a_model_fitted_on_polars_is_shuffled_in_polars(binary: Case) -> None:
    X, y = pl.DataFrame(features()), pl.Series("survived", (merit(features()) > 0.5).astype(int))
    model = fit(LogisticRegression(), X, y)
    ax = vis.plot_feature_importance(model, X[120:], y[120:], n_repeats=5)
    pandas = vis.plot_feature_importance(binary.model, binary.X, binary.y, n_repeats=5)
    assert list(bars(ax)) == ["sex", "fare", "noise"]
    assert bars(ax) == pytest.approx(bars(pandas))


def test_a_polars_frame_can_be_shuffled_by_samples(three: Case) -> None:
    X, y = pl.DataFrame(features()), pl.Series(three.y)
    model = fit(LogisticRegression(), X[120:], y)
    ax = vis.plot_feature_importance(model, X[120:], y, n_repeats=2, max_samples=60)
    assert next(iter(bars(ax))) == "sex"


def test_columns_of_an_array_are_shuffled_too_and_of_many_the_largest_are_drawn() -> None:
    X = np.random.default_rng(0).normal(size=(200, 6))
    model = LinearRegression().fit(X, X[:, 4] * 3 + X[:, 2])
    ax = vis.plot_feature_importance(model, X, X[:, 4] * 3 + X[:, 2], n_repeats=2, top=2)
    assert list(bars(ax)) == ["x4", "x2"]
    assert "Drop in R²" in ax.get_xlabel()
    assert "the 2 largest of 6" in ax.get_xlabel()


@pytest.mark.parametrize(
    ("scoring", "label"),
    [
        ("roc_auc", "Drop in ROC AUC"),
        ("average_precision", "Drop in average precision"),
        ("neg_log_loss", "Rise in log loss"),
        (lambda model, X, y: model.score(X, y), "Drop in score"),
    ],
)
def test_the_score_of_ones_choice_is_named(binary: Case, scoring: Any, label: str) -> None:
    ax = vis.plot_feature_importance(binary.model, binary.X, binary.y, scoring=scoring, n_repeats=2)
    assert ax.get_xlabel().startswith(label)
    assert next(iter(bars(ax))) == "sex"


# Confusion matrix


def test_a_cell_holds_the_rows_and_their_share_of_the_true_class(binary: Case) -> None:
    ax = vis.plot_confusion_matrix(binary.model, binary.X, binary.y)
    counts = confusion_matrix(binary.y, binary.model.predict(binary.X))
    shares = counts / counts.sum(axis=1, keepdims=True)
    expected = [f"{n}\n{share:.0%}" for n, share in zip(counts.flat, shares.flat, strict=True)]
    assert texts(ax) == expected
    assert shades(ax) == pytest.approx(shares)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]


def test_classes_stand_in_the_order_of_the_model_also_where_one_has_no_rows(three: Case) -> None:
    present = (three.y != "low").to_numpy()
    X = three.X[present]
    ax = vis.plot_confusion_matrix(three.model, X, three.y[present])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["high", "low", "mid"]
    assert texts(ax)[3:6] == ["0", "0", "0"]
    assert np.all(np.isfinite(shades(ax)))


def test_numbers_are_light_on_dark_cells_and_dark_on_light_ones(three: Case) -> None:
    ax = vis.plot_confusion_matrix(three.model, three.X, three.y)
    for text, share in zip(ax.texts, np.ravel(shades(ax)), strict=True):
        background = np.mean(ax.images[0].cmap(share)[:3])
        assert abs(np.mean(to_rgb(text.get_color())) - background) > 0.35


@pytest.mark.parametrize("number", [2, 3, 6])
def test_long_names_of_classes_do_not_overlap(number: int) -> None:
    case = many_classes(number)
    y = case.y.map(lambda value: f"a class with a rather long name, number {value}")
    ax = vis.plot_confusion_matrix(clone(case.model).fit(case.X, y), case.X, y)
    ax.figure.canvas.draw()
    labels = ax.get_xticklabels()
    assert {label.get_rotation() for label in labels} == {0 if number == 2 else 45}
    boxes = [label.get_window_extent() for label in labels]
    if number == 2:
        assert boxes[0].x1 < boxes[1].x0


# Curves


def test_the_legend_of_a_roc_curve_holds_the_area_and_the_chance_level(binary: Case) -> None:
    ax = vis.plot_roc(binary.model, binary.X, binary.y)
    auc = roc_auc_score(binary.y, binary.model.predict_proba(binary.X)[:, 1])
    assert legend(ax) == [f"survived = 1 (AUC = {auc:.3f})", "Chance level (AUC = 0.500)"]
    assert [list(data) for data in ax.get_lines()[-1].get_data()] == [[0, 1], [0, 1]]
    assert "survived = 1" in ax.get_ylabel()


def test_the_legend_of_precision_and_recall_holds_the_average_precision_and_the_prevalence(
    binary: Case,
) -> None:
    ax = vis.plot_precision_recall(binary.model, binary.X, binary.y)
    found = average_precision_score(binary.y, binary.model.predict_proba(binary.X)[:, 1])
    share = binary.y.mean()
    assert legend(ax) == [f"survived = 1 (AP = {found:.3f})", f"Chance level (AP = {share:.3f})"]
    assert set(ax.get_lines()[-1].get_ydata()) == {share}


def test_a_calibration_curve_stands_beside_the_diagonal(binary: Case) -> None:
    ax = vis.plot_calibration(binary.model, binary.X, binary.y, n_bins=4)
    curve, diagonal = ax.get_lines()
    chances = binary.model.predict_proba(binary.X)[:, 1]
    groups = np.array_split(np.argsort(chances), 4)
    assert curve.get_xdata() == pytest.approx([chances[rows].mean() for rows in groups])
    truth = binary.y.to_numpy()
    assert curve.get_ydata() == pytest.approx([truth[rows].mean() for rows in groups])
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    brier = brier_score_loss(binary.y, chances)
    assert legend(ax) == [f"survived = 1 (Brier score {brier:.3f})", "Perfect calibration"]


def test_groups_of_equal_width_are_named_so(binary: Case) -> None:
    ax = vis.plot_calibration(binary.model, binary.X, binary.y, strategy="uniform")
    assert "equal width" in ax.get_xlabel()


@pytest.mark.parametrize("plot", CURVES)
def test_each_of_several_classes_has_a_curve_against_the_rest(plot: Callable, three: Case) -> None:
    ax = plot(three.model, three.X, three.y)
    assert [text.split(" (")[0] for text in legend(ax)[:3]] == [
        "class high",
        "class low",
        "class mid",
    ]
    assert len(curves(ax)) == 3


def test_the_areas_of_several_classes_are_those_of_each_against_the_rest(three: Case) -> None:
    ax = vis.plot_roc(three.model, three.X, three.y)
    chances = three.model.predict_proba(three.X)
    for position, name in enumerate(three.model.classes_):
        area = roc_auc_score(three.y == name, chances[:, position])
        assert legend(ax)[position] == f"class {name} (AUC = {area:.3f})"


def test_each_of_several_classes_has_a_chance_level_of_precision(three: Case) -> None:
    ax = vis.plot_precision_recall(three.model, three.X, three.y)
    levels = [line.get_ydata()[0] for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert levels == pytest.approx([(three.y == name).mean() for name in ("high", "low", "mid")])
    assert legend(ax)[3:] == ["Chance level of each class"]


@pytest.mark.parametrize("plot", CURVES)
def test_classes_can_be_chosen(plot: Callable, binary: Case, three: Case) -> None:
    assert legend(plot(binary.model, binary.X, binary.y, classes=[0]))[0].startswith("survived = 0")
    ax = plot(three.model, three.X, three.y, classes=["mid", "low"])
    assert [text.split(" (")[0] for text in legend(ax)[:2]] == ["class mid", "class low"]


@pytest.mark.parametrize("plot", CURVES)
def test_a_class_without_rows_has_no_curve(plot: Callable, three: Case) -> None:
    present = (three.y != "low").to_numpy()
    ax = plot(three.model, three.X[present], three.y[present])
    assert [text.split(" (")[0] for text in legend(ax)[:2]] == ["class high", "class mid"]


def many_classes(number: int, name: str = "") -> Case:
    X = pd.DataFrame({"a": np.arange(number * 4) // 4, "b": np.tile([0, 1, 2, 3], number)})
    y = X["a"].astype(str).radd(name) if name else X["a"]
    return Case(RandomForestClassifier(5, max_depth=3, random_state=0).fit(X, y), X, y)


@pytest.mark.parametrize("plot", CURVES)
def test_ten_curves_differ_by_more_than_their_hue(plot: Callable) -> None:
    case = many_classes(10)
    ax = plot(case.model, case.X, case.y)
    ax.figure.canvas.draw()
    drawn = curves(ax)
    assert len({line.get_marker() for line in drawn}) >= 9
    looks = {(line.get_marker(), line.get_color(), line.get_linestyle()) for line in drawn}
    assert len(looks) == 10


@pytest.mark.parametrize("plot", CURVES)
@pytest.mark.parametrize("number", [4, 10])
def test_a_long_legend_of_long_names_lies_below_the_plot_and_within_the_figure(
    plot: Callable, number: int
) -> None:
    case = many_classes(number, "a class whose name nobody has cut short, number ")
    ax = plot(case.model, case.X, case.y)
    ax.figure.canvas.draw()
    legend, label = ax.get_legend().get_window_extent(), ax.xaxis.label.get_window_extent()
    assert legend.y1 <= label.y0
    assert legend.y0 >= 0
    assert legend.x1 <= ax.figure.bbox.x1


@pytest.mark.parametrize("plot", CURVES)
def test_more_classes_than_can_be_told_apart_are_to_be_chosen_from(plot: Callable) -> None:
    case = many_classes(11)
    with pytest.raises(ValueError, match=r"more than 10 curves .* classes=\[\.\.\.\]"):
        plot(case.model, case.X, case.y)
    assert len(curves(plot(case.model, case.X, case.y, classes=[3, 7]))) == 2


@pytest.mark.parametrize("model", [RidgeClassifier(), SVC()])
def test_a_model_without_probabilities_is_ranked_by_its_decisions(
    model: Any, binary: Case, three: Case
) -> None:
    for case, average in ((binary, None), (three, "mid")):
        X, y = case.X[["fare", "noise"]], case.y
        model.fit(X, y)
        scores = model.decision_function(X)
        scores = scores if average is None else scores[:, 2]
        area = roc_auc_score(y == (average or 1), scores)
        assert f"(AUC = {area:.3f})" in legend(vis.plot_roc(model, X, y))[-2]


@pytest.mark.parametrize("plot", [vis.plot_roc, vis.plot_confusion_matrix])
@pytest.mark.parametrize(
    "convert",
    [
        lambda y: y.astype(bool),
        lambda y: y.astype(float),
        lambda y: y.astype("Int64"),
        lambda y: y.to_frame(),
        lambda y: pl.Series("survived", y.to_numpy()),
        lambda y: y.tolist(),
    ],
    ids=["bool", "float", "Int64", "frame", "polars", "list"],
)
def test_labels_that_equal_those_of_the_fit_are_taken_for_them(
    plot: Callable, convert: Callable, binary: Case
) -> None:
    plain = plot(binary.model, binary.X, binary.y)
    ax = plot(binary.model, binary.X, convert(binary.y))
    assert texts(ax) == texts(plain)
    for line, expected in zip(ax.get_lines(), plain.get_lines(), strict=True):
        assert line.get_xydata() == pytest.approx(expected.get_xydata())


@pytest.mark.parametrize("plot", CLASSIFIER_PLOTS)
@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("pandas", ["no", "yes"]),
        ("polars", [False, True]),
        ("numpy", [-1, 1]),
        ("polars", ["n", "y"]),
    ],
)
def test_models_are_drawn_whatever_they_were_fitted_on(
    plot: Callable, kind: str, labels: list
) -> None:
    X = features()[["fare", "noise"]]
    y = pd.Series(np.array(labels)[(merit(features()) > 0.5).astype(int)], name="target")
    if kind == "polars":
        X, y = pl.DataFrame(X), pl.Series("target", y.tolist())
    if kind == "numpy":
        X, y = X.to_numpy(), y.to_numpy()
    model = LogisticRegression().fit(X, y)
    ax = plot(model, X, y)
    if plot is vis.plot_confusion_matrix:
        assert [label.get_text() for label in ax.get_xticklabels()] == list(map(str, labels))
    else:
        name = "class" if kind == "numpy" else "target ="
        assert legend(ax)[0].startswith(f"{name} {labels[1]} (")


def test_a_target_whose_name_begins_with_an_underscore_is_in_the_legend(binary: Case) -> None:
    ax = vis.plot_roc(binary.model, binary.X, binary.y.rename("_survived"))
    assert legend(ax)[0].startswith("survived = 1")


# What can't be drawn


@pytest.mark.parametrize("plot", CLASSIFIER_PLOTS)
def test_a_regressor_is_sent_to_its_own_plot(plot: Callable, regression: Case) -> None:
    with pytest.raises(ValueError, match=r"Pipeline is no classifier.*plot_residuals"):
        plot(regression.model, regression.X, regression.y)


@pytest.mark.parametrize("plot", CLASSIFIER_PLOTS)
def test_a_model_that_is_not_fitted_is_to_be_fitted(plot: Callable, binary: Case) -> None:
    with pytest.raises(ValueError, match=r"not fitted\. Call fit"):
        plot(LogisticRegression(), binary.X, binary.y)


@pytest.mark.parametrize("plot", CLASSIFIER_PLOTS)
def test_a_model_of_several_targets_is_refused(plot: Callable, binary: Case) -> None:
    y = np.column_stack((binary.y, 1 - binary.y))
    model = RandomForestClassifier(2).fit(binary.X[["fare"]], y)
    with pytest.raises(ValueError, match=r"predicts 2 targets\. Draw one at a time"):
        plot(model, binary.X[["fare"]], y)


@pytest.mark.parametrize("plot", CLASSIFIER_PLOTS)
@pytest.mark.parametrize(
    ("change", "mend"),
    [
        (lambda y: y.map({0: "0", 1: "1"}), r"y holds '0', '1', but the model .* 0, 1\."),
        (lambda y: y.where(y == 1), "missing values. Leave these rows out of X and y"),
        (lambda y: np.column_stack((y, y)), "y has 2 columns"),
        (lambda y: y[:-1], "inconsistent numbers of samples"),
    ],
    ids=["other type", "nulls", "two columns", "a row less"],
)
def test_labels_that_do_not_fit_are_named_and_leave_no_figure(
    plot: Callable, change: Callable, mend: str, binary: Case
) -> None:
    with pytest.raises(ValueError, match=mend):
        plot(binary.model, binary.X, change(binary.y))
    assert plt.get_fignums() == []


@pytest.mark.parametrize("plot", CURVES)
def test_a_curve_needs_rows_of_two_classes(plot: Callable, binary: Case) -> None:
    alive = (binary.y == 1).to_numpy()
    with pytest.raises(ValueError, match=r"y holds 1 and nothing else.*stratify"):
        plot(binary.model, binary.X[alive], binary.y[alive])
    with pytest.raises(ValueError, match="y holds no rows"):
        plot(binary.model, binary.X[:0], binary.y[:0])


@pytest.mark.parametrize("plot", CURVES)
def test_a_chosen_class_must_be_one_that_occurs(plot: Callable, three: Case) -> None:
    with pytest.raises(ValueError, match="classes names 'top', but y holds 'high', 'low', 'mid'"):
        plot(three.model, three.X, three.y, classes=["top"])


def test_a_classifier_without_probabilities_is_to_be_calibrated(binary: Case) -> None:
    model = RidgeClassifier().fit(binary.X[["fare"]], binary.y)
    with pytest.raises(ValueError, match=r"no probabilities.*CalibratedClassifierCV"):
        vis.plot_calibration(model, binary.X[["fare"]], binary.y)


@pytest.mark.parametrize("plot", [vis.plot_roc, vis.plot_precision_recall])
def test_a_classifier_without_scores_can_not_be_ranked(plot: Callable, three: Case) -> None:
    X, y = three.X[["fare"]], three.y

    class Unranked(NearestCentroid):
        predict_proba = decision_function = property()

    with pytest.raises(ValueError, match=r"Unranked has no predict_proba.*plot_confusion_matrix"):
        plot(Unranked().fit(X, y), X, y)


def test_decisions_between_pairs_of_classes_are_no_scores_of_classes() -> None:
    case = many_classes(4)
    model = SVC(decision_function_shape="ovo").fit(case.X, case.y)
    with pytest.raises(ValueError, match='decision_function_shape="ovr"'):
        vis.plot_roc(model, case.X, case.y)


# Residuals


def test_residuals_are_actual_minus_predicted_and_the_title_holds_the_error(
    regression: Case,
) -> None:
    ax = vis.plot_residuals(regression.model, regression.X, regression.y)
    predicted = regression.model.predict(regression.X)
    assert points(ax)[:, 0] == pytest.approx(predicted)
    assert points(ax)[:, 1] == pytest.approx(regression.y.to_numpy() - predicted)
    fit = f"R² {r2_score(regression.y, predicted):.3f}"
    error = f"mean absolute error {mean_absolute_error(regression.y, predicted):.3g}"
    assert ax.get_title() == f"Residuals: {fit}, {error}"
    assert set(ax.get_lines()[0].get_ydata()) == {0}


def test_actual_values_can_be_drawn_against_predicted_ones(regression: Case) -> None:
    ax = vis.plot_residuals(
        regression.model, regression.X, regression.y, kind="actual_vs_predicted"
    )
    assert points(ax)[:, 1] == pytest.approx(regression.y.to_numpy())
    assert ax.get_ylabel() == "Actual value"


def test_of_many_rows_a_part_is_drawn_but_the_error_is_of_all() -> None:
    X = np.arange(3000.0)[:, None]
    y = pl.Series("price", X[:, 0] * 1000 + np.tile([-500, 500], 1500))
    ax = vis.plot_residuals(LinearRegression().fit(X, y), X, y)
    ax.figure.canvas.draw()
    assert len(points(ax)) == 1000
    assert "1,000 of the 3,000 rows are drawn" in ax.get_xlabel()
    assert ax.get_title().endswith("mean absolute error 500")
    assert "1,200,000" in [label.get_text() for label in ax.get_xticklabels()]


def test_an_output_of_several_is_to_be_chosen(regression: Case) -> None:
    X = regression.X[["fare"]]
    y = np.column_stack((X["fare"] * 2, X["fare"] ** 2))
    model = LinearRegression().fit(X, y)
    with pytest.raises(ValueError, match=r"2 outputs\. Choose one: output=0"):
        vis.plot_residuals(model, X, y)
    ax = vis.plot_residuals(model, X, y, output=1)
    assert points(ax)[:, 0] == pytest.approx(model.predict(X)[:, 1])


def test_predictions_of_millions_are_told_apart_on_their_axis(regression: Case) -> None:
    X, y = regression.X[["fare"]], np.asarray(regression.y) * 1e6
    ax = vis.plot_residuals(LinearRegression().fit(X, y), X, y, kind="actual_vs_predicted")
    ax.figure.canvas.draw()
    assert {label.get_text()[-1] for label in ax.get_xticklabels()} <= {"M", "0"}
    assert ax.get_title().count("\n") == 1


def test_classes_of_a_column_with_a_long_name_keep_names_of_their_own() -> None:
    X = np.linspace(0, 1, 30).reshape(-1, 1)
    kinds = np.repeat(["Bronze customers", "Gold customers", "Silver customers"], 10)
    y = pd.Series(kinds, name="loyalty_programme_tier")
    ax = vis.plot_roc(LogisticRegression().fit(X, y), X, y)
    names = [text.get_text().partition(" (")[0] for text in ax.get_legend().get_texts()]
    assert names[:3] == [f"class {kind}" for kind in dict.fromkeys(kinds)]


def test_a_share_of_missing_values_is_drawn_as_a_share_of_all() -> None:
    few = vis.plot_missing_values(pd.DataFrame({"a": [None, 1.0, 1.0, 1.0]}))
    many = vis.plot_missing_values(pd.DataFrame({"a": [None, None, None, 1.0]}))
    assert few.patches[0].get_width() / few.get_xlim()[1] == pytest.approx(
        many.patches[0].get_width() / many.get_xlim()[1] / 3, rel=0.05
    )


@pytest.mark.parametrize("output", [None, 0])
def test_one_output_in_a_column_of_its_own_is_drawn(regression: Case, output: int | None) -> None:
    X, y = regression.X[["fare"]], np.asarray(regression.y)
    model = LinearRegression().fit(X, y.reshape(-1, 1))
    assert model.predict(X).shape == (len(y), 1)

    ax = vis.plot_residuals(model, X, y, output=output)

    plain = vis.plot_residuals(LinearRegression().fit(X, y), X, y)
    assert points(ax) == pytest.approx(points(plain))


def test_an_output_that_is_not_there_is_refused(regression: Case) -> None:
    X, y = regression.X[["fare"]], np.asarray(regression.y)
    for answers in (y, y.reshape(-1, 1)):
        model = LinearRegression().fit(X, answers)
        with pytest.raises(ValueError, match="has 1 output: there is no output 1"):
            vis.plot_residuals(model, X, y, output=1)
    both = np.column_stack((y, y))
    with pytest.raises(ValueError, match="has 2 outputs: there is no output 2"):
        vis.plot_residuals(LinearRegression().fit(X, both), X, both, output=2)


def test_residuals_of_a_classifier_or_of_missing_values_are_refused(
    binary: Case, regression: Case
) -> None:
    with pytest.raises(ValueError, match=r"is a classifier\. Use plot_confusion_matrix"):
        vis.plot_residuals(binary.model, binary.X, binary.y)
    with pytest.raises(ValueError, match="y has 120 missing values"):
        vis.plot_residuals(regression.model, regression.X, regression.y * np.nan)
    assert plt.get_fignums() == []

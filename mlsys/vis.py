"""The plots of a model report, one call each, on a fitted model and the data it is judged on.

    set_style()
    plot_target_balance(train["Survived"])
    plot_missing_values(train)
    plot_feature_importance(model, X_test, y_test)
    plot_roc(model, X_test, y_test)

Every function draws on `ax`, or on a new figure where none is given, and returns the Axes; none
of them shows or saves the figure. `X` is a pandas or polars frame or an array of shape (n, k),
whatever the model was fitted on; `y` is a Series or an array of n values.

Curves differ by line and marker, not by hue alone, so a report survives a greyscale printer and
a colour-blind reader. Metrics and curves are scikit-learn's own, drawn by its display classes.
matplotlib and scikit-learn are imported when a plot is drawn, not with this module.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Literal

    import pandas as pd
    import polars as pl
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    type Rows = pd.DataFrame | pl.DataFrame | ArrayLike
    type Values = pd.Series | pl.Series | ArrayLike

__all__ = [
    "plot_calibration",
    "plot_confusion_matrix",
    "plot_feature_importance",
    "plot_missing_values",
    "plot_precision_recall",
    "plot_residuals",
    "plot_roc",
    "plot_target_balance",
    "set_style",
]

# Dark and light alternate, so that neighbours stay apart in greyscale; and any two stay apart
# (CIE76 of 20 and more) where red, green or blue cones are missing, by the model of Machado et al.
_COLORS = ("#0b3c5d", "#e08e00", "#a63d2f", "#2a9d8f", "#93bdf0")
_LINES = ("-", "--", "-.", (0, (7, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = (None, "o", "s", "^", "D", "v", "P", "X", "<", "*")
_MAIN = _COLORS[0]
_BAR = "#6a9bc3"
_PALE = "#e3e3e3"
_BASELINE = {"color": "#6b6b6b", "linestyle": ":", "linewidth": 1.4, "marker": None}
_SCORES = {"f1": "F1", "r2": "R²", "roc_auc": "ROC AUC"}
_MAX_CURVES = len(_MARKERS)
# Letters of a label that is not shortened.
_LONGEST_LABEL = 32
_LETTER = 0.08  # inches, of the widest letters
_WIDTH = 7.0
_SQUARE = (5.6, 5.6)


# Style


def set_style() -> None:
    """Sets matplotlib's style for the rest of the session: call it once, at the top of a notebook.

    It changes `matplotlib.rcParams`; `matplotlib.rcdefaults()` takes it back.
    """
    _pyplot().rcParams.update(_style())


def _style() -> dict[str, Any]:
    from cycler import cycler

    return {
        "axes.axisbelow": True,
        "axes.edgecolor": "#4d4d4d",
        "axes.grid": True,
        "axes.labelsize": 10,
        "axes.prop_cycle": cycler(color=_COLORS) + cycler(linestyle=_LINES),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "figure.figsize": (_WIDTH, 4.2),
        "font.size": 10,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.8,
        "hatch.color": "#6b6b6b",
        "image.cmap": "cividis",
        "legend.fontsize": 9,
        "legend.framealpha": 0.9,
        "lines.linewidth": 1.8,
        "savefig.dpi": 160,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
    }


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ImportError(
            "mlsys.vis draws with matplotlib, which is not installed. Run "
            "`uv sync --group notebook`."
        ) from error
    return plt


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    plt = _pyplot()
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _label(ax: Axes, title: str, xlabel: str, ylabel: str = "") -> Axes:
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return ax


# Data


def plot_target_balance(target: Values, *, top: int = 20, ax: Axes | None = None) -> Axes:
    """Draws a bar per class with its number of rows and its share of all rows.

    Args:
        target: n labels of any type. Nulls (None, NaN, NaT, NA) get a bar of their own.
        top: bars of classes at most; rarer classes share one.

    Raises:
        ValueError: there are no rows or several columns, or the values are numbers on a scale
            and not classes.
    """
    target = _column(target)
    counts, missing = _count_classes(target)
    rows = sum(counts.values()) + missing
    if not rows:
        raise ValueError("The target has no rows, so there is nothing to count.")
    classes, rest = _fold(_in_order(counts), top)
    bars = classes + rest + ([("(missing)", missing)] if missing else [])
    ax = _axes(ax, _bars_size(len(bars)))
    labels, sizes = zip(*bars, strict=True)
    texts = [f"{size:,} ({_percent(size / rows)})" for size in sizes]
    for bar in _draw_bars(ax, labels, sizes, texts)[len(classes) :]:
        bar.set(facecolor=_PALE, edgecolor=_BAR)
    if missing:
        ax.patches[-1].set_hatch("///")
    name = getattr(target, "name", None)
    title = f"Rows of each class of {_short(str(name))}" if name else "Rows of each class"
    return _label(ax, title, f"Number of rows, and share of all {rows:,}")


def _column(target: Values) -> Values:
    shape = np.shape(target)
    if len(shape) == 1:
        return target
    if shape[1] != 1:
        raise ValueError(f"The target has {shape[1]} columns. Draw one at a time.")
    return target[target.columns[0]] if hasattr(target, "columns") else np.ravel(target)


def _count_classes(target: Values) -> tuple[Counter, int]:
    import pandas as pd

    values = target.to_list() if hasattr(target, "to_list") else np.asarray(target).tolist()
    counts = Counter(value for value in values if not pd.isna(value))
    if len(counts) > _MAX_CURVES and any(_is_fraction(value) for value in counts):
        raise ValueError(
            f"The target holds {len(counts)} different numbers with fractions, a scale and not "
            "classes. Draw a histogram of it, or cut it into classes first."
        )
    return counts, len(values) - counts.total()


def _is_fraction(value: object) -> bool:
    return isinstance(value, float) and not value.is_integer()


def _in_order(counts: Counter) -> list[tuple[str, int]]:
    """The classes as scikit-learn orders them, by value and not by size."""
    try:
        values = sorted(counts)
    except TypeError:
        values = sorted(counts, key=str)
    return [(_text(value), counts[value]) for value in values]


def _fold(bars: list[tuple[str, int]], top: int) -> tuple[list, list]:
    """The bars of single classes, and one for the rarer ones where there are more than `top`."""
    if len(bars) <= top:
        return bars, []
    bars = sorted(bars, key=lambda bar: -bar[1])
    rare = bars[top - 1 :]
    return bars[: top - 1], [(f"{len(rare):,} rarer classes", sum(size for _, size in rare))]


def plot_missing_values(frame: Rows, *, top: int = 30, ax: Axes | None = None) -> Axes:
    """Draws the share of missing values (null, None, NaN, NaT) of each column that has any.

    Args:
        frame: a pandas or polars frame, or an array of shape (n, k).
        top: columns at most, those with the largest share.
    """
    names, counts, rows = _count_missing(frame)
    affected = int((counts > 0).sum())
    order = np.argsort(-counts, kind="stable")[: min(affected, top)]
    ax = _axes(ax, _bars_size(max(len(order), 2)))
    if not affected:
        return _say(ax, f"No missing values in {_columns(len(names))} and {rows:,} rows")
    shares = counts[order] / rows
    texts = [
        f"{_percent(share)} ({count:,})" for share, count in zip(shares, counts[order], strict=True)
    ]
    _draw_bars(ax, [names[i] for i in order], shares, texts, longest=1)
    label = f"Share and number of the {rows:,} rows without a value"
    if affected > top:
        label += f"\n(the {top} columns with the most of them, of {affected:,})"
    return _label(ax, f"Missing values in {affected:,} of {_columns(len(names))}", label)


def _count_missing(frame: Rows) -> tuple[list[str], np.ndarray, int]:
    if hasattr(frame, "fill_nan"):  # polars
        counts = frame.fill_nan(None).null_count().row(0)
        return list(frame.columns), np.array(counts, dtype=int), frame.height
    import pandas as pd

    if not hasattr(frame, "iloc"):
        array = np.asarray(frame)
        frame = pd.DataFrame(array, columns=_column_names(array))
    return [str(name) for name in frame.columns], frame.isna().sum().to_numpy(), len(frame)


def _columns(number: int) -> str:
    return "1 column" if number == 1 else f"{number:,} columns"


def _say(ax: Axes, message: str) -> Axes:
    ax.set_axis_off()
    ax.text(0.5, 0.5, message, ha="center", va="center", transform=ax.transAxes, fontsize="large")
    return ax


# Any model


def plot_feature_importance(
    model: Any,
    X: Rows,
    y: Values | None,
    *,
    top: int = 20,
    scoring: str | Callable | None = None,
    n_repeats: int = 10,
    max_samples: int | float = 1.0,
    n_jobs: int | None = None,
    random_state: int | None = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draws how much the model's score drops when a column's values are shuffled among the rows.

    Columns of `X` are shuffled before the pipeline sees them, so a string column has one bar and
    not one per category. Of two columns that say the same, neither drops the score by much.

    Args:
        model: any fitted estimator or pipeline with a `score`, or with `scoring`.
        X: n rows and k columns, better held out than trained on.
        y: n labels or values, (n, m) for m outputs; None for a model without a target.
        top: bars at most, those with the largest drop.
        scoring: a scorer, or the name of one; the model's own `score` by default.
        n_repeats: shuffles of each column. The model predicts k times `n_repeats` times.
        max_samples: rows (int) or share of rows (float) for each shuffle, for large data.
        n_jobs: processes at once; None is one.
        random_state: seed of the shuffles.
    """
    from sklearn.inspection import permutation_importance

    _pyplot()  # A library that is missing is better named before the shuffles than after.
    target = None if y is None else _values(y)
    names = _column_names(X)
    X, scorer = _shuffled(X, model, scoring)
    found = permutation_importance(
        model,
        X,
        target,
        scoring=scorer,
        n_repeats=n_repeats,
        max_samples=max_samples,
        n_jobs=n_jobs,
        random_state=random_state,
    )
    order = np.argsort(-found.importances_mean, kind="stable")[:top]
    ax = _axes(ax, _bars_size(len(order)))
    drops, spread = found.importances_mean[order], found.importances_std[order]
    _draw_bars(ax, [names[i] for i in order], drops, spread=spread)
    label = f"{_drop_in(model, scoring)}\n(mean of {n_repeats} shuffles, ± one standard deviation"
    if len(names) > top:
        label += f"; the {top} largest of {len(names):,}"
    return _label(ax, "What shuffling each column costs", f"{label})")


def _shuffled(X: Rows, model: Any, scoring: str | Callable | None) -> tuple[Any, Any]:
    """What scikit-learn is to shuffle, and the scorer that goes with it.

    It would turn a polars frame into an array without names or types, so of such a frame it
    shuffles the row numbers, and the scorer builds the frame they stand for.
    """
    if not hasattr(X, "fill_nan"):
        return X, scoring
    from sklearn.metrics import check_scoring

    scorer = check_scoring(model, scoring=scoring)
    numbers = np.tile(np.arange(X.height)[:, None], (1, X.width))

    def score(model: Any, numbers: np.ndarray, y: np.ndarray | None) -> float:
        return scorer(model, _gather(X, numbers), y)

    return numbers, score


def _gather(frame: pl.DataFrame, numbers: np.ndarray) -> pl.DataFrame:
    return frame.select(
        column.gather(numbers[:, position]) for position, column in enumerate(frame)
    )


def _drop_in(model: Any, scoring: str | Callable | None) -> str:
    from sklearn.base import is_classifier, is_regressor

    if isinstance(scoring, str):
        rises = scoring.startswith("neg_")
        name = scoring.removeprefix("neg_")
        name = _SCORES.get(name, name.replace("_", " "))
        return f"Rise in {name}" if rises else f"Drop in {name}"
    if scoring is not None or hasattr(model, "scorer_"):
        return "Drop in score"
    if is_classifier(model):
        return "Drop in accuracy"
    return "Drop in R²" if is_regressor(model) else "Drop in score"


# Classifiers


def plot_confusion_matrix(model: Any, X: Rows, y: Values, *, ax: Axes | None = None) -> Axes:
    """Draws, for each true class, how many of its rows were predicted as which class.

    A cell holds the number of rows and their share of the true class, that is of the row of the
    matrix; the shade is that share.

    Args:
        model: a fitted classifier.
        X: n rows and k columns.
        y: n true labels, of the classes the model was fitted on.

    Raises:
        ValueError: the model is no classifier, or `y` has nulls or labels unknown to it.
    """
    from sklearn.metrics import ConfusionMatrixDisplay
    from sklearn.utils import check_consistent_length

    truth, predicted = _labels(model, y), model.predict(X)
    check_consistent_length(truth, predicted)
    names = [_short(_text(value), 24) for value in model.classes_.tolist()]
    abreast = _LETTER * max(map(len, names)) * len(names)
    side = 2 + max(2.4, 0.6 * len(names), min(4.5, abreast))
    ax = _axes(ax, (side, side))
    display = ConfusionMatrixDisplay.from_predictions(
        truth,
        predicted,
        labels=model.classes_,
        display_labels=names,
        values_format="d",
        cmap="Blues",
        colorbar=False,
        ax=ax,
        text_kw={"fontsize": 10 if len(names) <= 8 else 8},
    )
    _show_shares(display)
    if abreast > _inches(ax):
        ax.tick_params(axis="x", labelrotation=45)
        ax.set_xticks(ax.get_xticks(), names, ha="right", rotation_mode="anchor")
    _rule_cells(ax, len(names))
    label = "Predicted class\n(rows, and their share of the true class)"
    return _label(ax, "Predictions for each true class", label, "True class")


def _show_shares(display: Any) -> None:
    counts = display.confusion_matrix
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    display.im_.set_data(shares)
    display.im_.set_clim(0, 1)
    for (cell, text), share in zip(np.ndenumerate(display.text_), shares.flat, strict=True):
        percent = f"\n{share:.0%}" if counts[cell] else ""
        text.set(text=f"{counts[cell]:,}{percent}", color="white" if share > 0.55 else "black")


def _rule_cells(ax: Axes, number: int) -> None:
    edges = np.arange(number + 1) - 0.5
    ax.grid(False)
    ax.set_xticks(edges, minor=True)
    ax.set_yticks(edges, minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def plot_roc(
    model: Any, X: Rows, y: Values, *, classes: Sequence | None = None, ax: Axes | None = None
) -> Axes:
    """Draws the ROC curve with its area (AUC), beside the line of a guess.

    Args:
        model: a fitted classifier with `predict_proba` or `decision_function`.
        X: n rows and k columns.
        y: n true labels, of the classes the model was fitted on.
        classes: those to draw, each against all others: by default `classes_[1]` of two
            classes, and each of more.

    Raises:
        ValueError: the model is no classifier or has no scores, `y` has nulls, unknown labels
            or a single class, or there are more classes than curves can be told apart (10).
    """
    from sklearn.metrics import RocCurveDisplay

    curves = _one_against_rest(model, X, y, classes, _scores)
    ax = _axes(ax, _curves_size(curves))
    for curve in curves:
        display = RocCurveDisplay.from_predictions(
            curve.truth, curve.scores, pos_label=True, ax=ax, curve_kwargs=curve.style
        )
        display.line_.set_label(f"{curve.name} (AUC = {display.roc_auc:.3f})")
    ax.plot((0, 1), (0, 1), **_BASELINE, label="Chance level (AUC = 0.500)")
    _share_axes(ax, "lower right", curves)
    return _label(
        ax,
        "Rows found against false alarms (ROC)",
        "False positive rate\n(share of other rows that are false alarms)",
        f"True positive rate\n(share of {_the_class(curves)} that is found)",
    )


def plot_precision_recall(
    model: Any, X: Rows, y: Values, *, classes: Sequence | None = None, ax: Axes | None = None
) -> Axes:
    """Draws precision against recall with the average precision (AP), beside the level of a guess.

    Args, errors: as `plot_roc`.
    """
    from sklearn.metrics import PrecisionRecallDisplay

    curves = _one_against_rest(model, X, y, classes, _scores)
    ax = _axes(ax, _curves_size(curves))
    for curve in curves:
        display = PrecisionRecallDisplay.from_predictions(
            curve.truth, curve.scores, pos_label=True, ax=ax, curve_kwargs=curve.style
        )
        display.line_.set_label(f"{curve.name} (AP = {display.average_precision:.3f})")
    _draw_prevalence(ax, curves)
    _share_axes(ax, "lower left", curves)
    return _label(
        ax,
        "Precision at each level of recall",
        f"Recall\n(share of {_the_class(curves)} that is found)",
        f"Precision\n(share of the rows picked that are {_the_class(curves)})",
    )


def _draw_prevalence(ax: Axes, curves: list[_Curve]) -> None:
    shares = [curve.truth.mean() for curve in curves]
    single = len(shares) == 1
    label = f"Chance level (AP = {shares[0]:.3f})" if single else "Chance level of each class"
    for share in shares:
        ax.axhline(share, **_BASELINE, label=label)
        label = None


def plot_calibration(
    model: Any,
    X: Rows,
    y: Values,
    *,
    classes: Sequence | None = None,
    n_bins: int = 10,
    strategy: Literal["quantile", "uniform"] = "quantile",
    ax: Axes | None = None,
) -> Axes:
    """Draws how often what the model gives a probability happened, beside the diagonal.

    The legend holds the Brier score: the mean squared difference of probability and outcome.

    Args:
        model: a fitted classifier with `predict_proba`.
        X: n rows and k columns.
        y: n true labels, of the classes the model was fitted on.
        classes: as in `plot_roc`.
        n_bins: points of a curve.
        strategy: `quantile` puts the same number of rows behind each point, `uniform` the same
            width of probability.

    Raises:
        ValueError: as `plot_roc`, or the model has no `predict_proba`.
    """
    from sklearn.calibration import CalibrationDisplay
    from sklearn.metrics import brier_score_loss

    curves = _one_against_rest(model, X, y, classes, _probabilities)
    ax = _axes(ax, _curves_size(curves))
    for curve in curves:
        brier = brier_score_loss(curve.truth, curve.scores, pos_label=True)
        style = {**curve.style, "marker": curve.style["marker"] or "o", "markevery": 1}
        CalibrationDisplay.from_predictions(
            curve.truth,
            curve.scores,
            n_bins=n_bins,
            strategy=strategy,
            pos_label=True,
            ref_line=False,
            ax=ax,
            label=f"{curve.name} (Brier score {brier:.3f})",
            **style,
        )
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.plot((0, 1), (0, 1), **_BASELINE, label="Perfect calibration")
    _share_axes(ax, "upper left", curves)
    one, same = _the_class(curves), "size" if strategy == "quantile" else "width"
    return _label(
        ax,
        "How often predictions came true",
        f"Predicted probability of {one}\n(mean of up to {n_bins} groups of equal {same})",
        f"Share of the group that is {one}",
    )


@dataclass(frozen=True)
class _Curve:
    """One class against the rest: n truths (bool), n scores, and how its line looks."""

    name: str
    truth: np.ndarray
    scores: np.ndarray
    style: dict[str, Any]


def _one_against_rest(
    model: Any, X: Rows, y: Values, classes: Sequence | None, rank: Callable
) -> list[_Curve]:
    from sklearn.utils import check_consistent_length

    labels = _labels(model, y)
    known = model.classes_.tolist()
    wanted = [known.index(value) for value in _choose(known, labels, classes)]
    scores = rank(model, X)
    check_consistent_length(labels, scores)
    return [
        _Curve(_name(y, known[i]), labels == model.classes_[i], scores[:, i], style)
        for i, style in zip(wanted, _line_styles(), strict=False)
    ]


def _name(y: Values, value: object) -> str:
    # A legend leaves out what begins with an underscore.
    column = str(getattr(y, "name", None) or "").lstrip("_")
    told = f"{column} = {_text(value)}"
    # Shortened, the classes of a long column would be told apart by their ends alone.
    fits = column and len(told) <= _LONGEST_LABEL
    return _short(told if fits else f"class {_text(value)}")


def _choose(known: list, labels: np.ndarray, classes: Sequence | None) -> list:
    present = set(labels.tolist())
    if len(present) < 2:
        raise ValueError(
            f"y holds {_listed(present) or 'no rows'} and nothing else, but a curve needs rows "
            "of two classes. Give more rows, or split them with stratify=y."
        )
    if classes is None:
        # A class without a row has no curve.
        classes = known[1:] if len(known) == 2 else [value for value in known if value in present]
    _check_known(set(classes), present, "classes names", "y holds")
    if len(classes) > _MAX_CURVES:
        raise ValueError(
            f"There are {len(classes)} classes, and more than {_MAX_CURVES} curves can't be told "
            "apart. Choose some with classes=[...]."
        )
    return list(classes)


def _line_styles() -> Iterator[dict[str, Any]]:
    for position, marker in enumerate(_MARKERS):
        yield {
            "color": _COLORS[position % len(_COLORS)],
            "linestyle": _LINES[(position + position // len(_COLORS)) % len(_LINES)],
            "linewidth": 1.8,
            "marker": marker,
            "markersize": 5,
            "markevery": 0.12,
        }


def _probabilities(model: Any, X: Rows) -> np.ndarray:
    if not hasattr(model, "predict_proba"):
        raise ValueError(
            f"{_kind(model)} gives no probabilities. Fit it inside a CalibratedClassifierCV."
        )
    return model.predict_proba(X)


def _scores(model: Any, X: Rows) -> np.ndarray:
    """Probabilities, or decisions where there are none: one column for each class."""
    if hasattr(model, "predict_proba"):
        return model.predict_proba(X)
    if not hasattr(model, "decision_function"):
        raise ValueError(
            f"{_kind(model)} has no predict_proba and no decision_function, so its rows can't be "
            "ranked. Use plot_confusion_matrix, or another classifier."
        )
    scores = model.decision_function(X)
    scores = np.column_stack((-scores, scores)) if scores.ndim == 1 else scores
    if scores.shape[1] != len(model.classes_):
        raise ValueError(
            f"{_kind(model)} decides between pairs of classes. Fit it with "
            'decision_function_shape="ovr".'
        )
    return scores


def _labels(model: Any, y: Values) -> np.ndarray:
    """The true labels as the model's own: 1.0 and True become 1 where it knows 1."""
    _check_classifier(model)
    labels = _values(y)
    if labels.ndim != 1:
        raise ValueError(f"y has {labels.shape[1]} columns. Draw one target at a time.")
    known = {value: number for number, value in enumerate(model.classes_.tolist())}
    labels = labels.tolist()
    _check_known(set(labels), set(known), "y holds", "the model was fitted on")
    return model.classes_[[known[label] for label in labels]]


def _check_classifier(model: Any) -> None:
    from sklearn.base import is_classifier

    if not is_classifier(model):
        raise ValueError(
            f"{_kind(model)} is no classifier. For a regressor there is plot_residuals."
        )
    if not hasattr(model, "classes_"):
        raise ValueError(f"{_kind(model)} is not fitted. Call fit first.")
    if isinstance(model.classes_, list):
        raise ValueError(
            f"{_kind(model)} predicts {len(model.classes_)} targets. Draw one at a time, with a "
            "model fitted on it alone."
        )


def _check_known(given: set, known: set, gives: str, knows: str) -> None:
    unknown = given - known
    if unknown:
        raise ValueError(
            f"{gives} {_listed(unknown)}, but {knows} {_listed(known)}. Use the same labels, of "
            "the same type."
        )


def _listed(values: Iterable, limit: int = 5) -> str:
    names = sorted(map(repr, values))
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def _curves_size(curves: list[_Curve]) -> tuple[float, float]:
    width, height = _SQUARE
    return (width, height + 1 + 0.24 * len(curves)) if _crowded(curves) else (width, height)


def _crowded(curves: list[_Curve]) -> bool:
    # So many lines of a legend would lie on some of the curves.
    return len(curves) > 3


def _the_class(curves: list[_Curve]) -> str:
    return curves[0].name if len(curves) == 1 else "the class"


def _share_axes(ax: Axes, corner: str, curves: list[_Curve]) -> None:
    from matplotlib.ticker import MultipleLocator, PercentFormatter
    from matplotlib.transforms import ScaledTranslation

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MultipleLocator(0.2))
        axis.set_major_formatter(PercentFormatter(1))
    if _crowded(curves):
        # Below the numbers and the two lines of the label, where names of any length have room.
        below = ax.transAxes + ScaledTranslation(0, -0.68, ax.figure.dpi_scale_trans)
        ax.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0)
    else:
        ax.legend(loc=corner)


# Regressors


def plot_residuals(
    model: Any,
    X: Rows,
    y: Values,
    *,
    kind: Literal["residual_vs_predicted", "actual_vs_predicted"] = "residual_vs_predicted",
    output: int | None = None,
    subsample: int | None = 1000,
    random_state: int | None = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draws what is left of the target after the prediction, against the prediction.

    The title holds R² and the mean absolute error, of all rows.

    Args:
        model: a fitted regressor.
        X: n rows and k columns.
        y: n true values, or (n, m) for m outputs.
        kind: `actual_vs_predicted` draws the true values instead of the differences.
        output: the position of the output to draw, for a model with several.
        subsample: points at most, drawn at random; None is all.
        random_state: seed of the draw.

    Raises:
        ValueError: the model is a classifier, `y` has nulls, or there are several outputs and
            none, or one that is not there, is chosen.
    """
    from sklearn.base import is_classifier
    from sklearn.metrics import PredictionErrorDisplay, mean_absolute_error, r2_score

    if is_classifier(model):
        raise ValueError(f"{_kind(model)} is a classifier. Use plot_confusion_matrix or plot_roc.")
    truth = _output(_values(y).astype(float), output)
    predicted = _output(np.asarray(model.predict(X), dtype=float), output)
    fit = f"R² {r2_score(truth, predicted):.3f}"
    error = f"mean absolute error {_number(mean_absolute_error(truth, predicted))}"
    residual = kind == "residual_vs_predicted"
    display = PredictionErrorDisplay.from_predictions(
        truth,
        predicted,
        kind=kind,
        subsample=subsample,
        random_state=random_state,
        ax=_axes(ax, (_WIDTH, 4.4) if residual else _SQUARE),
        scatter_kwargs={"color": _MAIN, "alpha": 0.55, "s": 20, "edgecolors": "none"},
        line_kwargs={"color": "black", "linestyle": "-", "linewidth": 1.2, "alpha": 1},
    )
    _number_axes(display.ax_)
    drawn = len(display.y_pred)
    note = f"\n({drawn:,} of the {len(truth):,} rows are drawn)" if drawn < len(truth) else ""
    return _label(
        display.ax_,
        f"Residuals: {fit}, {error}" if residual else f"Predictions: {fit}\n{error}",
        f"Predicted value{note}",
        "Residual (actual minus predicted)" if residual else "Actual value",
    )


def _number_axes(ax: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        span = np.ptp(axis.get_view_interval())
        if span >= 1e7:  # Too long for one beside the other: 12 M.
            axis.set_major_formatter(EngFormatter())
        elif span >= 1000:
            axis.set_major_formatter("{x:,.0f}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _output(values: np.ndarray, output: int | None) -> np.ndarray:
    # One output may stand in a column of its own: some models answer as they were fitted.
    columns = values[:, np.newaxis] if values.ndim == 1 else values
    outputs = columns.shape[1]
    if output is None and outputs > 1:
        raise ValueError(f"The model has {outputs} outputs. Choose one: output=0 is the first.")
    chosen = output or 0
    if not 0 <= chosen < outputs:
        told = "1 output" if outputs == 1 else f"{outputs} outputs"
        raise ValueError(f"The model has {told}: there is no output {chosen}.")
    return columns[:, chosen]


# Shared


def _values(y: Values) -> np.ndarray:
    """`y` as an array of shape (n,), or (n, m) for m > 1 columns."""
    import pandas as pd

    array = y.to_numpy() if hasattr(y, "to_numpy") else np.asarray(y)
    missing = int(pd.isna(array).sum())
    if missing:
        raise ValueError(f"y has {missing:,} missing values. Leave these rows out of X and y.")
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _column_names(X: Rows) -> list[str]:
    if hasattr(X, "columns"):
        return [str(name) for name in X.columns]
    return [f"x{position}" for position in range(np.shape(X)[1])]


def _bars_size(number: int) -> tuple[float, float]:
    return (_WIDTH, 1.3 + 0.3 * number)


def _draw_bars(
    ax: Axes,
    labels: Sequence[str],
    sizes: Sequence[float],
    texts: Sequence[str] = (),
    spread: Sequence[float] | None = None,
    longest: float | None = None,
) -> list:
    """Bars from left to right, the first on top: labels of any length stay legible.

    The width is that of a bar of size `longest`, or of the longest there is.
    """
    places = np.arange(len(labels))
    error_kw = {"ecolor": "black", "elinewidth": 1.2, "capsize": 3}
    bars = ax.barh(places, sizes, height=0.7, color=_BAR, xerr=spread, error_kw=error_kw)
    ax.axvline(0, color="black", linestyle="-", linewidth=1)
    ax.set_yticks(places, [_short(label) for label in labels])
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.spines[["left", "right", "top"]].set_visible(False)
    if texts:
        _write_sizes(ax, bars, texts, longest or max(sizes))
    return list(bars)


def _write_sizes(ax: Axes, bars: Any, texts: Sequence[str], longest: float) -> None:
    """Numbers at the ends of the bars take the place of the axis."""
    ax.bar_label(bars, texts, padding=4)
    room = min(0.5, _LETTER * max(map(len, texts)) / _inches(ax))
    ax.set_xlim(0, longest / (1 - room))
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)


def _inches(ax: Axes) -> float:
    """The width of the Axes, before the layout gives some of it to the labels."""
    return ax.get_window_extent().width / ax.figure.dpi


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _short(text: str, limit: int = _LONGEST_LABEL) -> str:
    """The beginning and the end: names that differ in either stay different."""
    tail = limit // 3
    text = text if len(text) <= limit else f"{text[: limit - tail - 1]}…{text[-tail:]}"
    return text.replace("$", r"\$")  # matplotlib reads what stands between two as a formula


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _kind(model: Any) -> str:
    return type(model).__name__

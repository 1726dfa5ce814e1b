"""What a run will do, settled before a row is read: pure functions, nothing is opened here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches

import pyarrow as pa
from google.cloud.bigquery import SchemaField

from mlsys.errors import InvalidRequest, ModelUnusable, TableMismatch
from mlsys.frame import FrameKind
from mlsys.names import LONGEST_COLUMN_NAME, TOLD_NAMES, TableRef, is_column_name, shown
from mlsys.tables import BIGQUERY_TO_ARROW, TableInfo, bigquery_column, standard_type
from service.contract import PredictRequest

# When and by which model: the last columns of every output table.
_TOLD_TYPES = (pa.timestamp("us", "UTC"), pa.string(), pa.string())
TOLD = tuple(pa.field(*told) for told in zip(TOLD_NAMES, _TOLD_TYPES, strict=True))

_NUMBERS = {"INT64", "FLOAT64", "NUMERIC", "BIGNUMERIC"}
_MOST_LISTED = 20


@dataclass(frozen=True)
class Feature:
    """A column the model needs, and its BigQuery type where the model's metadata tells."""

    name: str
    type: str | None = None


@dataclass(frozen=True)
class Output:
    """A column the model makes."""

    name: str
    type: pa.DataType


@dataclass(frozen=True)
class ModelNeeds:
    """What a model asks of a table."""

    features: tuple[Feature, ...]
    frame: FrameKind
    id_columns: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Columns:
    """The input columns of a run, each once in the order the model or the caller names them."""

    features: tuple[SchemaField, ...]
    ids: tuple[SchemaField, ...]

    @property
    def read(self) -> list[str]:
        """The names to read: features, then the id columns that are not features as well."""
        return list(dict.fromkeys(column.name for column in (*self.features, *self.ids)))


@dataclass(frozen=True)
class Plan:
    """A run, settled: the same plan on the same rows gives the same output."""

    run_id: str
    input: TableRef
    output: TableRef
    columns: Columns
    frame: FrameKind
    outputs: tuple[Output, ...]
    output_columns: tuple[SchemaField, ...]
    creates_output: bool
    where: str | None
    chunk_rows: int | None
    rows: int | None
    model_name: str
    model_version: str
    predicted_at: datetime


def choose_columns(
    table: TableInfo, needs: ModelNeeds, id_columns: Sequence[str] | None
) -> Columns:
    """Finds the model's features and the id columns among the table's columns.

    Raises:
        TableMismatch: columns are missing or of a type the model can't take; all are listed.
    """
    by_name = {column.name: column for column in table.columns}
    features = [feature.name for feature in needs.features]
    ids = id_columns if id_columns is not None else needs.id_columns
    if ids is None:
        ids = [name for name in by_name if name not in set(features)]
    if repeated := _repeated(ids):
        raise InvalidRequest(f"id_columns names {', '.join(repeated)} more than once.")
    messages, members = [], {}
    if missing := [name for name in dict.fromkeys([*features, *ids]) if name not in by_name]:
        messages.append(_missing_message(table, missing))
        members["missing_columns"] = missing
    there = [feature for feature in needs.features if feature.name in by_name]
    if mistyped := [m for feature in there if (m := _mistyped(feature, by_name[feature.name]))]:
        messages.append(_mistyped_message(table, mistyped))
        members["mistyped_columns"] = mistyped
    if messages:
        raise TableMismatch(" ".join(messages), **members)
    return Columns(
        features=tuple(by_name[name] for name in features), ids=tuple(by_name[n] for n in ids)
    )


def _missing_message(table: TableInfo, missing: Sequence[str]) -> str:
    names = [column.name for column in table.columns]
    hints = {m: _similar(m, names) for m in missing}
    told = [f"{m} (did you mean {hint}?)" if hint else m for m, hint in hints.items()]
    return f"{table.ref} lacks columns that this run needs: {_listed(told)}."


def _mistyped_message(table: TableInfo, mistyped: Sequence[str]) -> str:
    return (
        f"{table.ref} has columns of a type that the model can't take: {_listed(mistyped)}. "
        "Cast them, or train the model on what the table holds."
    )


def _similar(name: str, names: Sequence[str]) -> str | None:
    folded = {other.casefold(): other for other in names}
    matches = get_close_matches(name.casefold(), folded, n=1, cutoff=0.8)
    return folded[matches[0]] if matches else None


def _mistyped(feature: Feature, column: SchemaField) -> str | None:
    actual = standard_type(column)
    plain = actual.removeprefix("ARRAY<").removesuffix(">")
    if plain not in BIGQUERY_TO_ARROW:
        return f"{column.name} is {actual}"
    if feature.type is None:
        return None
    # Metadata written by hand may say INTEGER, or int64.
    expected = standard_type(SchemaField(feature.name, feature.type))
    if expected == actual or {expected, actual} <= _NUMBERS:
        return None
    return f"{column.name} is {actual}, not {expected}"


def result_columns(ids: Iterable[SchemaField], outputs: Sequence[Output]) -> list[SchemaField]:
    """The output table's columns: ids, what the model makes, then when and by which model.

    Raises:
        ModelUnusable: what the model makes would have a name that BigQuery does not take.
        TableMismatch: two columns would have one name (BigQuery ignores case in names).
    """
    if wrong := [shown(output.name) for output in outputs if not is_column_name(output.name)]:
        raise ModelUnusable(
            f"BigQuery has no column of the name {_listed(wrong)}. Set another `target` in the "
            "model's metadata.json, or train it on shorter labels: a column's name is of letters, "
            f"digits and underscores, at most {LONGEST_COLUMN_NAME}."
        )
    carried = [_carried(column) for column in ids]
    made = [bigquery_column(pa.field(output.name, output.type)) for output in outputs]
    columns = [*carried, *made, *map(bigquery_column, TOLD)]
    if clashing := _repeated(column.name.casefold() for column in columns):
        names = list(dict.fromkeys(c.name for c in columns if c.name.casefold() in clashing))
        raise TableMismatch(
            f"The output would have several columns of one name: {_listed(names)}. Pass id_columns "
            "without them, or set another `target` in the model's metadata.json."
        )
    return columns


def _carried(column: SchemaField) -> SchemaField:
    """An id column as the output table has it: its type, without policies and defaults.

    They are left out of the fields of a STRUCT as well.
    """
    return SchemaField(
        column.name,
        standard_type(column) if column.mode != "REPEATED" else column.field_type,
        mode="REPEATED" if column.mode == "REPEATED" else "NULLABLE",
        description=column.description,
        fields=[_carried(field) for field in column.fields],
        precision=column.precision,
        scale=column.scale,
        range_element_type=column.range_element_type,
    )


def _fits(found: SchemaField, column: SchemaField) -> bool:
    """Whether a column takes another's values. The fields of a STRUCT have names as columns do."""
    there = {field.name.casefold(): field for field in found.fields}
    return standard_type(found) == standard_type(column) and all(
        field.name.casefold() in there and _fits(there[field.name.casefold()], field)
        for field in column.fields
    )


def _whole_type(column: SchemaField) -> str:
    """A column's type, with the fields of a STRUCT."""
    kind = standard_type(column)
    fields = ", ".join(f"{field.name} {_whole_type(field)}" for field in column.fields)
    return kind.replace("STRUCT", f"STRUCT<{fields}>") if fields else kind


def check_output(table: TableInfo, columns: Sequence[SchemaField]) -> None:
    """Checks that an existing table can take the columns of a result.

    Raises:
        TableMismatch: it lacks some, has them with another type, or requires others.
    """
    there = {column.name.casefold(): column for column in table.columns}
    wrong: list[str] = []
    for column in columns:
        found = there.pop(column.name.casefold(), None)
        if found is None:
            wrong.append(f"{column.name} {standard_type(column)} is missing")
        elif not _fits(found, column):
            wrong.append(f"{column.name} is {_whole_type(found)}, not {_whole_type(column)}")
    wrong += [
        f"{c.name} is REQUIRED and not written" for c in there.values() if c.mode == "REQUIRED"
    ]
    if wrong:
        raise TableMismatch(
            f"{table.ref} can't take the predictions: {_listed(wrong)}. Alter that table, or name "
            "a new output_table: it will be made.",
            output_columns=wrong,
        )


def make_plan(
    request: PredictRequest,
    *,
    run_id: str,
    table: TableInfo,
    output: TableInfo | None,
    columns: Columns,
    needs: ModelNeeds,
    outputs: Sequence[Output],
    model_version: str,
    chunk_rows: int | None,
    now: datetime,
) -> Plan:
    """Settles a run.

    Args:
        output: the output table as it stands; None: it is to be made.
        model_version: the version that `latest` stands for.
        chunk_rows: where the request names none; None: to be found out.
        now: the one timestamp that every row of the run carries.
    """
    output_columns = result_columns(columns.ids, outputs)
    if output is not None:
        check_output(output, output_columns)
    return Plan(
        run_id=run_id,
        input=table.ref,
        output=TableRef.parse(request.output_table),
        columns=columns,
        frame=needs.frame,
        outputs=tuple(outputs),
        output_columns=tuple(output_columns),
        creates_output=output is None,
        where=request.where,
        chunk_rows=request.chunk_rows or chunk_rows,
        rows=table.rows if request.where is None else None,
        model_name=request.model_name,
        model_version=model_version,
        predicted_at=now,
    )


def output_schema(plan: Plan, read: pa.Schema) -> pa.Schema:
    """The Arrow schema of a run's output, given that of the batches that are read."""
    ids = [pa.field(column.name, read.field(column.name).type) for column in plan.columns.ids]
    made = [pa.field(output.name, output.type) for output in plan.outputs]
    return pa.schema([*ids, *made, *TOLD])


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _listed(items: Sequence[str]) -> str:
    more = len(items) - _MOST_LISTED
    return ", ".join(items[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")

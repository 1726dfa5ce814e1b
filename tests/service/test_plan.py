"""What a run will do, settled from names and types alone: no server is asked here."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from google.cloud.bigquery import PolicyTagList, SchemaField

from mlsys.errors import InvalidRequest, ModelUnusable, TableMismatch
from mlsys.frame import FrameKind
from mlsys.names import TableRef
from mlsys.tables import TableInfo, bigquery_column, standard_type
from service.contract import PredictRequest
from service.plan import (
    Columns,
    Feature,
    ModelNeeds,
    Output,
    Plan,
    check_output,
    choose_columns,
    make_plan,
    output_schema,
    result_columns,
)

INPUT = TableRef("my-project", "data", "input")
OUTPUT = TableRef("my-project", "data", "output")
NOW = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
PREDICTION = Output("Prediction", pa.float64())
TOLD = ["PredictionTimestamp", "ModelName", "ModelVersion"]


def table(*columns: SchemaField, rows: int | None = 3, ref: TableRef = INPUT) -> TableInfo:
    return TableInfo(ref, columns, rows)


def column(name: str, kind: str = "INT64", mode: str = "NULLABLE", **more: Any) -> SchemaField:
    return SchemaField(name, kind, mode=mode, **more)


def needs(*features: str | Feature, ids: tuple[str, ...] | None = None) -> ModelNeeds:
    named = tuple(f if isinstance(f, Feature) else Feature(f) for f in features)
    return ModelNeeds(named, FrameKind.PANDAS, ids)


def names(columns: Any) -> list[str]:
    return [each.name for each in columns]


def chosen(
    info: TableInfo, model: ModelNeeds, ids: list[str] | None = None
) -> tuple[list[str], list[str]]:
    columns = choose_columns(info, model, ids)
    return names(columns.features), names(columns.ids)


ABCD = table(column("a"), column("b"), column("c"), column("d"))


def test_features_come_in_the_models_order_not_in_the_tables() -> None:
    assert chosen(ABCD, needs("c", "a"))[0] == ["c", "a"]


def test_id_columns_are_by_default_all_that_are_no_features_in_the_tables_order() -> None:
    assert chosen(ABCD, needs("c", "a"))[1] == ["b", "d"]


def test_id_columns_of_the_metadata_replace_the_default() -> None:
    assert chosen(ABCD, needs("a", ids=("d", "b")))[1] == ["d", "b"]


def test_id_columns_of_the_request_replace_those_of_the_metadata() -> None:
    assert chosen(ABCD, needs("a", ids=("d", "b")), ["c"])[1] == ["c"]


@pytest.mark.parametrize("ids", [(), None])
def test_no_id_columns_may_be_asked_for_by_request_and_by_metadata(
    ids: tuple[str, ...] | None,
) -> None:
    assert chosen(ABCD, needs("a", ids=ids), [] if ids is None else None)[1] == []


def test_a_feature_may_be_an_id_column_too_and_is_read_once() -> None:
    columns = choose_columns(ABCD, needs("c", "a"), ["a", "d"])

    assert names(columns.ids) == ["a", "d"]
    assert columns.read == ["c", "a", "d"]


def test_only_the_columns_that_are_needed_are_read_of_a_wide_table() -> None:
    wide = table(*(column(f"c{number}") for number in range(300)))
    features = [f"c{number}" for number in range(290, 10, -31)]

    columns = choose_columns(wide, needs(*features), ["c7"])

    assert len(features) == 10
    assert columns.read == [*features, "c7"]


def test_every_missing_column_is_listed_features_and_id_columns_alike() -> None:
    with pytest.raises(TableMismatch) as caught:
        choose_columns(ABCD, needs("a", "weight", "height"), ["d", "passport", "height"])

    assert caught.value.members == {"missing_columns": ["weight", "height", "passport"]}
    assert str(caught.value).startswith(f"{INPUT} lacks columns that this run needs: weight, ")
    assert "passport" in str(caught.value)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "there"),
    [
        ("age", "Age"),
        ("AGE", "Age"),
        ("PasengerId", "PassengerId"),
        ("passenger_id", "PassengerId"),
    ],
)
def test_a_column_in_another_case_or_nearly_so_named_is_hinted_at(wanted: str, there: str) -> None:
    info = table(column("Age"), column("PassengerId"), column("Fare"))

    with pytest.raises(TableMismatch, match=rf"{wanted} \(did you mean {there}\?\)"):
        choose_columns(info, needs(wanted), [])


def test_at_most_twenty_missing_columns_are_told_and_all_are_members() -> None:
    wanted = [f"x{number:02}_missing" for number in range(25)]

    with pytest.raises(TableMismatch) as caught:
        choose_columns(table(column("id")), needs(*wanted), ["id"])

    told = str(caught.value)
    assert all(name in told for name in wanted[:20])
    assert not any(name in told for name in wanted[20:])
    assert "x19_missing and 5 more." in told
    assert caught.value.members["missing_columns"] == wanted


def test_twenty_missing_columns_are_told_without_a_rest() -> None:
    with pytest.raises(TableMismatch) as caught:
        choose_columns(table(column("id")), needs(*(f"x{n:02}_lost" for n in range(20))), [])

    assert "x19_lost." in str(caught.value)
    assert "more" not in str(caught.value)


def test_every_mistyped_column_is_listed_with_what_it_is_and_what_was_wanted() -> None:
    info = table(column("a", "STRING"), column("b", "BOOL"), column("c", "INT64"))
    model = needs(Feature("a", "INT64"), Feature("b", "STRING"), Feature("c", "INT64"))

    with pytest.raises(TableMismatch) as caught:
        choose_columns(info, model, [])

    wrong = ["a is STRING, not INT64", "b is BOOL, not STRING"]
    assert caught.value.members == {"mistyped_columns": wrong}
    assert ", ".join(wrong) in str(caught.value)


def test_missing_and_mistyped_columns_are_listed_together() -> None:
    info = table(column("a", "STRING"), column("b", "BOOL"))
    model = needs(Feature("a", "INT64"), Feature("weight", "INT64"), Feature("b", "BOOL"))

    with pytest.raises(TableMismatch) as caught:
        choose_columns(info, model, ["passport"])

    assert caught.value.members == {
        "missing_columns": ["weight", "passport"],
        "mistyped_columns": ["a is STRING, not INT64"],
    }
    assert "lacks columns that this run needs: weight, passport. " in str(caught.value)
    assert "the model can't take: a is STRING, not INT64. Cast" in str(caught.value)


@pytest.mark.parametrize(
    "actual", ["INT64", "INTEGER", "FLOAT64", "FLOAT", "NUMERIC", "BIGNUMERIC"]
)
@pytest.mark.parametrize("wanted", ["INT64", "INTEGER", "int64", "FLOAT64", "NUMERIC"])
def test_a_number_may_stand_for_another_by_whichever_name(actual: str, wanted: str) -> None:
    assert chosen(table(column("a", actual)), needs(Feature("a", wanted))) == (["a"], [])


@pytest.mark.parametrize(
    ("actual", "wanted"),
    [("BOOLEAN", "BOOL"), ("BOOL", "BOOLEAN"), ("STRING", "string"), ("TIMESTAMP", "TIMESTAMP")],
)
def test_one_type_by_two_names_is_one_type(actual: str, wanted: str) -> None:
    assert chosen(table(column("a", actual)), needs(Feature("a", wanted))) == (["a"], [])


@pytest.mark.parametrize(
    ("actual", "wanted"),
    [("BOOL", "INT64"), ("STRING", "FLOAT64"), ("DATE", "TIMESTAMP"), ("DATETIME", "TIMESTAMP")],
)
def test_types_that_are_not_both_numbers_do_not_stand_for_each_other(
    actual: str, wanted: str
) -> None:
    with pytest.raises(TableMismatch, match=f"a is {actual}, not {wanted}"):
        choose_columns(table(column("a", actual)), needs(Feature("a", wanted)), [])


def test_a_feature_that_is_an_array_is_no_number() -> None:
    info = table(column("a", "INTEGER", "REPEATED"))

    with pytest.raises(TableMismatch, match=r"a is ARRAY<INT64>, not INT64"):
        choose_columns(info, needs(Feature("a", "INT64")), [])
    assert chosen(info, needs(Feature("a", "ARRAY<INT64>")))[0] == ["a"]
    assert chosen(info, needs("a"))[0] == ["a"]


@pytest.mark.parametrize(
    ("kind", "mode", "told"),
    [
        ("RECORD", "NULLABLE", "STRUCT"),
        ("STRUCT", "REPEATED", "ARRAY<STRUCT>"),
        ("JSON", "NULLABLE", "JSON"),
        ("GEOGRAPHY", "NULLABLE", "GEOGRAPHY"),
        ("JSON", "REPEATED", "ARRAY<JSON>"),
        ("INTERVAL", "NULLABLE", "INTERVAL"),
    ],
)
def test_a_feature_of_a_type_that_no_model_takes_is_refused(
    kind: str, mode: str, told: str
) -> None:
    fields = [column("inner")] if kind in ("RECORD", "STRUCT") else []
    info = table(column("a"), column("odd", kind, mode, fields=fields))

    with pytest.raises(TableMismatch) as caught:
        choose_columns(info, needs("a", "odd"), [])

    assert caught.value.members == {"mistyped_columns": [f"odd is {told}"]}


def test_a_type_that_no_model_takes_is_fine_in_an_id_column() -> None:
    info = table(column("a"), column("odd", "JSON"))

    assert chosen(info, needs("a")) == (["a"], ["odd"])


def test_id_columns_named_twice_are_refused_and_named_once() -> None:
    with pytest.raises(InvalidRequest, match=r"^id_columns names b, d more than once\.$"):
        choose_columns(ABCD, needs("a"), ["b", "c", "b", "d", "d", "d"])


def test_id_columns_that_the_metadata_names_twice_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="id_columns names b more than once"):
        choose_columns(ABCD, needs("a", ids=("b", "b")), None)


def test_the_output_has_ids_then_predictions_then_when_and_by_which_model() -> None:
    outputs = [Output("Species", pa.string()), Output("PredictionProbability", pa.float64())]

    columns = result_columns([column("id"), column("name", "STRING")], outputs)

    expected = ["id", "name", "Species", "PredictionProbability", *TOLD]
    assert names(columns) == expected
    kinds = ["INT64", "STRING", "STRING", "FLOAT64", "TIMESTAMP", "STRING", "STRING"]
    assert [each.field_type for each in columns] == kinds


@pytest.mark.parametrize("name", ["Prediction", "prediction", "MODELNAME", "predictiontimestamp"])
def test_an_id_column_of_a_name_that_the_output_has_anyway_is_refused_in_any_case(
    name: str,
) -> None:
    with pytest.raises(TableMismatch, match=rf"\b{name}\b.*Pass id_columns without"):
        result_columns([column("id"), column(name)], [PREDICTION])


def test_a_target_of_a_name_that_the_output_has_anyway_is_refused() -> None:
    with pytest.raises(TableMismatch, match=r"modelname, ModelName.*another `target`"):
        result_columns([], [Output("modelname", pa.int64())])


@pytest.mark.parametrize("name", ["a.b", "price ($)", "x" * 301, " ", ""])
def test_a_target_that_no_column_can_be_named_by_is_the_models_fault(name: str) -> None:
    with pytest.raises(ModelUnusable, match=r"no column of the name '.*metadata\.json"):
        result_columns([column("id")], [PREDICTION, Output(name, pa.int64())])


@pytest.mark.parametrize("name", ["y", "Größe", "7", "a b-c", "x" * 300])
def test_a_target_may_have_any_name_that_bigquery_takes(name: str) -> None:
    assert names(result_columns([], [Output(name, pa.int64())])) == [name, *TOLD]


def test_at_most_twenty_clashing_names_are_told() -> None:
    outputs = [Output(f"p{number:02}", pa.int64()) for number in range(25)]

    with pytest.raises(TableMismatch) as caught:
        result_columns([column(output.name) for output in outputs], outputs)

    assert "p19 and 5 more" in str(caught.value)
    assert "p20" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "standard"),
    [
        ("INTEGER", "INT64"),
        ("INT64", "INT64"),
        ("FLOAT", "FLOAT64"),
        ("BOOLEAN", "BOOL"),
        ("STRING", "STRING"),
        ("JSON", "JSON"),
        ("GEOGRAPHY", "GEOGRAPHY"),
    ],
)
def test_an_id_column_is_carried_with_its_type_by_its_standard_name(
    kind: str, standard: str
) -> None:
    [carried, *_] = result_columns([column("id", kind)], [PREDICTION])

    assert (carried.name, carried.field_type, carried.mode) == ("id", standard, "NULLABLE")


def test_an_array_is_carried_as_one() -> None:
    [carried, *_] = result_columns([column("ids", "INTEGER", "REPEATED")], [PREDICTION])

    assert carried.mode == "REPEATED"
    assert standard_type(carried) == "ARRAY<INT64>"


def test_a_required_id_column_may_be_null_in_the_output() -> None:
    [carried, *_] = result_columns([column("id", mode="REQUIRED")], [PREDICTION])

    assert carried.mode == "NULLABLE"


def test_precision_scale_and_description_are_carried() -> None:
    price = column("price", "NUMERIC", precision=10, scale=2, description="In euros")

    [carried, *_] = result_columns([price], [PREDICTION])

    assert (carried.precision, carried.scale, carried.description) == (10, 2, "In euros")
    assert carried.field_type == "NUMERIC"


def test_a_range_is_carried_with_the_type_of_its_ends() -> None:
    [carried, *_] = result_columns([column("r", "RANGE", range_element_type="DATE")], [PREDICTION])

    assert carried.to_api_repr()["rangeElementType"] == {"type": "DATE"}


TAGS = PolicyTagList(["projects/p/locations/us/taxonomies/1/policyTags/2"])


def test_policy_tags_and_defaults_stay_with_the_input_table() -> None:
    guarded = column("id", "STRING", policy_tags=TAGS, default_value_expression="'x'")

    [carried, *_] = result_columns([guarded], [PREDICTION])

    assert carried.policy_tags is None
    assert carried.default_value_expression is None
    assert not {"policyTags", "defaultValueExpression"} & set(carried.to_api_repr())


def test_the_fields_of_a_struct_are_carried_without_their_policy_tags() -> None:
    inner = column("secret", "STRING", "REQUIRED", policy_tags=TAGS)
    nested = column("deep", "RECORD", "REPEATED", fields=[inner])
    outer = column("id", "RECORD", fields=[column("n", "INTEGER"), nested])

    [carried, *_] = result_columns([outer], [PREDICTION])

    assert standard_type(carried) == "STRUCT"
    assert names(carried.fields) == ["n", "deep"]
    assert carried.fields[1].mode == "REPEATED"
    assert names(carried.fields[1].fields) == ["secret"]
    assert "policyTags" not in str(carried.to_api_repr())


def test_an_output_table_with_these_columns_is_fine_in_any_order_and_case() -> None:
    columns = result_columns([column("Id", "INTEGER")], [PREDICTION])
    shuffled = [
        column("modelversion", "STRING"),
        column("ModelName", "STRING"),
        column("PREDICTION", "FLOAT"),
        column("PredictionTimestamp", "TIMESTAMP"),
        column("Note", "STRING"),
        column("id", "INT64", "REQUIRED"),
    ]

    check_output(table(*shuffled, ref=OUTPUT), columns)


def test_all_that_is_wrong_with_an_output_table_is_listed() -> None:
    columns = result_columns([column("id"), column("tags", "STRING", "REPEATED")], [PREDICTION])
    there = [
        column("id", "STRING"),
        column("tags", "STRING"),
        column("PredictionTimestamp", "DATETIME"),
        column("ModelName", "STRING"),
        column("ModelVersion", "INTEGER"),
        column("Batch", "INT64", "REQUIRED"),
    ]

    with pytest.raises(TableMismatch) as caught:
        check_output(table(*there, ref=OUTPUT), columns)

    wrong = [
        "id is STRING, not INT64",
        "tags is STRING, not ARRAY<STRING>",
        "Prediction FLOAT64 is missing",
        "PredictionTimestamp is DATETIME, not TIMESTAMP",
        "ModelVersion is INT64, not STRING",
        "Batch is REQUIRED and not written",
    ]
    assert caught.value.members == {"output_columns": wrong}
    assert str(caught.value).startswith(f"{OUTPUT} can't take the predictions: id is STRING, not ")


def test_an_array_in_the_output_table_takes_no_single_value() -> None:
    columns = result_columns([column("id")], [])

    with pytest.raises(TableMismatch, match=r"id is ARRAY<INT64>, not INT64"):
        check_output(table(column("id", "INTEGER", "REPEATED"), *columns[1:]), columns)


def test_at_most_twenty_faults_of_an_output_table_are_told() -> None:
    columns = result_columns([column(f"c{number:02}") for number in range(25)], [])

    with pytest.raises(TableMismatch) as caught:
        check_output(table(*columns[25:]), columns)

    assert "c19 INT64 is missing and 5 more." in str(caught.value)
    assert "c20" not in str(caught.value)
    assert len(caught.value.members["output_columns"]) == 25


def request(**more: Any) -> PredictRequest:
    return PredictRequest(
        env="dev",
        input_table=str(INPUT),
        output_table=str(OUTPUT),
        model_name="a-model",
        model_version="latest",
        **more,
    )


def plan_for(
    asked: PredictRequest, *, info: TableInfo = ABCD, output: TableInfo | None = None
) -> Plan:
    model = needs("c", "a")
    return make_plan(
        asked,
        run_id="run-1",
        table=info,
        output=output,
        columns=choose_columns(info, model, asked.id_columns),
        needs=model,
        outputs=[PREDICTION],
        model_version="v12",
        chunk_rows=500,
        now=NOW,
    )


def test_a_plan_holds_what_was_asked_and_what_was_found() -> None:
    plan = plan_for(request(id_columns=["b"]))

    assert plan == Plan(
        run_id="run-1",
        input=INPUT,
        output=OUTPUT,
        columns=Columns(features=(column("c"), column("a")), ids=(column("b"),)),
        frame=FrameKind.PANDAS,
        outputs=(PREDICTION,),
        output_columns=tuple(result_columns([column("b")], [PREDICTION])),
        creates_output=True,
        where=None,
        chunk_rows=500,
        rows=3,
        model_name="a-model",
        model_version="v12",
        predicted_at=NOW,
    )


def test_the_version_of_a_plan_is_the_one_that_latest_stands_for() -> None:
    assert plan_for(request()).model_version == "v12"


def test_chunk_rows_of_the_request_replace_the_settings() -> None:
    assert plan_for(request(chunk_rows=7)).chunk_rows == 7


def test_how_many_rows_a_filter_leaves_is_not_known_beforehand() -> None:
    plan = plan_for(request(where="a > 1"))

    assert (plan.where, plan.rows) == ("a > 1", None)


def test_a_table_whose_rows_nobody_counted_has_none_in_the_plan() -> None:
    info = TableInfo(INPUT, ABCD.columns, None)

    assert plan_for(request(), info=info).rows is None


def test_an_output_table_that_is_there_is_checked_and_not_made() -> None:
    fitting = result_columns([column("b"), column("d")], [PREDICTION])

    assert not plan_for(request(), output=table(*fitting, ref=OUTPUT)).creates_output
    with pytest.raises(TableMismatch, match="Prediction FLOAT64 is missing"):
        plan_for(request(), output=table(*fitting[:2], *fitting[3:], ref=OUTPUT))


def test_rows_are_written_with_the_types_they_are_read_with_and_in_the_tables_order() -> None:
    plan = plan_for(request(id_columns=["d", "a"]))
    precise = pa.decimal128(10, 2)
    read = pa.schema([("a", pa.int64()), ("c", pa.int64()), ("d", precise)])

    schema = output_schema(plan, read)

    assert schema.names == names(plan.output_columns) == ["d", "a", "Prediction", *TOLD]
    assert schema.types[:3] == [precise, pa.int64(), pa.float64()]
    assert [bigquery_column(field).field_type for field in list(schema)[1:]] == [
        each.field_type for each in plan.output_columns[1:]
    ]


def test_the_fields_of_a_struct_are_looked_at_before_anything_is_read() -> None:
    def place(*fields: SchemaField) -> SchemaField:
        return SchemaField("place", "RECORD", mode="REPEATED", fields=fields)

    needed = [place(column("x", "INTEGER"), column("name", "STRING"))]

    more = column("more", "STRING")
    check_output(table(place(column("Name", "STRING"), more, column("X", "INT64"))), needed)
    with pytest.raises(TableMismatch, match=r"place is ARRAY<STRUCT<name STRING, x FLOAT64>>, not"):
        check_output(table(place(column("name", "STRING"), column("x", "FLOAT64"))), needed)
    with pytest.raises(TableMismatch, match=r"place is ARRAY<STRUCT<name STRING>>, not"):
        check_output(table(place(column("name", "STRING"))), needed)

"""The main job, end to end: passengers in one table, their predicted survival in another."""

from __future__ import annotations

import numpy as np
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from mlsys.frame import FrameKind, to_frame
from mlsys.local import sample
from tests.conftest import Client, Cloud

FEATURES = ["Pclass", "Sex", "Age", "SibSp", "Parch", "Fare", "Embarked"]


def test_titanic_passengers_are_predicted_as_in_the_notebook(service: Client, cloud: Cloud) -> None:
    train = to_frame(sample("titanic_train"), FrameKind.PANDAS)
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    words = make_pipeline(
        SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")
    )
    model = make_pipeline(
        make_column_transformer(
            (numbers, ["Age", "Fare", "SibSp", "Parch"]), (words, ["Pclass", "Sex", "Embarked"])
        ),
        RandomForestClassifier(random_state=0),
    ).fit(train[FEATURES], train["Survived"].astype("int64"))
    name = cloud.publish(model, target="Survived", id_columns=["PassengerId"])
    passengers = cloud.put(sample("titanic_test"))
    output = cloud.new_table("scored")

    response = service.predict(passengers, output, name)

    assert response.status_code == 200, response.text
    result = response.json()
    assert result["rows"] == 262
    rows = cloud.rows(output, order_by="PassengerId")
    test = to_frame(sample("titanic_test"), FrameKind.PANDAS).sort_values("PassengerId")
    assert [row["PassengerId"] for row in rows] == test["PassengerId"].tolist()
    assert [row["Survived"] for row in rows] == model.predict(test[FEATURES]).tolist()
    np.testing.assert_allclose(
        [row["PredictionProbability"] for row in rows],
        model.predict_proba(test[FEATURES])[:, 1],
        rtol=1e-12,
    )
    assert list(cloud.columns(output)) == [
        "PassengerId",
        "Survived",
        "PredictionProbability",
        "PredictionTimestamp",
        "ModelName",
        "ModelVersion",
    ]
    assert {(row["ModelName"], row["ModelVersion"]) for row in rows} == {(name, "v1")}
    assert len({row["PredictionTimestamp"] for row in rows}) == 1

"""A predict call takes no more threads than it is given, whatever the model was trained with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from joblib import effective_n_jobs
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier, StackingClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info

from service.threads import Threads, leave_threads_to_us

X = np.random.default_rng(0).normal(size=(60, 3))
Y = X[:, 0] > 0


def forest(trees: int = 5) -> RandomForestClassifier:
    return RandomForestClassifier(trees, n_jobs=-1, random_state=0)


def test_every_estimator_in_a_model_is_found() -> None:
    search = GridSearchCV(forest(), {"max_depth": [2]}, n_jobs=2, cv=2)
    votes = VotingClassifier([("k", KNeighborsClassifier(n_jobs=4)), ("f", forest())], n_jobs=3)
    columns = make_column_transformer((StandardScaler(), [0, 1]), n_jobs=2)
    inner = make_pipeline(StandardScaler(), forest())
    stack = make_pipeline(StandardScaler(), StackingClassifier([("inner", inner)], cv=2))
    models = [make_pipeline(columns, votes).fit(X, Y), search.fit(X, Y), stack.fit(X, Y)]

    for model in models:
        leave_threads_to_us(model)

    pipeline, search, stack = models
    fitted = [*pipeline[-1].estimators_, pipeline[-1], pipeline[0], search, search.best_estimator_]
    fitted.append(stack[-1].estimators_[0][-1])
    assert {each.n_jobs for each in fitted} == {None}


def test_what_a_model_answers_stays_as_it_was() -> None:
    model = forest(50).fit(X, Y)
    before = model.predict_proba(X)

    leave_threads_to_us(model)

    np.testing.assert_allclose(model.predict_proba(X), before, rtol=1e-12)


def test_an_estimator_of_somebody_elses_gets_one_thread() -> None:
    class Other(LogisticRegression):
        n_jobs = -1

    Other.__module__ = "somewhere.else"
    model = Other()
    model.n_jobs = -1

    leave_threads_to_us(model)

    assert model.n_jobs == 1


def test_what_refers_to_itself_is_no_trouble() -> None:
    model = forest()
    model.itself = [model, {"again": model}]

    leave_threads_to_us(model)

    assert model.n_jobs is None


@pytest.mark.parametrize("each", [1, 2])
def test_a_call_has_so_many_threads(each: int) -> None:
    pools = Threads(each).call(threadpool_info)
    openmp = {pool["num_threads"] for pool in pools if pool["user_api"] == "openmp"}

    assert openmp == {each}
    assert Threads(each).call(lambda: effective_n_jobs(None)) == each
    assert {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"} == {each}


def test_what_another_run_has_set_for_the_process_does_not_stay() -> None:
    ours, others = Threads(1), Threads(2)
    # Both threads live on: each has to be able to set what is the process's.
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as another:
        before = another.submit(others.call, threadpool_info).result()
        after = one.submit(ours.call, threadpool_info).result()

    assert {pool["num_threads"] for pool in before} == {2}
    assert {pool["num_threads"] for pool in after} == {1}

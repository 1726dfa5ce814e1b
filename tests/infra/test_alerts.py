"""What rings: errors of the code, as the alert and the operator's guide name them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mlsys.errors import MlsysError, ModelError
from service.problems import problem_of
from tests.infra.support import ROOT


def kinds(root: type[MlsysError] = MlsysError) -> Iterator[type[MlsysError]]:
    """Every error that a run can end with, by the name that the log has."""
    for kind in root.__subclasses__():
        its_own = kind.__module__ == MlsysError.__module__
        if its_own and not kind.__name__.startswith("_") and kind is not ModelError:
            yield kind
        yield from kinds(kind)


def names(rings: bool) -> set[str]:
    return {each.__name__ for each in kinds() if (problem_of(each("")).status >= 500) is rings}


def test_what_a_caller_has_to_mend_rings_for_nobody() -> None:
    text = (ROOT / "infra/modules/mlsys/alerts.tf").read_text()
    [quiet] = re.findall(r'callers_errors = "([^"]+)"', text)

    assert set(quiet.split("|")) == names(rings=False)


def test_the_guide_says_what_to_do_about_whatever_rings() -> None:
    guide = (ROOT / "infra/README.md").read_text()
    table = guide.split("| error | what to do |")[1].split("\n\n")[0]

    assert set(re.findall(r"`([A-Z]\w+)`", table)) == names(rings=True)

"""What can go wrong, named by what the caller can do about it.

    MlsysError
    ├── InvalidRequest       a name or a parameter is malformed
    ├── AccessDenied         the credentials, or this deployment, may not do it
    ├── NotFound             no such table, bucket, model or version
    ├── Conflict             what was asked for is there already
    │   └── UnderWay         somebody works on the run
    │       └── TakenOver    somebody else goes on with it
    ├── RunMismatch          the run id stands for other parameters
    ├── TableMismatch        a table does not fit the model
    ├── TooManyRuns          this instance has its hands full
    ├── Unavailable          BigQuery, Cloud Storage or this instance can't answer now
    │   ├── Changed          an object is not what was looked up a moment ago
    │   └── OutOfMemory      this instance has not enough memory for it
    ├── ModelError           the model is at fault
    │   ├── ModelUnusable    its file can't be loaded, or is no predictor
    │   └── ModelRaised      it raised on a row
    └── IntegrityError       rows in, rows sent and rows stored are not the same number
        └── NotCommitted     BigQuery refused to commit

No HTTP here: the service maps each class to a status. The messages are written for the person
who called: what is wrong and what mends it, never a row, a token or a path of the server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LONGEST_MESSAGE = 500


class MlsysError(Exception):
    """The root. `members` are facts for machines, beside the message for people."""

    def __init__(self, message: str, **members: object) -> None:
        super().__init__(message)
        self.members = members


class InvalidRequest(MlsysError, ValueError):
    """A name or a parameter is malformed."""


class AccessDenied(MlsysError):
    """The credentials, or this deployment, may not do what was asked."""


class NotFound(MlsysError):
    """No such table, bucket, object, model or version."""


class TableMismatch(MlsysError):
    """A table's columns don't fit the model, or the output table can't take the result."""


class RunMismatch(MlsysError):
    """A run id was used with other parameters before."""

    @classmethod
    def of(cls, run_id: str) -> RunMismatch:
        """The error, with what to do about it."""
        return cls(
            f"The run {run_id} has other parameters. Repeat it with those, or use another run_id."
        )


class _TryAgain(MlsysError):
    def __init__(self, message: str, *, retry_after: float = 5, **members: object) -> None:
        super().__init__(message, **members)
        self.retry_after = retry_after


class Conflict(MlsysError):
    """What was asked for is already there."""


class UnderWay(Conflict, _TryAgain):
    """Somebody works on the run. Ask again in `retry_after` seconds."""


class TakenOver(UnderWay):
    """The run was taken for dead, and somebody else goes on with it."""


class TooManyRuns(_TryAgain):
    """Try again in `retry_after` seconds."""


class Unavailable(_TryAgain):
    """A service that is needed does not answer. Try again in `retry_after` seconds."""


class Changed(Unavailable):
    """What arrived is not the object that was looked up: damaged, or replaced meanwhile."""


class OutOfMemory(Unavailable):
    """This instance has not enough memory for it, now or at all."""


class ModelError(MlsysError):
    """The model is at fault, not the request."""


class ModelUnusable(ModelError):
    """The artifact can't be loaded, or what was loaded can't predict."""


class ModelRaised(ModelError):
    """The model raised an exception on the rows it was given."""


class IntegrityError(MlsysError):
    """The numbers of rows read, sent and stored differ."""


class NotCommitted(IntegrityError):
    """BigQuery answered that it did not commit; `gone` where that is because streams are gone."""

    def __init__(self, message: str, *, gone: bool = False, **members: object) -> None:
        super().__init__(message, **members)
        self.gone = gone


def redacted(message: str, values: Iterable[object] = ()) -> str:
    """What another library said, without the given values and file paths, and not too long."""
    for value in sorted((str(v) for v in values if v is not None), key=len, reverse=True):
        if value:
            message = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "…", message)
    message = re.sub(r"(?:/[\w.@+-]+){2,}", "…", message)
    # What some libraries say holds halves of surrogate pairs, which can't be sent.
    message = message.encode(errors="backslashreplace").decode()
    return message[:_LONGEST_MESSAGE].strip().rstrip(".")

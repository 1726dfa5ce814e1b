"""What can go wrong, named by what the caller can do about it.

    MlsysError
    ├── InvalidRequest       a name or a parameter is malformed
    ├── AccessDenied         the credentials, or this deployment, may not do it
    ├── NotFound             no such table, bucket, model or version
    ├── Conflict             the run is under way, or the id is taken
    ├── TableMismatch        a table does not fit the model
    ├── TooManyRuns          this instance has its hands full
    ├── Unavailable          BigQuery, Cloud Storage or this instance can't answer now
    │   └── Changed          an object is not what was looked up a moment ago
    ├── ModelError           the model is at fault
    │   ├── ModelUnusable    its file can't be loaded, or is no predictor
    │   └── ModelRaised      it raised on a row
    └── IntegrityError       rows in, rows sent and rows stored are not the same number

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


class Conflict(MlsysError):
    """What was asked for is already under way, or already there."""


class TableMismatch(MlsysError):
    """A table's columns don't fit the model, or the output table can't take the result."""


class _TryAgain(MlsysError):
    def __init__(self, message: str, *, retry_after: float = 5, **members: object) -> None:
        super().__init__(message, **members)
        self.retry_after = retry_after


class TooManyRuns(_TryAgain):
    """Try again in `retry_after` seconds."""


class Unavailable(_TryAgain):
    """A service that is needed does not answer. Try again in `retry_after` seconds."""


class Changed(Unavailable):
    """What arrived is not the object that was looked up: damaged, or replaced meanwhile."""


class ModelError(MlsysError):
    """The model is at fault, not the request."""


class ModelUnusable(ModelError):
    """The artifact can't be loaded, or what was loaded can't predict."""


class ModelRaised(ModelError):
    """The model raised an exception on the rows it was given."""


class IntegrityError(MlsysError):
    """The numbers of rows read, sent and stored differ; nothing was committed."""


def redacted(message: str, values: Iterable[object] = ()) -> str:
    """What another library said, without the given values and file paths, and not too long."""
    for value in sorted((str(v) for v in values if v is not None), key=len, reverse=True):
        if value:
            message = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "…", message)
    message = re.sub(r"(?:/[\w.@+-]+){2,}", "…", message)
    return message[:_LONGEST_MESSAGE].strip().rstrip(".")

"""The prediction service, and the command line."""

import os

# Read by gRPC as it is imported: see `service.forks`.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# syntax=docker/dockerfile:1
# check=error=true

# Tags, not digests: Renovate pins each to the digest that it finds, and keeps it current.
FROM ghcr.io/astral-sh/uv:python3.12-bookworm-slim AS dependencies

ENV UV_CACHE_DIR=/uv-cache \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=0

WORKDIR /app

RUN --mount=type=cache,target=/uv-cache \
    --mount=type=bind,source=pyproject.toml,target=/app/pyproject.toml \
    --mount=type=bind,source=uv.lock,target=/app/uv.lock \
    uv sync --frozen --no-dev --no-install-project

# 165 MB that nothing here loads: the packages' own tests, headers, and Arrow's Flight and S3.
RUN find /app/.venv \( -name tests -type d -o -name include -type d -o -path '*/pyarrow/src' \
    -o -name 'libarrow_flight.*' -o -name 'libarrow_s3.*' \) -prune -exec rm -r {} +


FROM dependencies AS application

# Not editable: the code goes into the virtual environment, and the sources stay behind. What that
# adds is set aside, so that the image gets it as a small layer of its own.
RUN --mount=type=cache,target=/uv-cache \
    --mount=type=bind,source=pyproject.toml,target=/app/pyproject.toml \
    --mount=type=bind,source=uv.lock,target=/app/uv.lock \
    --mount=type=bind,source=README.md,target=/app/README.md \
    --mount=type=bind,source=LICENSE,target=/app/LICENSE \
    --mount=type=bind,source=mlsys,target=/app/mlsys \
    --mount=type=bind,source=service,target=/app/service \
    uv sync --frozen --no-dev --no-editable \
    && mkdir /code \
    && cp -a --parents .venv/bin/mlsys .venv/lib/python3.12/site-packages/mlsys \
       .venv/lib/python3.12/site-packages/mlsys-*.dist-info \
       .venv/lib/python3.12/site-packages/service /code


FROM python:3.12-slim-bookworm

# glibc gives threads arenas to allocate from, eight a core, and none can use what another has freed.
# The peak of a run was seen to be 10 to 30 MiB lower with two in all, and 15 lower again with one, at
# the same speed. `service/memory.py` sets it too, but some threads start before that. Arrow's jemalloc
# has arenas as well, and gives back after a second what the next chunk needs: with one, that waits for
# ten, a long run takes a hundredth of the page faults and holds 5 MiB less.
ENV MALLOC_ARENA_MAX=1 \
    JE_ARROW_MALLOC_CONF=narenas:1,dirty_decay_ms:10000 \
    PATH=/app/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /app

# Owned by root, so that what runs here can't change it. The first layer changes with the lock file
# alone: a change of code pushes and pulls a megabyte.
COPY --from=dependencies /app/.venv /app/.venv
COPY --from=application /code /app

USER 10001:10001

EXPOSE 8080

CMD ["uvicorn", "--factory", "service.app:create_app", "--host", "0.0.0.0", "--port", "8080"]

# One target for each program: registry, coordinator, aggregator, audit, deployment (the chart's Jobs), hospital-node.
#   docker build --target registry -t fedmesh-registry:0.1.0 .        (buildah: buildah build --target ...)
# Each has only its own packages, by uv.lock; none but hospital-node has TensorFlow. They run as user 65532 on a read-only
# root; /tmp is the only place that they write to, besides what is mounted.
#
# The base is pinned by its digest, that of the index over all platforms, which is the same from every registry and mirror. Another
# one, or an image that was loaded by its tag where there is no registry:
#   --build-arg PYTHON_IMAGE=mirror.example/library/python:3.11.13-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM ${PYTHON_IMAGE} AS build
ARG UV_VERSION=0.13.9
ENV UV_PYTHON=/usr/local/bin/python3.11 \
    UV_PYTHON_DOWNLOADS=never \
    UV_PROJECT_ENVIRONMENT=/opt/fedmesh \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1
RUN python -m pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}"
WORKDIR /src
COPY pyproject.toml uv.lock README.md LICENSE ./

# Packages first, then our own code: a change of the code builds one small layer anew.
FROM build AS build-registry
RUN uv sync --locked --no-default-groups --no-install-project --extra registry --extra otlp
COPY plans plans
COPY proto/gen proto/gen
COPY services services
RUN uv sync --locked --no-default-groups --no-editable --extra registry --extra otlp

FROM build AS build-coordinator
RUN uv sync --locked --no-default-groups --no-install-project --extra coordinator --extra otlp
COPY plans plans
COPY proto/gen proto/gen
COPY services services
RUN uv sync --locked --no-default-groups --no-editable --extra coordinator --extra otlp

FROM build AS build-aggregator
RUN uv sync --locked --no-default-groups --no-install-project --extra aggregator --extra otlp
COPY plans plans
COPY proto/gen proto/gen
COPY services services
RUN uv sync --locked --no-default-groups --no-editable --extra aggregator --extra otlp

FROM build AS build-audit
RUN uv sync --locked --no-default-groups --no-install-project --extra audit --extra otlp
COPY plans plans
COPY proto/gen proto/gen
COPY services services
RUN uv sync --locked --no-default-groups --no-editable --extra audit --extra otlp

FROM build AS build-deployment
RUN uv sync --locked --no-default-groups --no-install-project --extra deployment
COPY plans plans
COPY proto/gen proto/gen
COPY services services
RUN uv sync --locked --no-default-groups --no-editable --extra deployment

FROM build AS build-hospital-node
RUN uv sync --locked --no-default-groups --no-install-project --extra hospital-node --extra otlp
COPY plans plans
COPY proto/gen proto/gen
COPY services services
RUN uv sync --locked --no-default-groups --no-editable --extra hospital-node --extra otlp

FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 65532 fedmesh \
 && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fedmesh
ENV PATH=/opt/fedmesh/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
WORKDIR /
USER 65532:65532

FROM runtime AS registry
COPY --from=build-registry /opt/fedmesh /opt/fedmesh
ENTRYPOINT ["python", "-m", "services.registry"]

FROM runtime AS coordinator
COPY --from=build-coordinator /opt/fedmesh /opt/fedmesh
ENTRYPOINT ["python", "-m", "services.coordinator"]

FROM runtime AS aggregator
COPY --from=build-aggregator /opt/fedmesh /opt/fedmesh
ENTRYPOINT ["python", "-m", "services.aggregator"]

FROM runtime AS audit
COPY --from=build-audit /opt/fedmesh /opt/fedmesh
ENTRYPOINT ["python", "-m", "services.audit"]

FROM runtime AS deployment
COPY --from=build-deployment /opt/fedmesh /opt/fedmesh
ENTRYPOINT ["python", "-m", "services.deployment"]

FROM runtime AS hospital-node
COPY --from=build-hospital-node /opt/fedmesh /opt/fedmesh
ENTRYPOINT ["python", "-m", "services.hospital_node"]

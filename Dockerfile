# redraft: server, trainer and client in one image. No model weights inside: they are fetched into a volume.
#
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" -t redraft:0.1.0 .
#   docker run --rm --read-only --tmpfs /tmp -v redraft-cache:/var/cache/redraft -p 50051:50051 \
#     redraft:0.1.0 server --model.target demo --grpc.host 0.0.0.0
#
# BASE_IMAGE: any Debian-like image with Python 3.11 or later (with venv) as python3.
# Secrets `pip` (a pip.conf) and `ca` (PEM, its cert = /run/secrets/ca): for a package index of your own.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build
# Further packages for the environment, such as the fsspec driver of another object store than S3: "gcsfs==..."
ARG EXTRA_PACKAGES=""
# A compiler for the CPU kernels; it stays in this stage, so its version is the base image's matter.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/redraft
WORKDIR /src
COPY constraints.txt ./
# The large ones first: they change less often than our code. constraints.txt has every version.
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    /opt/redraft/bin/pip install --no-cache-dir --constraint constraints.txt torch transformers pyarrow
COPY . .
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    /opt/redraft/bin/pip install --no-cache-dir --constraint constraints.txt ".[server,train,otel,s3]" ${EXTRA_PACKAGES} \
    && install -m 755 scripts/image_entrypoint.py /opt/redraft/bin/image-entrypoint

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="redraft" \
      org.opencontainers.image.description="Speculative-decoding server whose draft is re-distilled from live traffic" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/redraft /opt/redraft
# The root file system can be read-only: what is written goes to /tmp and to the cache, both mounts.
RUN install -d -o 10001 -g 10001 /var/cache/redraft
ENV PATH=/opt/redraft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    HF_HOME=/var/cache/redraft/huggingface \
    REDRAFT_CACHE_DIR=/var/cache/redraft/models
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 9090
ENTRYPOINT ["image-entrypoint"]
CMD ["server"]

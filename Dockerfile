# One image for the action, the bot and the command line.
#
#   docker build -t merge-adapter .                                      PyTorch for CPUs
#   docker build -t merge-adapter:cuda --build-arg TORCH=cu130 .         PyTorch for NVIDIA GPUs
#   docker run --rm -e HF_TOKEN merge-adapter run OWNER/ADAPTER
#
# There is no USER and no WORKDIR: GitHub mounts the workspace, owned by the runner's user, and sets both itself.

ARG BASE_IMAGE=docker.io/library/python:3.11.15-slim-bookworm@sha256:b18992999dbe963a45a8a4da40ac2b1975be1a776d939d098c647482bcad5cba

FROM ${BASE_IMAGE} AS build

# cpu, or a CUDA version as PyTorch names it, such as cu130.
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH}
ARG EXTRAS="bot demo parquet quantized sentence-transformers vision"
# pip reads these by itself where they are given, for builds without the index.
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
ARG PIP_DISABLE_PIP_VERSION_CHECK=1
ARG PIP_NO_CACHE_DIR=1

RUN ["python3", "-m", "venv", "/opt/merge-adapter"]
ENV PATH=/opt/merge-adapter/bin:$PATH

# From what changes rarely to what changes with every commit: PyTorch, the other packages, this one.
COPY constraints.txt /build/
RUN pip install --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' /build/constraints.txt)"

COPY pyproject.toml scripts/container/requirements.py /build/
RUN python /build/requirements.py /build/pyproject.toml ${EXTRAS} > /build/requirements.txt \
 && pip install --constraint /build/constraints.txt --requirement /build/requirements.txt

COPY README.md LICENSE /build/
COPY src /build/src
RUN pip install --no-deps /build

FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="merge-adapter" \
      org.opencontainers.image.description="Merge a PEFT adapter into its base model, prove the result equivalent, and offer it on the Hugging Face Hub." \
      org.opencontainers.image.source="https://github.com/merge-adapter/merge-adapter" \
      org.opencontainers.image.licenses="Apache-2.0"

# The action finds changed adapters with git, and fetches their files with git-lfs.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git git-lfs \
 && rm -rf /var/lib/apt/lists/*

COPY --from=build /opt/merge-adapter /opt/merge-adapter
COPY scripts/container/health.py /opt/merge-adapter/health.py

ENV PATH=/opt/merge-adapter/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MERGE_ADAPTER_BOT_HOST=0.0.0.0

# Where `serve` listens; the healthy answer of every other command is that it runs.
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python3", "/opt/merge-adapter/health.py"]

# Python itself, no shell: a shell drops variables whose names hold a hyphen, such as INPUT_BASE-MODEL.
ENTRYPOINT ["/opt/merge-adapter/bin/merge-adapter"]
CMD ["--help"]

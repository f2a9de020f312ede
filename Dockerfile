# Processor only: PyTorch without CUDA, gigabytes smaller.
#   docker build -t anomalymatch .
#   docker run --rm -it -p 127.0.0.1:8000:8000 -v "$PWD/photos:/images:ro" -v "$PWD/runs:/work/runs" anomalymatch \
#     label dataset=folder data.root=/images ui.host=0.0.0.0 ui.show=false
# It prints an address with a token; open it with localhost as the name of the machine.
#
# With CUDA, from the ordinary index:
#   docker build -t anomalymatch:cuda --build-arg TORCH_INDEX= .
#   docker run --rm --gpus all -v "$PWD/photos:/images:ro" -v "$PWD/runs:/work/runs" anomalymatch:cuda \
#     run dataset=folder data.root=/images
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
RUN pip install --no-cache-dir build
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
COPY conf /source/conf
RUN python -m build --wheel --outdir /dist /source

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=ui,openvino
COPY constraints.txt /dist/
COPY --from=build /dist /dist
# torch and torchvision first and from one index, so that they fit together; then the rest, which keeps them.
RUN pip install --no-cache-dir --constraint /dist/constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch torchvision \
    && pip install --no-cache-dir --constraint /dist/constraints.txt "$(ls /dist/*.whl)[${EXTRAS}]" \
    && useradd --create-home --uid 1000 user \
    && mkdir -p /work/runs /cache \
    && chown -R user /work /cache
USER user
WORKDIR /work
ENV ANOMALYMATCH_CACHE=/cache
VOLUME ["/work/runs", "/cache"]
EXPOSE 8000
ENTRYPOINT ["anomalymatch"]
CMD ["--help"]

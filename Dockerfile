# docker build -t dsconvert .
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" dsconvert quantize best.pt --calib photos/
FROM python:3.11-slim AS build
COPY . /src
# the extra index has PyTorch without CUDA, which is several times smaller
RUN python -m venv /opt/dsconvert \
 && /opt/dsconvert/bin/pip install --no-cache-dir \
    --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu' '/src[report]'

FROM python:3.11-slim
COPY --from=build /opt/dsconvert /opt/dsconvert
RUN useradd --create-home --uid 1000 dsconvert && install -d -o dsconvert /work
# by number: Kubernetes sees that it is not root
USER 1000:1000
WORKDIR /work
# caches go where any user may write, also one given by --user
ENV HOME=/tmp
ENTRYPOINT ["/opt/dsconvert/bin/dsconvert"]
CMD ["--help"]

# docker build -t dsconvert .
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" dsconvert quantize best.pt --calib photos/
FROM python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS build
COPY . /src
# every package is checked against its hash in the lock; the page has PyTorch without CUDA, several times smaller
RUN python -m venv /opt/dsconvert \
 && /opt/dsconvert/bin/pip install --no-cache-dir --require-hashes --requirement /src/requirements.lock \
    --find-links https://download.pytorch.org/whl/cpu/torch/ \
 && /opt/dsconvert/bin/pip install --no-cache-dir --no-deps --no-build-isolation /src

FROM python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
COPY --from=build /opt/dsconvert /opt/dsconvert
RUN useradd --create-home --uid 1000 dsconvert && install -d -o dsconvert /work
# by number: Kubernetes sees that it is not root
USER 1000:1000
WORKDIR /work
# caches go where any user may write, also one given by --user
ENV HOME=/tmp
ENTRYPOINT ["/opt/dsconvert/bin/dsconvert"]
CMD ["--help"]

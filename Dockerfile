# The server (default target), without torch; --target training adds a small training job for the demonstration.
FROM python:3.12.11-slim-bookworm AS build
WORKDIR /source
RUN python -m venv /opt/gradwatch
COPY pyproject.toml README.md LICENSE ./
COPY agent agent
COPY server server
COPY dashboards dashboards
RUN /opt/gradwatch/bin/pip install --no-cache-dir '.[server]'

FROM build AS build-training
RUN /opt/gradwatch/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '.[agent]'

FROM python:3.12.11-slim-bookworm AS base
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin gradwatch && \
    install --directory --owner=10001 --group=10001 /run/gradwatch
ENV PATH=/opt/gradwatch/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp

FROM base AS training
COPY --from=build-training /opt/gradwatch /opt/gradwatch
COPY examples/endless.py /opt/endless.py
CMD ["gradwatch", "run", "--project", "demo", "--run", "deep sigmoid", "python", "/opt/endless.py"]

FROM base AS server
COPY --from=build /opt/gradwatch /opt/gradwatch
EXPOSE 8321
CMD ["gradwatch", "serve", "--host", "0.0.0.0"]

# The server (default target), without torch; --target training adds a small training job for the demonstration.
# What is downloaded stands before the sources and at the versions of constraints.txt: a changed line downloads nothing.
FROM python:3.12.11-slim-bookworm AS dependencies
WORKDIR /source
RUN python -m venv /opt/gradwatch
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
      [open(f'{extra}.txt', 'w').write('\n'.join(project['dependencies'] + packages)) \
       for extra, packages in project['optional-dependencies'].items()]" && \
    /opt/gradwatch/bin/pip install --no-cache-dir --constraint constraints.txt --requirement server.txt && \
    pip install --no-cache-dir --constraint constraints.txt hatchling

FROM dependencies AS build
COPY README.md LICENSE ./
COPY agent agent
COPY server server
COPY dashboards dashboards
COPY docs/alert.schema.json docs/alert.schema.json
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . && \
    /opt/gradwatch/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM dependencies AS training-dependencies
RUN /opt/gradwatch/bin/pip install --no-cache-dir --constraint constraints.txt --requirement agent.txt \
      --extra-index-url https://download.pytorch.org/whl/cpu

FROM training-dependencies AS build-training
COPY --from=build /wheels /wheels
RUN /opt/gradwatch/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

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

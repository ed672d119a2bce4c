"""Alembic's entry: runs the migrations on the engine that ``gradwatch_server.store.database`` hands over."""

from alembic import context

from gradwatch_server.store.database import writing
from gradwatch_server.store.schema import metadata

engine = context.config.attributes["engine"]
with writing(engine) as connection:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()

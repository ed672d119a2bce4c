"""A connection to read with, until the answer is made: a client that takes it slowly holds nothing."""

from collections.abc import Iterator
from typing import Annotated, cast

import sqlalchemy as sa
from fastapi import Depends, Request

from gradwatch_server.services import Services


def _connection(request: Request) -> Iterator[sa.Connection]:
    with cast("Services", request.app.state.services).engine.connect() as connection:
        yield connection


Reader = Annotated[sa.Connection, Depends(_connection, scope="function")]

"""Route of the layer x step map as packed bytes, from which the page draws it.

Half a million cells take a few milliseconds.
"""

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Query, Response
from numpy.typing import NDArray

from gradwatch_server.api.authorisation import of_run, requires
from gradwatch_server.api.dependencies import Engine
from gradwatch_server.api.problem import problems
from gradwatch_server.api.read_slots import ReadRoute
from gradwatch_server.api.routes.runs import RunId, Step
from gradwatch_server.store.parameters import load_depth_order
from gradwatch_server.store.rollups import queries

router = APIRouter(prefix="/api/v1", route_class=ReadRoute, tags=["runs"])

TILE_TYPE = "application/octet-stream"


@router.get(
    "/runs/{id}/tile",
    dependencies=[requires("read", of_run)],
    response_class=Response,
    responses={200: {"content": {TILE_TYPE: {}}}, **problems(404)},
)
def show_tile(
    engine: Engine,
    run_id: RunId,
    statistic: Annotated[Literal[queries.STATISTIC_NAMES], Query()] = "ratio",  # type: ignore[valid-type]
    from_step: Step = None,
    to_step: Step = None,
    points: Annotated[int, Query(ge=1, le=10_000)] = 500,
) -> Response:
    """Show the map as bytes: header length (uint32), header (JSON), then max, min and last (float32) and nonfinite.

    Everything is little-endian; each plane has shape (buckets, parameters in the order of depth). A missing gradient is
    -1, one that no optimizer steps -2; NaN and infinity are themselves, ``nonfinite`` (uint16) counts up to 65,535.
    """
    with engine.connect() as connection:
        order, names = load_depth_order(connection, run_id)
        buckets = queries.read_statistic(connection, run_id, statistic, from_step, to_step, order, points, means=False)
    header = {
        "statistic": statistic,
        "parameters": names,
        "steps": buckets.first_steps.tolist(),
        "last_steps": buckets.last_steps.tolist(),
    }
    return Response(_encode(header, buckets), media_type=TILE_TYPE)


def _encode(header: dict[str, Any], buckets: queries.Buckets) -> bytes:
    encoded_header = msgspec.json.encode(header)
    encoded_header += b" " * (-len(encoded_header) % 4)
    planes = [_floats(plane) for plane in (buckets.high, buckets.low, buckets.last)]
    nonfinite = np.minimum(buckets.nonfinite.astype(np.int64), 65_535).astype("<u2").tobytes()
    return b"".join([len(encoded_header).to_bytes(4, "little"), encoded_header, *planes, nonfinite])


def _floats(plane: NDArray[np.floating[Any]]) -> bytes:
    return plane.astype("<f4", copy=False).tobytes()

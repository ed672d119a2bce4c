"""Route of the metrics that Prometheus scrapes."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from gradwatch_server.api.authorisation import AuthorisedRoute, requires
from gradwatch_server.services import Services
from gradwatch_server.telemetry.metrics import RunCollector, ServerCollector

router = APIRouter(route_class=AuthorisedRoute, tags=["metrics"])


@router.get(
    "/metrics",
    dependencies=[requires("read")],
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}},
)
def show_metrics(request: Request) -> Response:
    """Show metrics made at scrape time: of active runs' latest samples, of alerts, of deliveries and of the server."""
    services = Services.of(request)
    registry = CollectorRegistry()
    registry.register(RunCollector(services))
    registry.register(ServerCollector(services))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"content-type": content_type})

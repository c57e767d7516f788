"""``piip-scale serve``: a trained model over HTTP."""

from __future__ import annotations

import importlib.util
import signal
import socket
from typing import Annotated

import typer

from piip_scale.cli.options import (
    Averages,
    ChosenWeights,
    Devices,
    Overrides,
    Spread,
    Step,
    TrainedPath,
    devices_asked,
)
from piip_scale.errors import KernelError, WorldError
from piip_scale.text import printable

_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
_GRACE_SECONDS = 30


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(serve)


def serve(
    config: TrainedPath,
    weights: ChosenWeights = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    max_mib: Annotated[float, typer.Option(min=0.001, help="Refuse larger bodies.")] = 20.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse images of more pixels.")] = 50_000_000,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may wait and be answered in.")] = 60.0,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are answered 503.")] = 16,
    spread: Spread = False,
    devices: Devices = None,
    step: Step = None,
    ema: Averages = False,
    overrides: Overrides = None,
) -> None:
    """Serve a trained model over HTTP, with a page to drop images on.

    `GET /` is the page, `POST /predict` takes an image (as the body, or in a form), `GET /health` and `GET /metrics`
    are for whoever watches. SIGTERM and Ctrl-C end it once what runs is answered. It asks nobody for a password.

    Example: `piip-scale serve runs/mine --port 8000`
    """
    if absent := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise KernelError(
            f"serving needs {', '.join(absent)}", rule="they are the extra serve", fix="pip install 'piip-scale[serve]'"
        )
    import uvicorn

    from piip_scale.serving.answering import Answering
    from piip_scale.serving.server import Limits, build_app
    from piip_scale.tasks.trained import find_trained

    spread_over = devices_asked(spread, devices)
    with listening(host, port) as place:
        found = find_trained(config, weights, overrides=overrides or [], step=step, averaged=ema)
        app = build_app(Answering(found, max_pixels, spread_over), Limits(max_mib, max_pixels, timeout, queue))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE_SECONDS))
        typer.echo(printable(f"serving {config}: http://{host}:{place.getsockname()[1]}"))
        # The server raises again what ended it, once all is answered: an end that was asked for is none of an error.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[place])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before a model is loaded for it.

    Raises:
        WorldError: The place is taken, or is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        reason, fix = error.strerror or str(error), "choose another --port or --host"
        raise WorldError(f"cannot listen on {host}:{port}", value=reason, fix=fix) from None
    return place

"""A worker process: receives batches of requests on a socket, has its handler answer them, sends the answers.

::

    python -m simulations.engines.worker FILE_DESCRIPTOR

The socket is also the worker's lifeline: a thread reads it all the time, and ends the process at once when the other
side closes it, which the operating system does for a parent that died. So that thread starts before anything heavy is
imported, and no worker outlives its run.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from queue import SimpleQueue
from threading import Thread

from simulations.engines.engine import Request
from simulations.engines.frames import BATCH, FAILURE, READY, Frame, receive_frame, send_frame

Batches = SimpleQueue[list[Request]]


def main(descriptor: int) -> None:
    """Serve until the socket closes."""
    connection = socket.socket(fileno=descriptor)
    connection.setblocking(True)
    batches: Batches = SimpleQueue()
    first: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_listen, args=(connection, first, batches), daemon=True).start()
    settings = first.get()
    gc.disable()  # while modules load there is nothing to collect, and looking for it takes a tenth of the time

    from common.errors import FedtuneError
    from common.quiet import quiet_dependencies

    quiet_dependencies()
    from simulations.engines.settings import WorkerSettings
    from simulations.engines.site_handler import worker_handler

    try:
        handler = worker_handler(WorkerSettings.unpack(settings))
    except FedtuneError as error:
        send_frame(connection, Frame(FAILURE, header=str(error).encode()))
        return
    gc.freeze()
    gc.enable()
    send_frame(connection, Frame(READY, ticket=handler.most))
    while True:
        for answer in handler.handle(batches.get()):
            send_frame(connection, Frame.of(answer))


def _listen(connection: socket.socket, first: SimpleQueue[bytes], batches: Batches) -> None:
    try:
        first.put(receive_frame(connection).header)
        while True:
            batch = receive_frame(connection)
            if batch.kind != BATCH:
                break
            batches.put([receive_frame(connection).request() for _ in range(batch.ticket)])
    except (EOFError, OSError):
        pass
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))

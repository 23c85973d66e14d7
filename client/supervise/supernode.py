"""``python -m client.supervise.supernode``: Flower's SuperNode, with its options, that comes back by itself."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points

from client.supervise.deaf_node import end_when_deaf
from client.supervise.heartbeats import keep_beating, note_answers
from client.supervise.in_step import answer_in_step
from client.supervise.prompt_polls import poll_promptly
from client.supervise.sign_off import sign_off_before
from client.supervise.steady_link import make_steady

PROGRAM = "flower-supernode"


def main() -> None:
    """Run Flower's program on the command line's arguments."""
    ours = logging.getLogger("client")  # Flower shows what is its own
    ours.addHandler(logging.StreamHandler())
    ours.propagate = False
    make_steady()
    sign_off_before(sys.argv[1:])
    keep_beating()
    note_answers()  # not those to signing off
    end_when_deaf()
    answer_in_step()
    poll_promptly()
    (program,) = entry_points(group="console_scripts", name=PROGRAM)
    sys.argv[0] = PROGRAM
    sys.exit(program.load()())


if __name__ == "__main__":
    main()

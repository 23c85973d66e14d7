"""Who may reach the agent's socket."""

from __future__ import annotations

FOLDER_MODE = 0o2750
"""Of the socket's folder: others cannot enter; what is made in it has the folder's group."""
SOCKET_MODE = 0o660
"""Of the socket: its owner, the agent, and its group, the executor's."""

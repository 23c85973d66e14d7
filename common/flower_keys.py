"""Keys of Flower's run config and node config that fedtune reads. Standard library only."""

from __future__ import annotations

CONFIG_YAML = "config-yaml"
"""Key of Flower's run config that holds a whole run config as YAML text."""
CONFIG_FILE = "config-file"
"""Key that names a run config file, absolute or inside the app, used where the text is empty."""
RUN_NAME, RUN_FENCE = "run-name", "run-fence"
"""Keys that tell a ServerApp which run of its coordinator's it works on, and which submission of it this is."""
AGENT_SOCKET = "agent-socket"
"""Key of Flower's node config that names the socket of a site's agent."""
DEVICE = "device"
"""Key of a simulated node's config that names its device."""

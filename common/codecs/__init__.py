"""How an update is packed for the wire."""

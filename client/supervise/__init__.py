"""What keeps a site running: its components, the supervisor that restarts them, systemd units for the same."""

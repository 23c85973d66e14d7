"""The control service in the running ServerApp: who watches and steers a run, and how the round loop is told."""

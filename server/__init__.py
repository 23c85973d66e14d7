"""The coordinator: round loop, admission, aggregation, checkpoints and the Flower ServerApp."""

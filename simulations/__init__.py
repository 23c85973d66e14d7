"""The simulation harness: virtual federations on one machine."""

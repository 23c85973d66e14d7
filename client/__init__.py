"""A site: local training, differential privacy, the Flower ClientApp and the command line."""

"""One module a family of aggregation methods, and the exact sum they stream into."""

"""A whole federation on one machine, as real processes: the coordinator and its sites, with TLS and keys."""

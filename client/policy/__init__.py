"""A site's policy: what it lets a run ask for, whatever the coordinator sends."""

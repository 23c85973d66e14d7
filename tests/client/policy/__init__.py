"""Tests of a site's policy."""

"""Tests of what keeps a site running."""

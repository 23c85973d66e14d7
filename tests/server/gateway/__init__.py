"""Tests of server/gateway."""

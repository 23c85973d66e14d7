"""Tests of server/control."""

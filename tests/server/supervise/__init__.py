"""Tests of server/supervise."""

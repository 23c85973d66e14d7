"""Tests of the resident agent."""

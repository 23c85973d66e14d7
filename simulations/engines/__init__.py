"""Engines: what computes the replies of virtual sites, in this process or in others."""

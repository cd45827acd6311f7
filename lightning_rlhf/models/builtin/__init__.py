"""Policies that are built by code or converted from a package: the worlds' models."""

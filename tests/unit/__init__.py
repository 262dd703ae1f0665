"""Tests of one module or package each, by package."""

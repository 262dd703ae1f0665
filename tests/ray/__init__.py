"""Tests that start Ray, or that concern the cluster it runs on."""

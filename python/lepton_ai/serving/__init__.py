"""Serving: a model file behind HTTP, by replicas that come and go with the load."""

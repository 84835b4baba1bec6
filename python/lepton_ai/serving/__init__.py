"""Serving: replicas of a model behind one queue, as many as the load needs."""

"""Stateful models: requests that are steps of a sequence run in order, in one slot, with what the last step left."""

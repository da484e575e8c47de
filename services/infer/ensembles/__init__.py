"""Ensembles: models that are composed of other models.

    configuration ──graph──> steps and tensors ──flow──> plan ──run──> one request through the steps
                     ^ errors of the configuration  ^ versions of the steps' models

Each step is an ordinary request to its model: batched with other requests, and with a queue limit of its own.
"""

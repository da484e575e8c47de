"""Ensembles: models that are made of other models.

    configuration ──graph──> steps and tensors ──flow──> plan ──run──> one request's way through the steps
                     ^ what is wrong by itself   ^ with the models that the steps are of

Every step is a call of its model like any other: batched with others, bounded, late or on time on its own.
"""

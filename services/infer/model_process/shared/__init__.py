"""A model in one process that several infer processes of a server feed: on a GPU, one copy of the weights.

    infer-0   session ── instance ── shared ══╗
    infer-1   session ── instance ── shared ══╬══> connections ── junction ── engine ──> hosted model
    infer-2   session ── instance ── shared ══╝    in turn, stacked where that can be

The process of a model is its *owner*. Whoever needs it first starts it (`owners`); it ends with the last one that uses
it, and whatever happens, with the last infer process. `shared`, `owners` and `mark` are used by infer processes,
`owner`, `junction`, `connection` and `merging` by owners; both talk as `isolation` does.
"""

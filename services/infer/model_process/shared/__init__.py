"""Shared model processes: one process runs a model for several infer processes, with one copy of the weights on a GPU.

    infer-0   session ── instance ── shared_process ══╗
    infer-1   session ── instance ── shared_process ══╬══> connections ── multiplexer ── engine ──> hosted model
    infer-2   session ── instance ── shared_process ══╝    round-robin, stacked where possible

The shared process of a model is its *owner*. The first infer process that needs the model starts the owner (`owners`).
The owner ends with its last user, and in any case with the last infer process. Infer processes use `shared_process`,
`owners` and `progress_mark`; owners use `owner`, `multiplexer`, `connection`, `merging` and `progress_mark`. Frames are
those of all model processes (`channel`).
"""
